"""Held-out measurements: how often the better of two answers gets the higher score, and what a policy answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.cli.demo import model as models
from fastpref.cli.demo.ppo import sequence_kl
from fastpref.cli.demo.sample import Sampler
from fastpref.cli.demo.stop import Stop
from fastpref.cli.demo.tokens import IGNORED, Batch, Encoded, collate

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
    """(N, K) scores on the CPU of every answer to every prompt; `score` maps a batch of B sequences to (B,)."""
    answers = len(encoded[0].answers)
    # Like lengths together: less padding. The scores go back to where they belong.
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
    """One sampled answer to every held-out prompt; tensors (N,), on the CPU.

    Attributes:
        scores: the reward model's.
        kl: of the policy to the reference on it, nats (k3).
        lengths: sampled tokens.
        ended: whether it came to its end.
        answers: as text.
        best_logps: the policy's mean log-prob of a token of the best answer that the data has, nats.
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
    """Sample from the policy for every prompt, and measure what it says and what it makes of the best answers."""
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
    """(N, K) numbers of scored tokens."""
    return torch.tensor([[float(len(answer)) for answer in example.answers] for example in encoded])


def pair_accuracy(scores: Tensor, pair: tuple[int, int]) -> float:
    """Share of the rows of (N, K) scores where the better rank scores higher; a tie counts one half."""
    margin = scores[:, pair[0]] - scores[:, pair[1]]
    return ((margin > 0).double() + 0.5 * (margin == 0).double()).mean().item()


def pair_margin(scores: Tensor, pair: tuple[int, int]) -> float:
    """Mean of the better rank's score minus the worse's."""
    return (scores[:, pair[0]] - scores[:, pair[1]]).double().mean().item()
