"""Held-out pair accuracy: how often the better of two answers gets the higher score."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastpref.cli.demo.stop import Stop
from fastpref.cli.demo.tokens import Batch, Encoded, collate

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
