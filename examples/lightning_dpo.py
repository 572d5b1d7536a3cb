"""DPO with PyTorch Lightning, without materializing the logits.

Needs `pip install . transformers lightning`, and downloads nothing. A prompt counts up from a random token.
The chosen answer continues the count, and the rejected one is random. Prompts that start at 16 of the 64 tokens are
held out.
"""

from __future__ import annotations

import argparse
import copy

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import fastpref

VOCABULARY, PROMPT, ANSWER = 64, 4, 8


def preference_pairs(n: int, starts: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return n pairs of input ids and labels, (2, T) each, the chosen answer first; labels of -100 are not scored."""
    ids = (starts[torch.randint(len(starts), (n, 1, 1))] + torch.arange(PROMPT + ANSWER).expand(2, -1)) % VOCABULARY
    ids[:, 1, PROMPT:] = torch.randint(VOCABULARY, (n, ANSWER))
    labels = ids.index_fill(-1, torch.arange(PROMPT), -100)
    return [{"input_ids": pair, "labels": scored} for pair, scored in zip(ids, labels, strict=True)]


def dpo(policy: torch.nn.Module, reference: torch.nn.Module, batch: dict[str, torch.Tensor]) -> fastpref.PreferenceLoss:
    """Return the loss and the implicit rewards of B pairs, whose tensors are (B, 2, T)."""
    flat = {name: x.transpose(0, 1).flatten(0, 1) for name, x in batch.items()}  # (2B, T): chosen, then rejected
    logps = policy(**flat, fastpref=True, reduction="sum").logprobs
    with torch.no_grad():
        ref = reference(**flat, fastpref=True, reduction="sum").logprobs
    return fastpref.dpo_loss(*logps.chunk(2), *ref.chunk(2), beta=0.1)


class DPO(lightning.LightningModule):
    def __init__(self, policy: torch.nn.Module) -> None:
        super().__init__()
        self.policy, self.reference = policy, copy.deepcopy(policy).eval().requires_grad_(False)

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return dpo(self.policy, self.reference, batch).loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        """Log the share of pairs whose chosen answer has the larger implicit reward; a tie counts half."""
        _, chosen, rejected = dpo(self.policy, self.reference, batch)
        self.log("accuracy", ((chosen - rejected).sign() / 2 + 0.5).mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description="DPO on a tiny Llama with PyTorch Lightning.")
    for name, default in {"steps": 30, "batch": 4, "accumulation": 2, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    lightning.seed_everything(args.seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    policy = fastpref.attach(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, use_cache=False, **shape)))
    held, trained = torch.randperm(VOCABULARY).split((16, VOCABULARY - 16))
    train, test = preference_pairs(args.steps * args.batch * args.accumulation, trained), preference_pairs(128, held)
    train, test = DataLoader(train, args.batch, shuffle=True), DataLoader(test, 32)
    model = DPO(policy)
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=args.accumulation, logger=False, enable_checkpointing=False
    )
    before = trainer.validate(model, test)[0]["accuracy"]
    trainer.fit(model, train)
    after = trainer.validate(model, test)[0]["accuracy"]
    print(f"held-out preference accuracy: {before:.1%} before, {after:.1%} after {args.steps} steps")


if __name__ == "__main__":
    main()
