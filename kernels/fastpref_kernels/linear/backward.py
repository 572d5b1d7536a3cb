"""The gradients of log-probs from hidden states, and `fastpref::linear_logprobs_backward`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastpref_kernels.linear.backend import COLUMNS, Backend, column_chunks, row_chunks, widened
from fastpref_kernels.linear.finalize import kept_tiles
from fastpref_kernels.linear.forward import tile_columns
from fastpref_kernels.linear.rows import Rows
from fastpref_kernels.precision import full_float32, own_precision

# The anchor and 1/S of a row that is left over. All exp(z - anchor) are then 0, and so is the gradient. At an anchor of
# 0 they could be inf, because the logits of such a row are the bias.
_LEFT_OVER = (torch.inf, 1.0)


def _rows_of_tiles(mask: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of every tile where `mask` (chunks, R) is True, read at once: a device waits for every answer."""
    return mask.nonzero()[:, 1].split(mask.sum(1).tolist())


def _picked(values: Any, pick: Tensor | None) -> Any:
    """Return a choice of rows of something (..., R), if there is something."""
    return values if values is None or pick is None else values[..., pick].contiguous()


@own_precision
def accumulate_gradients(
    backend: Backend, grad: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, norm: Tensor, store: Tensor | None,
    shares: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None, fresh: bool,
    ignore_index: int, shift: bool, logit_scale: float, temperature: float, softcap: float | None,
    count: int | None, chunk_rows: int | None, filter_eps: float | None,
) -> None:  # fmt: skip
    """`fastpref::linear_logprobs_backward_`.

    A d_hidden of a narrower dtype is rounded once if it is fresh, and a d_weight of one if it is of one chunk's rows.
    """
    vocabulary, transform, dtype = weight.shape[0], (logit_scale, temperature, softcap), widened(hidden.dtype)
    rows = Rows.of(labels, cu_seqlens, ignore_index, shift, count)
    for total in (d_hidden, d_weight, d_bias):
        # The weight's is worth not writing twice: the first product of its columns overwrites it.
        if fresh and total is not None and (total is not d_weight or not len(rows) or filter_eps is not None):
            total.zero_()
    overwrite = fresh and filter_eps is None
    # The kept exponentials serve the log-probs alone: an entropy's gradient needs the log-probs of every entry too.
    kept = store if grad_entropy is None else None
    columns = tile_columns(backend, filter_eps)
    if backend.whole and kept is not None and filter_eps is None:
        columns = max(vocabulary, 1)
    # An entropy's gradient leaves nothing out.
    filter_eps = filter_eps if grad_entropy is None else None
    flat = hidden.reshape(-1, hidden.shape[-1])
    for part in row_chunks(len(rows), chunk_rows or backend.tile().rows):
        y, source = rows.label[part], rows.source[part]
        # What was kept is multiplied by the weight, and by scaled hidden states: those themselves are not read.
        x = backend.gather(flat, source, None) if kept is None or filter_eps is not None else None
        of_row, left_over = rows.take(norm, part), rows.left_over(part)
        for values, value in zip(of_row, _LEFT_OVER, strict=False):
            values.masked_fill_(left_over, value)
        g = None if grad is None else rows.take(grad, part).to(dtype)
        h = None if grad_entropy is None else rows.take(grad_entropy, part).to(dtype)
        picks = None
        if filter_eps is not None:
            keep = kept_tiles(rows.take(shares, part), y, filter_eps)
            if backend.filtered is not None and g is not None:
                made = None
                if d_hidden is not None:
                    made = backend.scratch("hidden", (len(y), hidden.shape[-1]), dtype, hidden.device).zero_()
                of_part = None if kept is None else kept[part]
                if backend.filtered(
                    x, weight, bias, y, keep, COLUMNS, of_part, of_row, g, transform, made, d_weight, d_bias, True,
                    backend.scratch,
                ):  # fmt: skip
                    if d_hidden is not None and made is not None:
                        backend.scatter(d_hidden.view(-1, d_hidden.shape[-1]), source, made, None)
                    continue
            picks = _rows_of_tiles(keep)
        row_scale = None
        right = x
        if kept is not None:
            assert g is not None
            row_scale = -g * of_row[1]
            right = None if d_weight is None else backend.gather(flat, source, row_scale)
        rows_gradient = None
        if d_hidden is not None:
            rows_gradient = backend.scratch("hidden", (len(y), hidden.shape[-1]), dtype, hidden.device)
            if picks is not None or not vocabulary:
                rows_gradient.zero_()
        for i, (begin, end) in enumerate(column_chunks(vocabulary, columns)):
            pick = None if picks is None or len(picks[i]) == len(y) else picks[i]
            if pick is not None and not len(pick):
                continue
            w, b = weight[begin:end], None if bias is None else bias[begin:end]
            if kept is not None:
                tile = kept[part, begin:end] if pick is None else kept[part, begin:end][pick]
            else:
                n = len(y) if pick is None else len(pick)
                assert x is not None
                z = backend.scratch("logits", (n, min(columns, vocabulary)), dtype, x.device)[:, : end - begin]
                backend.product(z, x if pick is None else x[pick], w.t(), False)
                narrow = backend.gradient_dtype(x.dtype)
                tile = z
                if narrow != dtype:
                    tile = backend.scratch("gradient", (n, min(columns, vocabulary)), narrow, x.device)
                    tile = tile[:, : end - begin]
                upstream = (_picked(of_row, pick), _picked(g, pick), _picked(h, pick))
                backend.fold_backward(z, b, _picked(y, pick), begin, *transform, *upstream, tile)
            if rows_gradient is not None:
                if pick is None:
                    backend.product(rows_gradient, tile, w, picks is not None or i > 0)
                else:
                    some = rows_gradient.new_empty(len(pick), rows_gradient.shape[1])
                    backend.product(some, tile, w, False)
                    rows_gradient.index_add_(0, pick, some)
            if d_weight is not None:
                assert right is not None
                of_rows = right if pick is None else right[pick]
                if d_weight.dtype == dtype or backend.rounds:
                    backend.product(d_weight[begin:end], tile.t(), of_rows, not (overwrite and part.start == 0))
                else:
                    sums = backend.scratch("weight", (end - begin, d_weight.shape[1]), dtype, hidden.device)
                    backend.product(sums, tile.t(), of_rows, False)
                    d_weight[begin:end] = sums
            if d_bias is not None:
                wide = tile.to(dtype)
                d_bias[begin:end] += wide.sum(0) if row_scale is None else _picked(row_scale, pick) @ wide
        if d_hidden is not None:
            assert rows_gradient is not None
            out = d_hidden.view(-1, d_hidden.shape[-1])
            backend.scatter(out, source, rows_gradient, row_scale)


