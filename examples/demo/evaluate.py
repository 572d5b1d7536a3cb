"""Held-out measurements: the scores of the data's answers, and answers sampled from a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.demo import model as models
from examples.demo.ppo import sequence_kl
from examples.demo.sample import Sampler
from examples.demo.stop import Stop
from examples.demo.tokens import IGNORED, Batch, Encoded, collate

SEQUENCES_PER_BATCH = 64


def score_answers(
    score: Callable[[Batch], Tensor],
    encoded: Sequence[Encoded],
    *,
    pad: int,
    device: torch.device,
    stop: Stop,
    show: Callable[[int], None],
) -> Tensor:
    """Return the (N, K) scores of every answer to every prompt, on the CPU; `score` maps B sequences to (B,)."""
    answers = len(encoded[0].answers)
    # Batches of similar lengths have less padding. The scores are stored in the original order.
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].prompt))
    scores = torch.empty(len(encoded), answers)
    step = max(1, SEQUENCES_PER_BATCH // answers)
    for start in range(0, len(order), step):
        stop.check()
        rows = order[start : start + step]
        sequences = [(encoded[i].prompt, answer) for i in rows for answer in encoded[i].answers]
        with torch.no_grad():
            scores[rows] = score(collate(sequences, pad, device)).view(-1, answers).float().cpu()
        show(len(rows))
    return scores


@dataclass
class HeldOutSamples:
    """One sampled answer to every held-out prompt. The tensors are (N,), on the CPU.

    Attributes:
        scores: scores of the reward model.
        kl: KL of the policy to the reference on the answer, in nats (k3).
        lengths: number of sampled tokens.
        ended: 1 if the end of text was sampled, else 0.
        best_logps: the policy's mean log-prob of a token of the data's best answer, in nats.
        answers: the answers as text.
    """

    scores: Tensor
    kl: Tensor
    lengths: Tensor
    ended: Tensor
    best_logps: Tensor
    answers: list[str]


def sample_answers(
    policy: Any,
    reference: Any,
    reward_model: nn.Module,
    prompts: Sequence[list[int]],
    best: Sequence[list[int]],
    *,
    draw: Sampler,
    tokenizer: Any,
    stop: Stop,
    show: Callable[[int], None],
) -> HeldOutSamples:
    """Sample an answer to every prompt, and measure it and the log-probs of the data's best answers."""
    for model in (policy, reference, reward_model):
        model.eval()
    count = len(prompts)
    found = HeldOutSamples(*torch.zeros(5, count), answers=[""] * count)
    order = sorted(range(count), key=lambda i: len(prompts[i]))
    for start in range(0, count, SEQUENCES_PER_BATCH):
        stop.check()
        rows = order[start : start + SEQUENCES_PER_BATCH]
        samples = draw(policy, [prompts[i] for i in rows])
        given = collate([(prompts[i], best[i]) for i in rows], tokenizer.pad_token_id, policy.device)
        with torch.no_grad():
            found.scores[rows] = models.rewards(reward_model, samples.batch).cpu()
            ref_logps = models.token_logps(reference, samples.batch)
        found.kl[rows] = sequence_kl(samples.logps, ref_logps, samples.mask).cpu()
        found.lengths[rows] = samples.mask.sum(1).float().cpu()
        found.ended[rows] = samples.ended.float().cpu()
        found.best_logps[rows] = (models.answer_logps(policy, given) / (given.labels != IGNORED).sum(1)).cpu()
        for row, answer in zip(rows, tokenizer.batch_decode(samples.answers, skip_special_tokens=True), strict=True):
            found.answers[row] = answer
        show(len(rows))
    return found


def answer_lengths(encoded: Sequence[Encoded]) -> Tensor:
    """Return the (N, K) numbers of scored tokens."""
    return torch.tensor([[float(len(answer)) for answer in example.answers] for example in encoded])


def pair_accuracy(scores: Tensor, pair: tuple[int, int]) -> float:
    """Return the share of rows of (N, K) scores where the better rank scores higher; a tie counts one half."""
    margin = scores[:, pair[0]] - scores[:, pair[1]]
    return ((margin > 0).double() + 0.5 * (margin == 0).double()).mean().item()


def pair_margin(scores: Tensor, pair: tuple[int, int]) -> float:
    """Return the mean difference between the scores of the better and the worse rank."""
    return (scores[:, pair[0]] - scores[:, pair[1]]).double().mean().item()
