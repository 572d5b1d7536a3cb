"""The sums of the scored rows over the vocabulary: `linear_logprobs`, `linear_fold` and `shard_labels`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.contract import (
    COLUMNS,
    INVALID,
    UNSCORED,
    RowSums,
    Scoring,
    Transform,
    check_boundaries,
    check_labels,
    scored_targets,
    widened,
)
from fastpref_kernels.linear.backend import Backend, column_chunks, row_chunks
from fastpref_kernels.linear.finalize import Wanted, results
from fastpref_kernels.linear.rows import Rows
from fastpref_kernels.precision import own_precision


class Head(NamedTuple):
    """The LM head that rows of hidden states are multiplied by, and how its logits are transformed and summed.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        scoring: the transform of the logits, and which labels are scored.
        stats: the bits of the statistics that are asked for.
    """

    weight: Tensor
    bias: Tensor | None
    scoring: Scoring
    stats: int


class Folded(NamedTuple):
    """The pieces of columns that were folded one after the other, for some rows.

    Attributes:
        anchors: (pieces, R) float64, the anchor of each row at the time.
        masses: (pieces, R) float64, Σ_{j≠label} exp(z_j − anchor).
        columns: the columns of a piece.
    """

    anchors: Tensor
    masses: Tensor
    columns: int


def check(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool, vocabulary: int) -> None:
    """Raise unless boundaries rise from 0 to the number of tokens, and scored labels are in the vocabulary."""
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens, labels.shape[1])
    check_labels(*scored_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift), vocabulary)


def tile_columns(backend: Backend, filter_eps: float | None) -> int:
    """Return the columns of a tile: `COLUMNS` if a gradient is filtered in such blocks, else the device's number."""
    return backend.tile().columns if filter_eps is None else COLUMNS


