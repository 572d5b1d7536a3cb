"""Log-probs from hidden states and the head's weight: the definition in plain PyTorch.

The logits are a float32 (float64 for float64) product of widened operands, never rounded before the log-sum; what
follows is `fastpref.reference`'s own log-probs of them. It materialises those logits:
`fastpref.linear_token_logprobs` computes the same numbers without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpref._checks import (
    REDUCTIONS,
    autocasts,
    check_choice,
    check_ld,
    check_linear,
    check_mode,
    check_scored_rows,
    check_scoring,
    check_transform,
)
from fastpref._results import LINEAR_STATISTICS, check_stats, result_type
from fastpref.reference.distributed import whole_head
from fastpref.reference.logprobs import (
    count_sequences,
    scored_targets,
    sequence_lengths,
    sequence_logprobs,
    token_logprobs,
)


def autocast_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in autocast's dtype where it is on, which leaves float64 alone; as they are where it is not."""
    if not autocasts(hidden.device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_room(scored_rows: object, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool) -> None:
    """Raise `ValueError` where more labels are scored than `scored_rows` says, if it is given. Reads values."""
    sequences = count_sequences(labels, cu_seqlens)
    total, of_sequences = check_scored_rows(scored_rows, sequences)
    if total is None:
        return
    rows = labels[None] if labels.dim() == 1 else labels
    _, scored = scored_targets(rows, cu_seqlens, ignore_index=ignore_index, shift=shift)
    found = sequence_lengths(scored, cu_seqlens, sequences).tolist()
    if sum(found) > total or any(have > room for have, room in zip(found, of_sequences or (), strict=False)):
        raise ValueError(
            f"scored_rows must be no fewer than the labels that are scored, {sum(found)}, by sequence {found}; "
            f"got {scored_rows}"
        )


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor) -> Tensor:
    """hidden @ weight.T + bias where scored, 0 elsewhere.

    Args:
        hidden: (..., T, H).
        weight: (V, H).
        bias: None, or (V,).
        scored: (..., T) bool.

    Returns:
        (..., T, V), float32 (float64 for float64).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # Rows that are not scored are left out of the product, and not multiplied by 0: a NaN in one has no effect.
    z = hidden[scored].to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    return z.new_zeros(*scored.shape, weight.shape[0]).masked_scatter(scored[..., None], z)


def _logprobs(
    function: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, stats: tuple[str, ...],
    cu_seqlens: Tensor | None, *, ignore_index: int, shift: bool, **options: Any,
) -> Any:  # fmt: skip
    """`function`, one of the two of `fastpref.reference.logprobs`, on the logits, with "dropped_mass" added."""
    names = check_stats(stats, LINEAR_STATISTICS)
    _, kept = scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift)
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[..., : kept.shape[-1]] = kept
    hidden, weight, bias = autocast_operands(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear_logits(hidden.reshape(*labels.shape, hidden.shape[-1]), weight, bias, scored)
        wanted = tuple(name for name in names if name != "dropped_mass")
        result = function(logits, labels, ignore_index=ignore_index, shift=shift, stats=wanted, **options)
    if not names:
        return result
    found = result._asdict() if wanted else {"logprobs": result}
    found["dropped_mass"] = logits.new_zeros(kept.shape)  # the definition leaves nothing out
    return result_type(names)(*(found[name] for name in ("logprobs", *names)))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    mode: str = "auto",
    chunk_rows: int | None = None,
    filter_eps: float | None = None,
    scored_rows: int | Sequence[int] | None = None,
    process_group: Any = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
) -> Any:
    """`fastpref.linear_token_logprobs` in plain PyTorch.

    `mode`, `chunk_rows`, `filter_eps` and `scored_rows` are checked and change nothing here: every gradient is exact,
    as elsewhere an entropy's is with any `filter_eps`, and the statistic "dropped_mass" is 0.
    """
    hidden, weight, bias, labels = whole_head(hidden, weight, bias, labels, process_group)
    check_linear(hidden, weight, labels, bias, None)
    check_mode(mode, chunk_rows, filter_eps)
    ignore_index = check_scoring(ignore_index, shift)
    check_room(scored_rows, labels, None, ignore_index, shift)
    temperature, logit_scale, softcap = check_transform(temperature, logit_scale, softcap)
    return _logprobs(
        token_logprobs, hidden, weight, labels, bias, stats, None, ignore_index=ignore_index, shift=shift,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip


def linear_sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "sum",
    cu_seqlens: Tensor | None = None,
    ld_alpha: float | None = None,
    shared_lengths: Tensor | None = None,
    mode: str = "auto",
    chunk_rows: int | None = None,
    filter_eps: float | None = None,
    scored_rows: int | Sequence[int] | None = None,
    process_group: Any = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
) -> Any:
    """`fastpref.linear_sequence_logprobs` in plain PyTorch.

    `mode`, `chunk_rows`, `filter_eps` and `scored_rows` are checked and change nothing here.
    """
    check_choice("reduction", reduction, REDUCTIONS[1:])
    ld_alpha = check_ld(ld_alpha, shared_lengths)
    hidden, weight, bias, labels = whole_head(hidden, weight, bias, labels, process_group)
    check_linear(hidden, weight, labels, bias, cu_seqlens)
    check_mode(mode, chunk_rows, filter_eps)
    ignore_index = check_scoring(ignore_index, shift)
    check_room(scored_rows, labels, cu_seqlens, ignore_index, shift)
    temperature, logit_scale, softcap = check_transform(temperature, logit_scale, softcap)
    function = partial(
        sequence_logprobs, reduction=reduction, cu_seqlens=cu_seqlens, ld_alpha=ld_alpha, shared_lengths=shared_lengths
    )
    return _logprobs(
        function, hidden, weight, labels, bias, stats, cu_seqlens, ignore_index=ignore_index, shift=shift,
        temperature=temperature, logit_scale=logit_scale, softcap=softcap,
    )  # fmt: skip
