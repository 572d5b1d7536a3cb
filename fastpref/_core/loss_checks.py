"""Checks of the arguments of losses: (B,) vectors, (B, K) rewards and (B, T) tokens.

Every error names the argument, and says what was given and what was expected. Only `check_untied` reads values of a
tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref._core.autograd import has_values
from fastpref._core.checks import (
    FLOATING,
    INTEGER,
    REDUCTIONS,
    check_choice,
    check_finite,
    check_same_device,
    check_tensor,
    check_vector,
    describe,
    is_like,
    is_sequence,
    shape_error,
)

NUMBERS = (*FLOATING, *INTEGER)
MAX_K = 64
# The largest bound of a clip: 1 plus a larger one is not a float32.
MAX_CLIP = 1e30
TOKEN_REDUCTIONS = ("token", "sequence")


def check_vectors(**named: Tensor | None) -> None:
    """Raise unless every given tensor is floating point, (B,) with one B, and on one device."""
    like = None
    for name, value in named.items():
        if value is None:
            continue
        if like is None or not is_like(value, like[1]):
            check_vector(name, value, FLOATING, "a floating-point tensor (B,)", like)
        like = like or (name, value)


def check_of_pairs(name: str, value: Tensor, like: tuple[str, Tensor]) -> Tensor:
    """Check a number for each pair, (B,), which may be an integer, and return it as floating point.

    Args:
        name: the argument's name.
        value: the argument.
        like: the name and the tensor whose first dimension is B; integers become its dtype, float32 at the least.
    """
    check_vector(name, value, NUMBERS, "a floating-point or integer tensor (B,)", like)
    return value if value.is_floating_point() else value.to(torch.promote_types(like[1].dtype, torch.float32))


def check_margin(margin: Tensor | float | None, like: tuple[str, Tensor]) -> Tensor | float | None:
    """Check a margin, None, a number or (B,), and return it as a float or a floating-point tensor."""
    if margin is None:
        return None
    return check_of_pairs("margin", margin, like) if isinstance(margin, Tensor) else check_finite("margin", margin)


def check_pairwise(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None, center_weight: float, reduction: str
) -> tuple[Tensor | float | None, float]:
    """Check `pairwise_reward_loss`'s arguments. Return the margin and `center_weight`, with numbers as floats."""
    check_vectors(chosen=chosen, rejected=rejected)
    check_choice("reduction", reduction, REDUCTIONS)
    return check_margin(margin, ("chosen", chosen)), check_finite("center_weight", center_weight, least=0.0)


def _check_rewards(rewards: Tensor, reduction: str) -> None:
    check_tensor("rewards", rewards, FLOATING, "a floating-point tensor (B, K)")
    check_choice("reduction", reduction, REDUCTIONS)
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise shape_error("rewards", rewards, "(B, K), K answers per prompt", 2)


def _check_like(name: str, value: Tensor, like: tuple[str, Tensor]) -> None:
    like_name, first = like
    if value.shape != first.shape:
        raise shape_error(name, value, f"of {like_name}' shape, {tuple(first.shape)}", 2)
    check_same_device(name, value, like_name, first)


def check_best(rewards: Tensor, best: Tensor, reduction: str) -> None:
    """Check `best_of_k_loss`'s arguments."""
    _check_rewards(rewards, reduction)
    check_vector("best", best, INTEGER, "an int64 or int32 tensor (B,)", ("rewards", rewards))


def check_ranking(rewards: Tensor, ranks: Tensor, mask: Tensor | None, reduction: str, *, least: int = 2) -> None:
    """Check the arguments of a loss of rankings of `least` to 64 answers."""
    _check_rewards(rewards, reduction)
    if not least <= rewards.shape[1] <= MAX_K:
        raise ValueError(f"rewards must be (B, K) with K from {least} to {MAX_K}; got {describe(rewards)}")
    check_tensor("ranks", ranks, INTEGER, "an int64 or int32 tensor (B, K), rank 0 the best")
    _check_like("ranks", ranks, ("rewards", rewards))
    if mask is not None:
        check_tensor("mask", mask, (torch.bool,), "a bool tensor (B, K), True where an answer counts")
        _check_like("mask", mask, ("rewards", rewards))


