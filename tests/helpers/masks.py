"""Masks of tokens and of answers, and ranks of answers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def holey(B: int, T: int, share: float = 0.7, seed: int = 1) -> Tensor:
    """Return a mask with holes and ragged ends. Of several sequences the first has no token that counts."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) < share
    mask &= torch.arange(T) < torch.randint(T + 1, (B, 1), generator=generator)
    if B > 1:
        mask[0] = False
    return mask


def ragged(B: int, T: int, seed: int = 2) -> Tensor:
    """Return a mask without holes, of sequences of unequal lengths."""
    lengths = torch.randint(T // 4, T + 1, (B, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(T) < lengths


def some_answers(batch: int, answers: int) -> Tensor:
    """Return a mask under which no answer, one, two and all of the first four prompts count, and any of the others."""
    mask = torch.rand(batch, answers) < 0.6
    for row, count in enumerate((0, 1, 2, answers)):
        if row < batch:
            mask[row] = torch.arange(answers) < count
            mask[row] = mask[row][torch.randperm(answers)]
    return mask


def some_orders(batch: int, answers: int) -> Tensor:
    """Return ranks (batch, answers) without ties."""
    return torch.stack([torch.randperm(answers) for _ in range(batch)]) if batch else torch.zeros(0, answers).long()


@st.composite
def token_batches(draw: st.DrawFn) -> tuple[int, int, Tensor, int]:
    """Draw B, T, a mask (B, T) and a seed."""
    B, T = draw(st.integers(0, 4)), draw(st.one_of(st.integers(0, 12), st.sampled_from([31, 32, 33, 64, 100])))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    steps = torch.arange(T)
    if draw(st.booleans()):
        mask &= steps < torch.randint(T + 1, (B, 1), generator=generator)
    if draw(st.booleans()):
        mask &= steps >= torch.randint(T + 1, (B, 1), generator=generator)
    return B, T, mask, seed
