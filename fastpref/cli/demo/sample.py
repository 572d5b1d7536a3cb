"""Sampling answers to a batch of prompts, with the keys and values of what was read kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpref
from fastpref.cli.demo import model as models
from fastpref.cli.demo.tokens import IGNORED, Batch, collate


class Samples(NamedTuple):
    """Prompts and sampled answers, and what their sampler thought of them.

    Attributes:
        batch: labels are the sampled tokens, (B, L).
        mask: (B, L−1) bool, True where the token that a position predicts was sampled.
        logps: (B, L−1) log-probs of the sampled tokens, nats, 0 elsewhere.
        answers: the B answers as token ids, each with its end of text.
        ended: (B,) bool, whether the end of text was sampled, and not put there because there was no more room.
    """

    batch: Batch
    mask: Tensor
    logps: Tensor
    answers: list[list[int]]
    ended: Tensor


Sampler = Callable[[Any, Sequence[list[int]]], Samples]
"""Samples from a model an answer to every prompt."""


def check_sampling(model: Any) -> None:
    """Raise ValueError for a model that cannot be sampled from as `sample` does."""
    taken = inspect.signature(model.base_model.forward).parameters
    lacking = [name for name in ("position_ids", "past_key_values") if name not in taken]
    if lacking:
        raise ValueError(f"PPO samples with {' and '.join(lacking)}, which {type(model).__name__} does not take")


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1) indices drawn from the softmax of (B, V) logits, by one uniform number each.

    `torch.multinomial` draws V of them, which on a CPU takes longer than the model.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[list[int]], *, length: int, pad: int, eos: int, generator: torch.Generator
) -> Samples:
    """One answer to every prompt, of at most `length` tokens, drawn from the model as it is: temperature 1, no cut-off.

    An answer that comes to no end is given one, which was not sampled and has no log-prob: a reward model knows only
    whole answers.
    """
    device = model.device
    width = max(map(len, prompts))
    # Padded on the left, so that all prompts' next tokens are in one column.
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    head = models.head(model)
    going = torch.ones(len(prompts), 1, dtype=torch.bool, device=device)
    cache, hidden, tokens = None, [], []
    while len(tokens) < length and going.any():
        out = model.base_model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        hidden.append(out.last_hidden_state[:, -1:])
        ids = draw(head.logits(hidden[-1][:, 0]), generator)
        tokens.append(ids.masked_fill(~going, IGNORED))
        going = going & (ids != eos)
        seen = torch.cat([seen, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    labels = torch.cat(tokens, 1)
    sampled = fastpref.linear_token_logprobs(
        torch.cat(hidden, 1), head.weight, labels, shift=False, **head.options
    )  # fmt: skip
    answers = [[token for token in row if token != IGNORED] for row in labels.tolist()]
    ended = [answer[-1] == eos for answer in answers]
    answers = [answer if end else [*answer, eos] for answer, end in zip(answers, ended, strict=True)]
    batch = collate(list(zip(prompts, answers, strict=True)), pad, device)
    for row, end in enumerate(ended):
        if not end:
            batch.labels[row, len(prompts[row]) + len(answers[row]) - 1] = IGNORED
    mask = batch.labels[:, 1:] != IGNORED
    # Both run through the answers row by row: the sampled tokens come in the same order.
    logps = torch.zeros_like(mask, dtype=sampled.dtype).masked_scatter(mask, sampled[labels != IGNORED])
    return Samples(batch, mask, logps, answers, torch.tensor(ended, device=device))