def label_logits(backend: Backend, x: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Return z of the labels (R,) by a float32 dot product; for a label of another shard, the nearest column's z."""
    weight, bias = head.weight, head.bias
    if not len(weight):
        return x.new_full(labels.shape, -torch.inf, dtype=widened(x.dtype))
    labels = labels.clamp(0, len(weight) - 1)
    raw = backend.dot(x, weight, labels)
    return Transform.of(*head.scoring.transform).z(raw, None if bias is None else bias[labels])[0]


def product_fold(
    backend: Backend, x: Tensor, head: Head, targets: Tensor, state: Tensor, store: Tensor | None, columns: int
) -> Folded:
    """Multiply and fold every column of some rows.

    Args:
        backend: whose products and row passes to use.
        x: (R, H).
        head: the head.
        targets: (R,) labels, columns of the head or outside of them.
        state: (9, R) float64, in and out, over all columns: `contract.RowSums`.
        store: (R, V) or None, out: each piece's exponentials, relative to the piece's own anchor.
        columns: the columns of a piece, unless the backend's own kernel decides.
    """
    weight, bias, scoring, stats = head
    if backend.product_fold is not None:
        done = backend.product_fold(x, weight, bias, targets, *scoring.transform, stats, state, store)
        if done is not None:
            return Folded(*done)
    vocabulary = weight.shape[0]
    chunks = column_chunks(vocabulary, columns)
    anchors, masses = state.new_empty((2, len(chunks), len(targets)))
    if not chunks:
        return Folded(anchors, masses, columns)
    tile = backend.scratch("logits", (len(targets), min(columns, vocabulary)), widened(x.dtype), x.device)
    nothing = [None] * len(chunks)
    # Split the tensors in advance: on a small batch, the host's work between two launches takes most of the time.
    weights = weight.split(columns)
    biases = nothing if bias is None else bias.split(columns)
    stores = nothing if store is None else store.split(columns, 1)
    pieces = zip(chunks, weights, biases, anchors.unbind(), masses.unbind(), stores, strict=True)
    for (begin, end), w, b, anchor, mass, kept in pieces:
        z = tile if end - begin == tile.shape[1] else tile[:, : end - begin]
        backend.product(z, x, w.t(), False)
        backend.fold(z, b, targets, begin, *scoring.transform, stats, state, anchor, mass, kept)
    return Folded(anchors, masses, columns)


def _masses(folded: Folded, anchor: Tensor) -> Tensor:
    """Return Σ_{j≠label} exp(z − anchor) over each `COLUMNS` columns of each row, (chunks, R), from pieces."""
    pieces, count = folded.masses * (folded.anchors - anchor).exp(), max(COLUMNS // folded.columns, 1)
    return torch.nn.functional.pad(pieces, (0, 0, 0, -len(pieces) % count)).unflatten(0, (-1, count)).sum(1)


def _fold_rows(
    backend: Backend,
    hidden: Tensor,
    head: Head,
    rows: Rows,
    store: Tensor | None,
    chunk_rows: int | None,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the sums of rows over all columns (9, R), and with `filter_eps` each tile's mass (chunks, R).

    The kept exponentials of a row, and the masses, are relative to the row's anchor.
    """
    flat, chunks = hidden.reshape(-1, hidden.shape[-1]), -(-head.weight.shape[0] // COLUMNS)
    state = RowSums.start((len(rows),), hidden.device)
    shares = hidden.new_zeros((0 if filter_eps is None else chunks, len(rows)), dtype=torch.float32)
    columns = tile_columns(backend, filter_eps)
    for part in row_chunks(len(rows), chunk_rows or backend.tile().rows):
        y, x = rows.label[part], backend.gather(flat, rows.source[part], None)
        of_part = state[:, part].contiguous()
        sums = RowSums.of(of_part)
        sums.anchor.copy_(label_logits(backend, x, head, y))
        kept = None if store is None else store[part]
        folded = product_fold(backend, x, head, y, of_part, kept, columns)
        state[:, part] = of_part
        # A row whose logits are all -inf has no anchor, and any anchor works.
        anchor = sums.anchor.masked_fill(sums.anchor == -torch.inf, 0.0)
        if kept is not None:
            # The exponentials of each piece are relative to the anchor that its row had then.
            backend.rescale(kept, (folded.anchors - anchor).exp(), folded.columns)
        if filter_eps is not None:
            shares[:, part] = _masses(folded, anchor).float()
    return state, shares


@own_precision
def linear_logprobs(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    store: Tensor | None,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    stats: int,
    count: int | None,
    chunk_rows: int | None,
    filter_eps: float | None,
) -> tuple[Tensor, ...]:
    """Run `fastpref::linear_logprobs`."""
    head = Head(weight, bias, Scoring(ignore_index, shift, logit_scale, temperature, softcap), stats)
    if count is None:
        check(labels, cu_seqlens, ignore_index, shift, weight.shape[0])
    rows = Rows.of(labels, cu_seqlens, ignore_index, shift, count)
    state, shares = _fold_rows(backend, hidden, head, rows, store, chunk_rows, filter_eps)
    if count is not None:
        state[1:].masked_fill_(rows.invalid(cu_seqlens, labels.shape[1], weight.shape[0]), torch.nan)
    state[0].masked_fill_(state[0] == -torch.inf, 0.0)
    sums = RowSums.of(state)
    wanted = Wanted(head.scoring, stats, widened(hidden.dtype), filter_eps)
    return results(backend, rows, sums, sums, shares, weight.shape[0], store, wanted)


def shard_labels(
    labels: Tensor, cu_seqlens: Tensor | None, shard: Tensor, columns: int, ignore_index: int, shift: bool, checks: bool
) -> Tensor:
    """Run `fastpref::shard_labels`."""
    first, vocabulary = shard.unbind()
    if checks:
        check(labels, cu_seqlens, ignore_index, shift, int(vocabulary))
    # The label is past all tiles, not only past the columns, so that no tile's padding is taken for it.
    after = -(-columns // COLUMNS) * COLUMNS
    here = (labels.long() - first).clamp(min=-1)
    here = here.masked_fill(here >= columns, after).masked_fill((labels < 0) | (labels >= vocabulary), INVALID)
    return here.masked_fill(labels == ignore_index, UNSCORED)


@own_precision
def linear_fold(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    store: Tensor | None,
    ignore_index: int,
    shift: bool,
    logit_scale: float,
    temperature: float,
    softcap: float | None,
    stats: int,
    count: int | None,
    chunk_rows: int | None,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor]:
    """Run `fastpref::linear_fold`."""
    head = Head(weight, bias, Scoring(ignore_index, shift, logit_scale, temperature, softcap), stats)
    rows = Rows.of(labels, cu_seqlens, ignore_index, shift, count)
    state, shares = _fold_rows(backend, hidden, head, rows, store, chunk_rows, filter_eps)
    if count is not None:
        state[1:].masked_fill_(rows.invalid(cu_seqlens, labels.shape[1], None), torch.nan)
    return rows.spread(state, torch.float64), rows.spread(shares, torch.float32)
