"""The losses of reward models in 50 digits, one prompt at a time: pair by pair, or place by place of a ranking."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from tests.oracles.precision import Numbers, exact, log_sum_exp, minus_log_sigmoid, mp


def pairwise(chosen: float, rejected: float, margin: float = 0.0, center_weight: float = 0.0) -> float:
    """Return −log σ(chosen − rejected − margin) + center_weight·(chosen + rejected)²."""
    a, b, margin = exact((chosen, rejected, margin))
    return float(minus_log_sigmoid(a - b - margin) + center_weight * (a + b) ** 2)


def best_of_k(rewards: Sequence[float], best: int) -> float:
    """Return −log softmax(rewards)[best]."""
    r = exact(rewards)
    return float(log_sum_exp(r) - r[best])


def ranking(rewards: Sequence[float], ranks: Sequence[float], mask: Sequence[bool] | None = None) -> float:
    """Return the mean of −log σ(r_i − r_j) over the counted pairs with i ranked better than j; 0 without one."""
    r = exact(rewards)
    losses = [
        minus_log_sigmoid(r[i] - r[j] if ranks[i] < ranks[j] else r[j] - r[i])
        for i, j in combinations(range(len(r)), 2)
        if (mask is None or (mask[i] and mask[j])) and ranks[i] != ranks[j]
    ]
    return float(mp.fsum(losses) / (len(losses) or 1))


def in_order(ranks: Sequence[float], mask: Sequence[bool] | None) -> list[int]:
    """Return the answers that count, the best first."""
    return sorted((i for i in range(len(ranks)) if mask is None or mask[i]), key=lambda i: ranks[i])


def tails(rewards: Sequence[float], ranks: Sequence[float], mask: Sequence[bool] | None) -> tuple[list[int], Numbers]:
    """Return the answers that count, the best first, and log Σ exp r over each and those below it."""
    r, order = exact(rewards), in_order(ranks, mask)
    sums, total = [], mp.mpf(0)
    for i in reversed(order):
        total += mp.exp(r[i])
        sums.append(mp.log(total))
    return order, sums[::-1]


def plackett_luce(rewards: Sequence[float], ranks: Sequence[float], mask: Sequence[bool] | None = None) -> float:
    """Return minus the log-probability that the best, and then the best of those left, is drawn from a softmax."""
    order, sums = tails(rewards, ranks, mask)
    return float(mp.fsum(total - mp.mpf(rewards[i]) for i, total in zip(order, sums, strict=True)))


def plackett_luce_gradient(
    rewards: Sequence[float], ranks: Sequence[float], mask: Sequence[bool] | None = None
) -> list[float]:
    """Return the gradient of `plackett_luce` by the rewards."""
    r = exact(rewards)
    order, sums = tails(rewards, ranks, mask)
    gradient = [mp.mpf(0)] * len(r)
    for place, i in enumerate(order):
        # The answer is drawn from at its own place and at every place before it.
        gradient[i] = mp.fsum(mp.exp(r[i] - total) for total in sums[: place + 1]) - 1
    return [float(x) for x in gradient]