def gradients(
    backend: Backend, grad: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, norm: Tensor, store: Tensor | None,
    shares: Tensor, needed: list[bool], hidden_dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype,
    *scoring: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastpref::linear_logprobs_backward`."""
    dtypes = (hidden_dtype, weight_dtype, bias_dtype)
    *_, count, chunk_rows, filter_eps = scoring
    wide = widened(hidden.dtype)
    # Rows of one chunk need no sums between chunks, and so no float32 weight gradient, if a product can round to it.
    rows = labels.numel() if count is None else min(count, labels.numel())
    in_one_chunk = rows <= (chunk_rows or backend.tile().rows) and filter_eps is None
    once = in_one_chunk and weight_dtype in (wide, hidden.dtype)
    # A row of hidden belongs to one chunk, always.
    kinds = (hidden_dtype, weight_dtype if once else wide, wide)
    totals: list[Tensor | None] = [
        backend.empty(tensor.shape, kind, tensor.device) if want and tensor is not None else None
        for tensor, want, kind in zip((hidden, weight, bias), needed, kinds, strict=True)
    ]
    given = (grad, grad_entropy, hidden, weight, bias, labels, cu_seqlens, norm, store, shares)
    # The parts of a sum that a library splits over programs would otherwise be rounded before they meet.
    with full_float32() if once and weight_dtype != wide else contextlib.nullcontext():
        accumulate_gradients(backend, *given, totals[0], totals[1], totals[2], True, *scoring)
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(0, dtype=dtype)
        if total is None
        else total
        if total.dtype == dtype
        else scaled_gradient(backend, total, None, dtype)
        for total, dtype in zip(totals, dtypes, strict=True)
    )
    return d_hidden, d_weight, d_bias


def scaled_gradient(backend: Backend, total: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`fastpref::scaled_gradient`."""
    out = backend.empty(total.shape, dtype, total.device)
    if upstream is None:
        return out.copy_(total)
    if dtype == total.dtype or total.device.type != "cpu":
        # A GPU rounds each product as it is made.
        return torch.mul(total, upstream, out=out)
    # A CPU would make the product whole first, in float32.
    for part, rounded in zip(total.split(COLUMNS), out.split(COLUMNS), strict=True):
        rounded.copy_(
            torch.mul(part, upstream, out=backend.scratch("weight", tuple(part.shape), total.dtype, out.device))
        )
    return out
