"""K-way DPO on a tiny Llama from hidden states: four ranked answers a prompt, with a pairwise or a Plackett-Luce loss.

    pip install '.[demo]'
    python examples/kway_dpo.py [--loss plackett-luce]

A prompt counts up from a random token. Its best answer continues the count; the others do so with 2, 4 and 6 of their 8
tokens replaced by random ones. Prompts that start at 16 of the 64 tokens are held out. Nothing is downloaded.
"""

import argparse
import copy

import torch
from rich.progress import track
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastpref

VOCABULARY, PROMPT, ANSWER, K = 64, 4, 8, 4
LOSSES = {"ranking": fastpref.ranking_loss, "plackett-luce": fastpref.plackett_luce_loss}


def ranked_answers(prompts: int, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids and labels (K·G, T), member-major, and the ranks of the answers (G, K), 0 for the best."""
    ranks = torch.rand(prompts, K).argsort(-1)
    start = starts[torch.randint(len(starts), (prompts, 1))].repeat(K, 1)
    ids = (start + torch.arange(PROMPT + ANSWER)) % VOCABULARY
    wrong = torch.rand(K * prompts, ANSWER).argsort(-1) < 2 * ranks.T.reshape(-1, 1)
    ids[:, PROMPT:] = torch.where(wrong, torch.randint(VOCABULARY, wrong.shape), ids[:, PROMPT:])
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return ids, labels, ranks


def hidden_states(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model.model(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def answer_logps(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the (G, K) log-probs of the answers."""
    logps = fastpref.linear_sequence_logprobs(hidden_states(model, ids), model.lm_head.weight, labels)
    return logps.view(K, -1).T


def ranking_accuracy(policy: LlamaForCausalLM, reference: LlamaForCausalLM, data: tuple[Tensor, ...]) -> float:
    """Return the share of pairs that the implicit reward orders as the ranks do; a tie counts half."""
    ids, labels, ranks = data
    rewards = fastpref.implicit_reward(answer_logps(policy, ids, labels), answer_logps(reference, ids, labels))
    better = ranks[:, :, None] < ranks[:, None, :]
    gaps = (rewards[:, :, None] - rewards[:, None, :])[better]
    return ((gaps > 0).float() + (gaps == 0).float() / 2).mean().item()


def kway_loss(policy: LlamaForCausalLM, reference: LlamaForCausalLM, data: tuple[Tensor, ...], name: str) -> Tensor:
    ids, labels, ranks = data
    ref = answer_logps(reference, ids, labels)

    def losses(logps: Tensor) -> Tensor:
        return LOSSES[name](fastpref.implicit_reward(logps, ref, beta=0.1), ranks, reduction="none")

    hidden, weight = hidden_states(policy, ids), policy.lm_head.weight
    return fastpref.linear_preference_loss(hidden, weight, labels, losses, group_size=K).loss


def main() -> None:
    parser = argparse.ArgumentParser(description="K-way DPO on a tiny Llama, from hidden states.")
    parser.add_argument("--loss", choices=LOSSES, default="ranking", help="all pairs, or the ranking as a whole")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    policy = LlamaForCausalLM(config)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    held, trained = torch.randperm(VOCABULARY).split((16, VOCABULARY - 16))
    held_out = ranked_answers(128, held)
    before = ranking_accuracy(policy, reference, held_out)
    for _ in track(range(args.steps), description=f"K-way DPO, {args.loss}"):
        optimizer.zero_grad()
        kway_loss(policy, reference, ranked_answers(16, trained), args.loss).backward()
        optimizer.step()
    after = ranking_accuracy(policy, reference, held_out)
    print(f"held-out ranking accuracy: {before:.1%} before, {after:.1%} after {args.steps} steps")


if __name__ == "__main__":
    main()
