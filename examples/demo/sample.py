"""Sample answers to a batch of prompts, with a cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpref
from examples.demo import model as models
from examples.demo.tokens import IGNORED, Batch, collate


class Samples(NamedTuple):
    """Prompts and sampled answers, with the answers' log-probs.

    Attributes:
        batch: prompts and answers, (B, L); the labels are the sampled tokens.
        mask: (B, L−1) bool, True where the token that a position predicts was sampled.
        logps: (B, L−1) log-probs of the sampled tokens in nats, 0 elsewhere.
        answers: the B answers as token ids, each with its end of text.
        ended: (B,) bool, True if the end of text was sampled, False if it was appended.
    """

    batch: Batch
    mask: Tensor
    logps: Tensor
    answers: list[list[int]]
    ended: Tensor


Sampler = Callable[[Any, Sequence[list[int]]], Samples]
"""A function that samples an answer to every prompt from a model."""


def check_sampling(model: Any) -> None:
    """Raise ValueError if `sample` does not support a model."""
    taken = inspect.signature(model.base_model.forward).parameters
    lacking = [name for name in ("position_ids", "past_key_values") if name not in taken]
    if lacking:
        raise ValueError(f"PPO samples with {' and '.join(lacking)}, which {type(model).__name__} does not take")


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (B, 1) indices from the softmax of (B, V) logits, with one uniform number each.

    `torch.multinomial` draws V numbers for each index, which takes longer than the model on a CPU.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[list[int]], *, length: int, pad: int, eos: int, generator: torch.Generator
) -> Samples:
    """Sample an answer of at most `length` tokens to every prompt, at temperature 1 and without a cut-off.

    An answer that reaches `length` without an end of text gets one, because the reward model was trained on whole
    answers. That token was not sampled and has no log-prob.
    """
    device = model.device
    width = max(map(len, prompts))
    # Padded on the left, so that the next tokens of all prompts are in one column.
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
    states = torch.cat(hidden, 1)
    sampled = fastpref.linear_token_logprobs(states, head.weight, labels, shift=False, **head.options)
    answers = [[token for token in row if token != IGNORED] for row in labels.tolist()]
    ended = [answer[-1] == eos for answer in answers]
    answers = [answer if end else [*answer, eos] for answer, end in zip(answers, ended, strict=True)]
    batch = collate(list(zip(prompts, answers, strict=True)), pad, device)
    for row, end in enumerate(ended):
        if not end:
            batch.labels[row, len(prompts[row]) + len(answers[row]) - 1] = IGNORED
    mask = batch.labels[:, 1:] != IGNORED
    # The sampled tokens have the same order in both layouts, row by row.
    logps = torch.zeros_like(mask, dtype=sampled.dtype).masked_scatter(mask, sampled[labels != IGNORED])
    return Samples(batch, mask, logps, answers, torch.tensor(ended, device=device))
