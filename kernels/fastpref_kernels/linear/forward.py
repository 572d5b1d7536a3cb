"""The sums of the scored rows over the vocabulary, and `fastpref::linear_logprobs`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref_kernels import eager
from fastpref_kernels.linear.backend import COLUMNS, Backend, column_chunks, row_chunks, widened
from fastpref_kernels.linear.finalize import results
from fastpref_kernels.linear.rows import INVALID, UNSCORED, Rows
from fastpref_kernels.linear.tile import transformed
from fastpref_kernels.precision import own_precision

Transform = tuple[float, float, float | None]
"""logit_scale, temperature and softcap."""


def check(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool, vocabulary: int) -> None:
    """Raise unless boundaries rise from 0 to the number of tokens, and scored labels are in the vocabulary."""
    if cu_seqlens is not None:
        eager.check_boundaries(cu_seqlens, labels.shape[1])
    eager.check_labels(*eager.scored_targets(labels, cu_seqlens, ignore_index, shift), vocabulary)


def tile_columns(backend: Backend, filter_eps: float | None) -> int:
    """Return the columns of a tile: `COLUMNS` where a gradient is filtered by them, else what the device wants."""
    return backend.tile().columns if filter_eps is None else COLUMNS


def _label_logits(
    backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, transform: Transform
) -> Tensor:
    """Return z of the labels (R,) by a float32 dot product; where they are another shard's, of the nearest column."""
    if not len(weight):
        return x.new_full(labels.shape, -torch.inf, dtype=widened(x.dtype))
    labels = labels.clamp(0, len(weight) - 1)
    return transformed(backend.dot(x, weight, labels), None if bias is None else bias[labels], *transform)[0]


