"""The gradients of log-probs from hidden states: for one call, and added up over several calls."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.contract import COLUMNS, Scoring, widened
from fastpref_kernels.linear.backend import Backend, column_chunks, row_chunks
from fastpref_kernels.linear.finalize import kept_tiles
from fastpref_kernels.linear.forward import Head, tile_columns
from fastpref_kernels.linear.rows import Rows
from fastpref_kernels.precision import full_float32, own_precision

# The anchor and 1/S of a row that is left over. At this anchor, all exp(z - anchor) are 0, and so is the gradient. At
# an anchor of 0, they could be inf, because the logits of such a row are the bias.
_LEFT_OVER = (torch.inf, 1.0)


def _rows_of_tiles(mask: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of every tile where `mask` (chunks, R) is True, in one read: each read waits for a device."""
    return mask.nonzero()[:, 1].split(mask.sum(1).tolist())


def _picked(values: Any, pick: Tensor | None) -> Any:
    """Return the picked rows of values (..., R); all of them without a pick, and None for None."""
    return values if values is None or pick is None else values[..., pick].contiguous()


def _picked_rows(matrix: Tensor, pick: Tensor | None) -> Tensor:
    """Return the picked rows of a matrix (R, N); all of them without a pick."""
    return matrix if pick is None else matrix[pick]