def check_untied(ranks: Tensor, mask: Tensor | None) -> None:
    """Raise `ValueError` if ranks tie among answers that count; check only on a CPU and outside of a graph."""
    if ranks.device.type != "cpu" or not has_values(ranks):
        return
    tied = ranks[:, :, None] == ranks[:, None, :]
    if mask is not None:
        tied = tied & mask[:, :, None] & mask[:, None, :]
    tied = tied.triu(1).any((1, 2))
    if tied.any():
        row = int(tied.nonzero()[0])
        raise ValueError(f"ranks must not tie among answers that count; got {ranks[row].tolist()} for prompt {row}")


def check_scores(scores: Tensor, mask: Tensor | None) -> None:
    """Check `ranks_from_scores`'s arguments."""
    check_tensor("scores", scores, (*NUMBERS, torch.int16, torch.int8, torch.uint8), "numbers (B, K)")
    if scores.dim() != 2:
        raise shape_error("scores", scores, "(B, K), K answers per prompt", 2)
    if mask is not None:
        check_tensor("mask", mask, (torch.bool,), "a bool tensor (B, K), True where an answer counts")
        _check_like("mask", mask, ("scores", scores))


def check_tokens(mask: Tensor, **named: Tensor) -> None:
    """Raise unless the named tensors are floating point, the mask is bool, and all are (B, T) on one device."""
    first_name, first = next(iter(named.items()))
    for name, value in named.items():
        check_tensor(name, value, FLOATING, "a floating-point tensor (B, T)")
    if first.dim() != 2:
        raise shape_error(first_name, first, "(B, T), one column per token", 2)
    check_tensor("mask", mask, (torch.bool,), "a bool tensor (B, T), True where a token counts")
    for name, value in (*named.items(), ("mask", mask)):
        if value.shape != first.shape:
            raise shape_error(name, value, f"(B, T) = {tuple(first.shape)}, like {first_name}", 2)
        check_same_device(name, value, first_name, first)


def check_mean(mask: Tensor, reduction: str, denominator: Tensor | float | None) -> None:
    """Check the arguments of a masked mean over tokens."""
    check_choice("reduction", reduction, TOKEN_REDUCTIONS)
    if isinstance(denominator, Tensor):
        if denominator.dim() or denominator.is_complex():
            raise ValueError(f"denominator must be None, a number or a real tensor (); got {describe(denominator)}")
        check_same_device("denominator", denominator, "mask", mask)
    elif denominator is not None:
        check_finite("denominator", denominator, least=0.0)


def check_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[float, float]:
    """Check `gae`'s arguments and return γ and λ as floats."""
    check_tokens(mask, rewards=rewards, values=values)
    return check_finite("gamma", gamma, least=0.0, most=1.0), check_finite("lam", lam, least=0.0, most=1.0)


def check_clip(clip: object) -> tuple[float, float]:
    """Return `clip`, a number above 0 or a pair (low, high), as a pair; raise if it is neither."""
    bounds = clip if is_sequence(clip) and len(clip) == 2 else (clip, clip)
    try:
        low, high = [check_finite("clip", bound, least=0.0, most=MAX_CLIP) for bound in bounds]
        if low == high == 0:
            raise ValueError
    except (TypeError, ValueError) as error:
        raise type(error)(
            "clip must be a number above 0, or a pair (low, high) of numbers, 0 or more and not both 0, "
            f"up to {MAX_CLIP:g}; got {describe(clip)}"
        ) from None
    return low, high


def check_dual_clip(dual_clip: float | None) -> float | None:
    """Return `dual_clip` as a float, or None for None; raise if it is not above 1."""
    return None if dual_clip is None else check_finite("dual_clip", dual_clip, least=1.0, most=MAX_CLIP, exclusive=True)