def _product_fold(
    backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: Transform, stats: int,
    state: Tensor, store: Tensor | None, columns: int,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Multiply and fold every column of some rows. Return anchors and masses (pieces, R), and a piece's columns.

    Args:
        backend: whose products and row passes.
        x: (R, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (R,), as in `tile.fold`.
        transform: of the logits.
        stats: bits of the statistics asked for.
        state: (8, R) float64, in and out, over all columns.
        store: (R, V) or None, out: what each piece stores is relative to its own anchor.
        columns: columns of a piece, unless the backend's own kernel decides.
    """
    if backend.product_fold is not None:
        done = backend.product_fold(x, weight, bias, targets, *transform, stats, state, store)
        if done is not None:
            return done
    vocabulary = weight.shape[0]
    chunks = column_chunks(vocabulary, columns)
    anchors, masses = state.new_empty((2, len(chunks), len(targets)))
    if not chunks:
        return anchors, masses, columns
    tile = backend.scratch("logits", (len(targets), min(columns, vocabulary)), widened(x.dtype), x.device)
    nothing = [None] * len(chunks)
    # Taken apart at once: on a small batch, what the host does between two launches is what takes the time.
    for (begin, end), w, b, *of_tile, to in zip(
        chunks, weight.split(columns), nothing if bias is None else bias.split(columns), anchors.unbind(),
        masses.unbind(), nothing if store is None else store.split(columns, 1), strict=True,
    ):  # fmt: skip
        z = tile if end - begin == tile.shape[1] else tile[:, : end - begin]
        backend.product(z, x, w.t(), False)
        backend.fold(z, b, targets, begin, *transform, stats, state, *of_tile, to)
    return anchors, masses, columns


def _masses(anchors: Tensor, masses: Tensor, columns: int, anchor: Tensor) -> Tensor:
    """Return Σ exp(z - anchor) of every `COLUMNS` columns of every row (chunks, R), its label's aside, from pieces."""
    pieces, count = masses * (anchors - anchor).exp(), max(COLUMNS // columns, 1)
    return torch.nn.functional.pad(pieces, (0, 0, 0, -len(pieces) % count)).unflatten(0, (-1, count)).sum(1)


def _fold_rows(
    backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, store: Tensor | None,
    transform: Transform, stats: int, chunk_rows: int | None, filter_eps: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the sums of rows over all columns, as the state (8, R) of `tile.fold`, and each tile's mass (chunks, R).

    What is kept of a row, and the masses, which are told where `filter_eps` will ask for them, are at the row's anchor.
    """
    flat, chunks = hidden.reshape(-1, hidden.shape[-1]), -(-weight.shape[0] // COLUMNS)
    state = torch.zeros((8, len(rows)), dtype=torch.float64, device=hidden.device)
    state[5:7].fill_(-torch.inf)
    shares = hidden.new_zeros((0 if filter_eps is None else chunks, len(rows)), dtype=torch.float32)
    columns = tile_columns(backend, filter_eps)
    for part in row_chunks(len(rows), chunk_rows or backend.tile().rows):
        y, x = rows.label[part], backend.gather(flat, rows.source[part], None)
        of_part = state[:, part].contiguous()
        of_part[0] = _label_logits(backend, x, weight, bias, y, transform)
        kept = None if store is None else store[part]
        anchors, masses, piece = _product_fold(
            backend, x, weight, bias, y, transform, stats, of_part, kept, columns
        )  # fmt: skip
        state[:, part] = of_part
        anchor = of_part[0].masked_fill(of_part[0] == -torch.inf, 0.0)  # nothing but -inf: any anchor does
        if kept is not None:
            # Each piece is at the anchor that its row had then.
            backend.rescale(kept, (anchors - anchor).exp(), piece)
        if filter_eps is not None:
            shares[:, part] = _masses(anchors, masses, piece, anchor).float()
    return state, shares


@own_precision
def logprobs(
    backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    store: Tensor | None, ignore_index: int, shift: bool, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, count: int | None, chunk_rows: int | None, filter_eps: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::linear_logprobs`."""
    transform = (logit_scale, temperature, softcap)
    if count is None:
        check(labels, cu_seqlens, ignore_index, shift, weight.shape[0])
    rows = Rows.of(labels, cu_seqlens, ignore_index, shift, count)
    state, shares = _fold_rows(
        backend, hidden, weight, bias, rows, store, transform, stats, chunk_rows, filter_eps
    )  # fmt: skip
    if count is not None:
        state[1:].masked_fill_(rows.invalid(cu_seqlens, labels.shape[1], weight.shape[0]), torch.nan)
    state[0].masked_fill_(state[0] == -torch.inf, 0.0)
    return results(
        backend, hidden.dtype, rows, state, state, shares, weight.shape[0], store, transform, stats, filter_eps
    )


def shard_labels(
    labels: Tensor, cu_seqlens: Tensor | None, shard: Tensor, columns: int, ignore_index: int, shift: bool, checks: bool
) -> Tensor:
    """`fastpref::shard_labels`."""
    first, vocabulary = shard.unbind()
    if checks:
        check(labels, cu_seqlens, ignore_index, shift, int(vocabulary))
    # Past all tiles, and not only past the columns, so that no tile's padding is taken for the label.
    after = -(-columns // COLUMNS) * COLUMNS
    here = (labels.long() - first).clamp(min=-1)
    here = here.masked_fill(here >= columns, after).masked_fill((labels < 0) | (labels >= vocabulary), INVALID)
    return here.masked_fill(labels == ignore_index, UNSCORED)


@own_precision
def fold_shard(
    backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    store: Tensor | None, ignore_index: int, shift: bool, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, count: int | None, chunk_rows: int | None, filter_eps: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fastpref::linear_fold`."""
    rows = Rows.of(labels, cu_seqlens, ignore_index, shift, count)
    state, shares = _fold_rows(
        backend, hidden, weight, bias, rows, store, (logit_scale, temperature, softcap), stats, chunk_rows, filter_eps
    )  # fmt: skip
    if count is not None:
        state[1:].masked_fill_(rows.invalid(cu_seqlens, labels.shape[1], None), torch.nan)
    return rows.spread(state, torch.float64), rows.spread(shares, torch.float32)