class _Totals(NamedTuple):
    """The gradients to add to, each None where it is not wanted: (B, T, H), (V, H) and (V,)."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class _Chunk(NamedTuple):
    """Rows whose gradients are computed together.

    Attributes:
        part: which rows they are.
        label: (R,).
        source: (R,), the index of each row's hidden states.
        x: (R, H), their hidden states; None if only kept exponentials are multiplied.
        norm: (3 or 4, R).
        grad: (R,), the gradient of their log-probs, or None.
        grad_entropy: (R,), the gradient of their entropies, or None.
        kept: (R, V), their kept exponentials, or None.
    """

    part: slice
    label: Tensor
    source: Tensor
    x: Tensor | None
    norm: Tensor
    grad: Tensor | None
    grad_entropy: Tensor | None
    kept: Tensor | None


class _Gradients:
    """The gradients of a head and its hidden states, added up a chunk of rows at a time.

    Args:
        backend: whose products and row passes to use.
        hidden: (B, T, H).
        head: the weight, the bias and the transform.
        totals: the gradients to add to.
        columns: the columns of a tile.
        overwrite: whether the first chunk overwrites the weight's gradient.
    """

    def __init__(
        self, backend: Backend, hidden: Tensor, head: Head, totals: _Totals, columns: int, overwrite: bool
    ) -> None:
        self.backend, self.head, self.totals = backend, head, totals
        self.columns, self.overwrite = columns, overwrite
        self.flat, self.dtype = hidden.reshape(-1, hidden.shape[-1]), widened(hidden.dtype)

    def add(self, chunk: _Chunk, picks: tuple[Tensor, ...] | None) -> None:
        """Add the gradients of a chunk; with `picks`, add only the rows that are picked for each tile."""
        backend, totals, weight = self.backend, self.totals, self.head.weight
        row_scale, right = None, chunk.x
        if chunk.kept is not None:
            assert chunk.grad is not None
            row_scale = -chunk.grad * chunk.norm[1]
            right = None if totals.weight is None else backend.gather(self.flat, chunk.source, row_scale)
        rows_gradient = None
        if totals.hidden is not None:
            rows_gradient = self._rows_gradient(chunk)
            if picks is not None or not len(weight):
                rows_gradient.zero_()
        for i, (begin, end) in enumerate(column_chunks(len(weight), self.columns)):
            pick = None if picks is None or len(picks[i]) == len(chunk.label) else picks[i]
            if pick is not None and not len(pick):
                continue
            tile = self._tile(chunk, begin, end, pick)
            if rows_gradient is not None:
                w, add = weight[begin:end], picks is not None or i > 0
                self._add_hidden(rows_gradient, tile, w, pick, add)
            if totals.weight is not None:
                assert right is not None
                add = not (self.overwrite and chunk.part.start == 0)
                self._add_weight(totals.weight[begin:end], tile, _picked_rows(right, pick), add)
            if totals.bias is not None:
                wide = tile.to(self.dtype)
                totals.bias[begin:end] += wide.sum(0) if row_scale is None else _picked(row_scale, pick) @ wide
        if rows_gradient is not None:
            self.scatter(chunk, rows_gradient, row_scale)

    def add_filtered(self, chunk: _Chunk, keep: Tensor) -> bool:
        """Add the gradients of the tiles that `keep` (chunks, R) keeps, if the backend has a kernel for it."""
        if self.backend.filtered is None or chunk.grad is None:
            return False
        rows_gradient = None if self.totals.hidden is None else self._rows_gradient(chunk).zero_()
        weight, bias, scoring, _ = self.head
        done = self.backend.filtered(
            chunk.x,
            weight,
            bias,
            chunk.label,
            keep,
            COLUMNS,
            chunk.kept,
            chunk.norm,
            chunk.grad,
            scoring.transform,
            rows_gradient,
            self.totals.weight,
            self.totals.bias,
            True,
            self.backend.scratch,
        )
        if done and rows_gradient is not None:
            self.scatter(chunk, rows_gradient, None)
        return done

    def scatter(self, chunk: _Chunk, rows_gradient: Tensor, row_scale: Tensor | None) -> None:
        """Add gradients of rows, times `row_scale` if it is given, to the positions of the rows."""
        assert self.totals.hidden is not None
        out = self.totals.hidden.view(-1, self.totals.hidden.shape[-1])
        self.backend.scatter(out, chunk.source, rows_gradient, row_scale)

    def _rows_gradient(self, chunk: _Chunk) -> Tensor:
        shape = (len(chunk.label), self.flat.shape[1])
        return self.backend.scratch("hidden", shape, self.dtype, self.flat.device)

    def _tile(self, chunk: _Chunk, begin: int, end: int, pick: Tensor | None) -> Tensor:
        """Return the gradient of a tile's logits, or the tile's kept exponentials."""
        backend, weight, bias = self.backend, self.head.weight, self.head.bias
        if chunk.kept is not None:
            return _picked_rows(chunk.kept[:, begin:end], pick)
        assert chunk.x is not None
        shape = (len(chunk.label) if pick is None else len(pick), min(self.columns, len(weight)))
        z = backend.scratch("logits", shape, self.dtype, chunk.x.device)[:, : end - begin]
        backend.product(z, _picked_rows(chunk.x, pick), weight[begin:end].t(), False)
        narrow = backend.gradient_dtype(chunk.x.dtype)
        tile = z
        if narrow != self.dtype:
            tile = backend.scratch("gradient", shape, narrow, chunk.x.device)[:, : end - begin]
        upstream = (_picked(chunk.norm, pick), _picked(chunk.grad, pick), _picked(chunk.grad_entropy, pick))
        b, transform = None if bias is None else bias[begin:end], self.head.scoring.transform
        backend.fold_backward(z, b, _picked(chunk.label, pick), begin, *transform, *upstream, tile)
        return tile

    def _add_hidden(self, out: Tensor, tile: Tensor, weight: Tensor, pick: Tensor | None, add: bool) -> None:
        if pick is None:
            self.backend.product(out, tile, weight, add)
            return
        some = out.new_empty(len(pick), out.shape[1])
        self.backend.product(some, tile, weight, False)
        out.index_add_(0, pick, some)

    def _add_weight(self, out: Tensor, tile: Tensor, right: Tensor, add: bool) -> None:
        if out.dtype == self.dtype or self.backend.rounds:
            self.backend.product(out, tile.t(), right, add)
            return
        sums = self.backend.scratch("weight", tuple(out.shape), self.dtype, out.device)
        self.backend.product(sums, tile.t(), right, False)
        out.copy_(sums)


@own_precision
def linear_logprobs_backward_(
    backend: Backend,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    norm: Tensor,
    store: Tensor | None,
    shares: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    fresh: bool,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    count: int | None,
    chunk_rows: int | None,
    filter_eps: float | None,
) -> None:
    """Run `fastpref::linear_logprobs_backward_`.

    A narrower d_hidden is rounded only once if it is fresh. A narrower d_weight is rounded only once if all rows are
    one chunk.
    """
    head = Head(weight, bias, Scoring(ignore_index, shift, logit_scale, temperature, softcap), 0)
    rows = Rows.of(labels, cu_seqlens, ignore_index, shift, count)
    for total in (d_hidden, d_weight, d_bias):
        # The weight's gradient is not zeroed, to save a write: the first product of its columns overwrites it.
        if fresh and total is not None and (total is not d_weight or not len(rows) or filter_eps is not None):
            total.zero_()
    # The kept exponentials serve the log-probs alone: an entropy's gradient needs the log-probs of every entry too.
    kept = store if grad_entropy is None else None
    columns = tile_columns(backend, filter_eps)
    if backend.whole and kept is not None and filter_eps is None:
        columns = max(weight.shape[0], 1)
    totals = _Totals(d_hidden, d_weight, d_bias)
    gradients = _Gradients(backend, hidden, head, totals, columns, fresh and filter_eps is None)
    # The gradient of an entropy leaves no tile out.
    filter_eps = filter_eps if grad_entropy is None else None
    for part in row_chunks(len(rows), chunk_rows or backend.tile().rows):
        source = rows.source[part]
        # Kept exponentials are multiplied by the weight and by scaled hidden states, so unscaled hidden states
        # are not read.
        x = backend.gather(gradients.flat, source, None) if kept is None or filter_eps is not None else None
        of_row, left_over = rows.take(norm, part), rows.left_over(part)
        for values, value in zip(of_row, _LEFT_OVER, strict=False):
            values.masked_fill_(left_over, value)
        g, h = (None if given is None else rows.take(given, part).to(gradients.dtype) for given in (grad, grad_entropy))
        chunk = _Chunk(part, rows.label[part], source, x, of_row, g, h, None if kept is None else kept[part])
        if filter_eps is None:
            gradients.add(chunk, None)
            continue
        keep = kept_tiles(rows.take(shares, part), chunk.label, filter_eps)
        if not gradients.add_filtered(chunk, keep):
            gradients.add(chunk, _rows_of_tiles(keep))


def linear_logprobs_backward(
    backend: Backend,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    norm: Tensor,
    store: Tensor | None,
    shares: Tensor,
    needed: list[bool],
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `fastpref::linear_logprobs_backward`."""
    dtypes = (hidden_dtype, weight_dtype, bias_dtype)
    *_, count, chunk_rows, filter_eps = options
    wide = widened(hidden.dtype)
    # Rows of one chunk need no sums between chunks, and so no float32 weight gradient, if a product can round to it.
    rows = labels.numel() if count is None else min(count, labels.numel())
    in_one_chunk = rows <= (chunk_rows or backend.tile().rows) and filter_eps is None
    once = in_one_chunk and weight_dtype in (wide, hidden.dtype)
    # A row of hidden always belongs to one chunk only.
    kinds = (hidden_dtype, weight_dtype if once else wide, wide)
    totals: list[Tensor | None] = [
        backend.empty(tensor.shape, kind, tensor.device) if want and tensor is not None else None
        for tensor, want, kind in zip((hidden, weight, bias), needed, kinds, strict=True)
    ]
    given = (grad, grad_entropy, hidden, weight, bias, labels, cu_seqlens, norm, store, shares)
    # Otherwise, a library that splits a sum over programs would round the parts before it adds them.
    with full_float32() if once and weight_dtype != wide else contextlib.nullcontext():
        linear_logprobs_backward_(backend, *given, totals[0], totals[1], totals[2], True, *options)
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
    """Run `fastpref::scaled_gradient`."""
    out = backend.empty(total.shape, dtype, total.device)
    if upstream is None:
        return out.copy_(total)
    if dtype == total.dtype or total.device.type != "cpu":
        # A GPU rounds each product as it is made.
        return torch.mul(total, upstream, out=out)
    # A CPU would first compute the whole product in float32.
    for part, rounded in zip(total.split(COLUMNS), out.split(COLUMNS), strict=True):
        rounded.copy_(
            torch.mul(part, upstream, out=backend.scratch("weight", tuple(part.shape), total.dtype, out.device))
        )
    return out
