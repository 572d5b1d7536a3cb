"""The parts of log-probs from hidden states that each device implements: products, row passes and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOSS_BYTES = 1 << 30  # of exponentials a loss keeps at a time, on a device with memory of its own


class Tile(NamedTuple):
    """The size of the largest product of hidden states and the head that is computed at a time.

    Attributes:
        rows: rows of hidden; the default of `chunk_rows`.
        columns: columns of the vocabulary; they divide `contract.COLUMNS` or are a multiple of it.
    """

    rows: int
    columns: int


class Backend(NamedTuple):
    """The functions and the settings that a device provides.

    Attributes:
        product: (out, a, b, add): compute out (M, N) = a (M, K) @ b (K, N), or += it. The sums are float32 (float64
            for float64 operands), and so is `out`, unless `rounds` is True and nothing is added.
        fold: adds a tile of logits to the rows' sums. See `eager.linear.fold`.
        fold_backward: turns a tile of logits into its gradient. See `eager.linear.fold_backward`.
        dot: multiplies each row of hidden by its label's row of the head. See `eager.linear.dot`.
        gather: takes rows out of a matrix. See `eager.linear.gather`.
        scatter: adds rows to a matrix. See `eager.linear.scatter`.
        rescale: multiplies kept exponentials by a factor for each row and piece. See `eager.linear.rescale`.
        scratch: (name, shape, dtype, device) -> uninitialised memory, the same at the next call of that name.
        empty: (shape, dtype, device) -> uninitialised memory for what outlives the call.
        gradient_dtype: the dtype of hidden -> the dtype of the gradient's tiles.
        tile: returns the size of a tile.
        whole: whether kept exponentials are multiplied in one product, instead of a tile's columns at a time.
        rounds: whether `product` can write an `out` of the operands' own dtype, rounded once.
        product_fold: (x, weight, bias, targets, logit_scale, temperature, softcap, stats, state, store), or None if
            there is no such kernel: multiplies and folds all columns of some rows. It returns what
            `forward.product_fold` returns with `product` and `fold`; or None, if those two must be used instead, which
            depends on the device, the dtype and the shapes only.
        filtered: (x, weight, bias, targets, keep, columns, kept, norm, grad, transform, d_hidden, d_weight, d_bias,
            add, scratch), or None if there is no such kernel: adds the gradients of the tiles that a filter keeps,
            without a read on the host. It returns False for a dtype that it does not support.
    """

    product: Callable[[Tensor, Tensor, Tensor, bool], None]
    fold: Callable[..., None]
    fold_backward: Callable[..., None]
    dot: Callable[[Tensor, Tensor, Tensor], Tensor]
    gather: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    scatter: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    rescale: Callable[[Tensor, Tensor, int], None]
    scratch: Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]
    empty: Callable[[Sequence[int], torch.dtype, torch.device], Tensor]
    gradient_dtype: Callable[[torch.dtype], torch.dtype]
    tile: Callable[[], Tile]
    whole: bool
    rounds: bool
    product_fold: Callable[..., tuple[Tensor, Tensor, int] | None] | None = None
    filtered: Callable[..., bool] | None = None


def column_chunks(vocabulary: int, columns: int) -> list[tuple[int, int]]:
    """Return the bounds of the runs of `columns` columns that make up a vocabulary."""
    return [(begin, min(begin + columns, vocabulary)) for begin in range(0, vocabulary, columns)]


def row_chunks(rows: int, limit: int) -> list[slice]:
    """Return slices of equal size, up to a multiple of 64, with at most `limit` rows each.

    A remainder of a few rows would cost as many launches as a whole chunk.
    """
    if not rows:
        return []
    chunks = -(-rows // limit)
    size = -(-rows // chunks)
    size = min(-(-size // 64) * 64, limit)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
