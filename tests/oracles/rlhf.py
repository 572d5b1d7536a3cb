"""The parts of PPO in 50 digits: loops over the tokens that count, each sum on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.oracles.precision import Number, Numbers, mp, numbers, rows


def counted(x: list[Numbers], mask: Tensor) -> Iterator[Numbers]:
    """Yield the numbers that count of each sequence that has any."""
    for row, counts in zip(x, mask.tolist(), strict=True):
        kept = [value for value, count in zip(row, counts, strict=True) if count]
        if kept:
            yield kept


def masked_mean(x: list[Numbers], mask: Tensor, reduction: str = "token", denominator: Any = None) -> float:
    """Return the mean over the tokens that count, or over the means of the sequences."""
    terms = [
        value for row in counted(x, mask) for value in (row if reduction == "token" else [mp.fsum(row) / len(row)])
    ]
    return float(mp.fsum(terms) / (denominator or len(terms) or 1))


def each(function: Callable[..., Number], *tensors: Tensor) -> list[Numbers]:
    """Return a function of the numbers at every place."""
    places = zip(*map(rows, tensors), strict=True)
    return [[function(*values) for values in zip(*row, strict=True)] for row in places]


def policy_loss(
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: Any = 0.2,
    dual_clip: float | None = None,
    **mean: Any,
) -> list[float]:
    """Return the loss, the approximate KL divergence and the clipped fraction of `ppo_policy_loss`."""
    low, high = clip if isinstance(clip, (tuple, list)) else (clip, clip)

    def branches(logp: Number, old: Number, advantage: Number) -> tuple[Number, Number]:
        ratio = mp.exp(logp - old)
        return -advantage * ratio, -advantage * min(max(ratio, 1 - mp.mpf(low)), 1 + mp.mpf(high))

    def loss(logp: Number, old: Number, advantage: Number) -> Number:
        single = max(branches(logp, old, advantage))
        return min(single, -advantage * dual_clip) if dual_clip is not None and advantage < 0 else single

    def clipped(logp: Number, old: Number, advantage: Number) -> Number:
        plain, held = branches(logp, old, advantage)
        return mp.mpf(held > plain)

    tensors = (logps, old, advantages)
    fields = (each(loss, *tensors), each(lambda a, b: (a - b) ** 2 / 2, logps, old), each(clipped, *tensors))
    return [masked_mean(x, mask, **mean) for x in fields]


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2, **mean: Any
) -> list[float]:
    """Return the loss and the clipped fraction of `ppo_value_loss`."""

    def branches(value: Number, old: Number, target: Number) -> tuple[Number, Number]:
        return (value - target) ** 2, (min(max(value, old - mp.mpf(clip)), old + mp.mpf(clip)) - target) ** 2

    def clipped(value: Number, old: Number, target: Number) -> Number:
        plain, held = branches(value, old, target)
        return mp.mpf(held > plain)

    tensors = (values, old, returns)
    fields = (each(lambda *x: max(branches(*x)) / 2, *tensors), each(clipped, *tensors))
    return [masked_mean(x, mask, **mean) for x in fields]


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: Any = 0.2,
    dual_clip: float | None = None,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    **mean: Any,
) -> list[float]:
    """Return the fields of `ppo_loss`."""
    policy, kl, clipped = policy_loss(logps, old_logps, advantages, mask, clip, dual_clip, **mean)
    value, _ = value_loss(values, old_values, returns, mask, value_clip, **mean)
    return [policy + value_coef * value, policy, value, kl, clipped]


def ptx_loss(logps: Tensor, mask: Tensor, gamma: float = 27.8, **mean: Any) -> list[float]:
    """Return `ptx_loss`."""
    return [-gamma * masked_mean(rows(logps), mask, **mean)]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return the advantages Σ_k (γλ)^k·δ over the tokens that count from each token on, and the returns."""
    advantages, returns = torch.zeros(2, *mask.shape, dtype=torch.float64)
    powers = [(mp.mpf(gamma) * mp.mpf(lam)) ** k for k in range(mask.shape[1])]
    for b, counts in enumerate(mask.tolist()):
        places = [t for t, count in enumerate(counts) if count]
        r, v = ([mp.mpf(x[b, t].item()) for t in places] for x in (rewards, values))
        following = [*v[1:], mp.mpf(0)]
        deltas = [a + gamma * c - d for a, c, d in zip(r, following[: len(r)], v, strict=True)]
        for i, t in enumerate(places):
            total = mp.fdot(powers[: len(deltas) - i], deltas[i:])
            advantages[b, t], returns[b, t] = float(total), float(total + v[i])
    return advantages, returns


PENALTIES: dict[str, Callable[[Number], Number]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: mp.exp(-d) - 1 + d,
}


def kl_shaped_rewards(
    scores: Tensor, logps: Tensor, ref: Tensor, mask: Tensor, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    """Return minus the penalty of every token that counts, with the score added at the last one."""
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b, counts in enumerate(mask.tolist()):
        places = [t for t, count in enumerate(counts) if count]
        for t in places:
            reward = -kl_coef * PENALTIES[estimator](mp.mpf(logps[b, t].item()) - mp.mpf(ref[b, t].item()))
            out[b, t] = float(reward + scores[b].item() if t == places[-1] else reward)
    return out


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return (x − μ)/√(σ² + 1e-8) of what counts, with μ added unless the mean is shifted."""
    kept = numbers(x[mask])
    mean = mp.fsum(kept) / (len(kept) or 1)
    deviation = mp.sqrt(mp.fsum((value - mean) ** 2 for value in kept) / (len(kept) or 1) + mp.mpf(1e-8))
    out = torch.zeros(x.shape, dtype=torch.float64)
    whitened = [float((value - mean) / deviation + (0 if shift_mean else mean)) for value in kept]
    out[mask] = torch.tensor(whitened, dtype=torch.float64)
    return out
