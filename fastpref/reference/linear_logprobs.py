"""Log-probs from hidden states and the head's weight: the definition in plain PyTorch.

The logits are a float32 (float64 for float64) product of widened operands, never rounded before the log-sum. The
functions of `fastpref.reference` then compute log-probs from these logits. `fastpref.linear_token_logprobs` computes
the same numbers without whole logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpref.reference.gather import gather, whole
from fastpref.reference.logprobs import STATISTICS, check_names, sequence_logprobs, token_logprobs
from fastpref.reference.results import result_type
from fastpref.reference.sequences import number_sequences, score


def autocast_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands in autocast's dtype if it is on; it does not change float64."""
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scored: Tensor) -> Tensor:
    """Return hidden @ weight.T + bias where scored, and 0 elsewhere.

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


def _of_hidden(
    logprobs: Any,
    head: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor,
    cu_seqlens: Tensor | None,
    stats: tuple[str, ...],
    **labeling: Any,
) -> Any:
    """Apply `logprobs`, a function of logits and labels, to the logits of (hidden, weight, bias)."""
    check_names(stats, (*STATISTICS, "dropped_mass"))
    numbers, _ = number_sequences(labels, cu_seqlens)
    _, scored_positions, _ = score(labels, numbers, **labeling)
    scored = torch.zeros_like(labels, dtype=torch.bool)
    scored[..., : scored_positions.shape[-1]] = scored_positions
    hidden, weight, bias = autocast_operands(*head)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear_logits(hidden.reshape(*labels.shape, hidden.shape[-1]), weight, bias, scored)
        of_logits = tuple(name for name in stats if name != "dropped_mass")
        result = logprobs(logits, labels, stats=of_logits, **labeling)
    if not stats:
        return result
    found = result._asdict() if of_logits else {"logprobs": result}
    found["dropped_mass"] = logits.new_zeros(scored_positions.shape)  # the definition leaves nothing out
    return result_type(tuple(stats))(*(found[name] for name in ("logprobs", *stats)))


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
    """Compute `fastpref.linear_token_logprobs` in plain PyTorch.

    `mode`, `chunk_rows`, `filter_eps` and `scored_rows` have no effect here: every gradient is exact, and the
    statistic "dropped_mass" is 0.

    Raises:
        ValueError: an unknown statistic.
        IndexError: a scored label outside [0, V).
    """
    head = whole(hidden), gather(weight, 0, process_group), gather(bias, 0, process_group)
    logprobs = partial(token_logprobs, temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    return _of_hidden(logprobs, head, whole(labels), None, stats, ignore_index=ignore_index, shift=shift)


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
    """Compute `fastpref.linear_sequence_logprobs` in plain PyTorch.

    `mode`, `chunk_rows`, `filter_eps` and `scored_rows` have no effect here.

    Raises:
        ValueError: as `fastpref.reference.sequence_logprobs` does.
        IndexError: a scored label outside [0, V).
    """
    head = whole(hidden), gather(weight, 0, process_group), gather(bias, 0, process_group)
    logprobs = partial(
        sequence_logprobs,
        reduction=reduction,
        cu_seqlens=cu_seqlens,
        ld_alpha=ld_alpha,
        shared_lengths=shared_lengths,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    return _of_hidden(logprobs, head, whole(labels), cu_seqlens, stats, ignore_index=ignore_index, shift=shift)
