"""Log-probs from logits: the definition in plain PyTorch.

The functions are differentiable, exact in float64, and written to be read. They make float32 (or float64) copies of the
scored rows; `fastpref.token_logprobs` computes the same numbers without copies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.reference.gather import gather, whole
from fastpref.reference.results import result_type
from fastpref.reference.sequences import count_scored, ld_weights, number_sequences, score, sum_sequences


def transform_logits(logits: Tensor, *, temperature: float, logit_scale: float, softcap: float | None) -> Tensor:
    """Return z = softcap·tanh(logits·logit_scale/softcap)/temperature in float32 (float64 for float64).

    Each part is optional.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if temperature != 1.0:
        z = z / temperature
    return z


class Rows(NamedTuple):
    """Scored rows.

    Attributes:
        z: (n, V), the transformed logits.
        logp: (n, V), log softmax(z).
        targets: (n,), the label of each row.
    """

    z: Tensor
    logp: Tensor
    targets: Tensor


def _entropy(rows: Rows) -> Tensor:
    """Return −Σ p log p, where a p of 0 adds 0."""
    p = rows.logp.exp()
    return -(p * rows.logp.masked_fill(p == 0, 0.0)).sum(-1)


def _top2_margin(rows: Rows) -> Tensor:
    """Return the largest z minus the second largest; +inf where V = 1."""
    z = rows.z.detach()
    if z.shape[-1] == 1:
        return torch.full_like(z[:, 0], torch.inf)
    best, second = z.topk(2).values.unbind(-1)
    return best - second


STATISTICS: dict[str, Callable[[Rows], Tensor]] = {
    "lse": lambda rows: rows.z.detach().logsumexp(-1),
    "entropy": _entropy,
    "mean_logits": lambda rows: rows.z.detach().mean(-1),
    "is_top1": lambda rows: rows.z.argmax(-1) == rows.targets,
    "log_sum_sq_probs": lambda rows: (2 * rows.logp.detach()).logsumexp(-1),
    "top2_margin": _top2_margin,
}
"""The statistics of rows by name, (n,) each. A gradient flows through the entropy alone."""


def check_names(stats: tuple[str, ...], known: Any = STATISTICS) -> None:
    """Raise `ValueError` unless every statistic is known."""
    for name in stats:
        if name not in known:
            raise ValueError(f"stats must be among {', '.join(map(repr, known))}; got {name!r}")


class _Scores(NamedTuple):
    """Log-probs and statistics (..., T'), whether each position is scored, and the sequence that it belongs to."""

    logps: Tensor
    statistics: tuple[Tensor, ...]
    scored: Tensor
    numbers: Tensor
    sequences: int


def _score(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    stats: tuple[str, ...],
    ignore_index: int,
    shift: bool,
    transform: Callable[[Tensor], Tensor],
) -> _Scores:
    check_names(stats)
    numbers, sequences = number_sequences(labels, cu_seqlens)
    targets, scored, numbers = score(labels, numbers, ignore_index=ignore_index, shift=shift)
    vocabulary = logits.shape[-1]
    outside = scored & ((targets < 0) | (targets >= vocabulary))
    if outside.any():
        position = outside.nonzero()[0].tolist()
        raise IndexError(
            f"label {int(targets[tuple(position)])} at scored position {position} is outside [0, {vocabulary}) and is "
            "not ignore_index"
        )
    # Indexing with the mask, and not multiplying by it, keeps a NaN in a row that is not scored out of every gradient.
    z = transform(logits.reshape(*labels.shape, vocabulary)[..., : targets.shape[-1], :][scored])
    rows = Rows(z, z.log_softmax(-1), targets[scored].long())
    logps = rows.logp.gather(-1, rows.targets[:, None])[:, 0]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(scored.shape).masked_scatter(scored, values)

    statistics = tuple(spread(STATISTICS[name](rows)) for name in stats)
    return _Scores(spread(logps), statistics, scored, numbers, sequences)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
    inplace_backward: bool = False,
    process_group: Any = None,
) -> Any:
    """Compute `fastpref.token_logprobs` in plain PyTorch. `inplace_backward` has no effect here.

    Raises:
        ValueError: an unknown statistic.
        IndexError: a scored label outside [0, V).
    """
    logits, labels = gather(logits, logits.dim() - 1, process_group), whole(labels)
    transform = partial(transform_logits, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    found = _score(logits, labels, None, stats, ignore_index, shift, transform)
    return result_type(tuple(stats))(found.logps, *found.statistics) if stats else found.logps


def sequence_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: str = "sum",
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    shared_lengths: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
    inplace_backward: bool = False,
    process_group: Any = None,
) -> Any:
    """Compute `fastpref.sequence_logprobs` in plain PyTorch. `inplace_backward` has no effect here.

    Raises:
        ValueError: an unknown statistic or reduction; boundaries that do not rise from 0 to the number of tokens;
            LD-DPO of sequences that are not [chosen; rejected].
        IndexError: a scored label outside [0, V).
    """
    logits, labels = gather(logits, logits.dim() - 1, process_group), whole(labels)
    transform = partial(transform_logits, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    logps, statistics, scored, numbers, sequences = _score(
        logits, labels, cu_seqlens, stats, ignore_index, shift, transform
    )
    if ld_alpha is not None:
        weights = ld_weights(scored, numbers, sequences, ld_alpha, shared_lengths).to(logps.dtype)
        # A weight of 0 leaves its token out, even where the log-prob is −inf.
        logps = weights * logps.masked_fill(weights == 0, 0.0)
    total = sum_sequences(logps, numbers, sequences)
    if reduction == "mean":
        total = total / count_scored(scored, numbers, sequences).clamp(min=1)
    elif reduction != "sum":
        raise ValueError(f"reduction must be one of 'sum', 'mean'; got {reduction!r}")
    return result_type(tuple(stats))(total, *statistics) if stats else total
