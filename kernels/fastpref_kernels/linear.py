"""Log-probs from hidden states and the LM head, for every device: products of a library, row passes of ours.

The scored rows are gathered first. Then, for a chunk of rows, the vocabulary is gone over a tile of columns at a time:
a product writes the tile's logits in float32, and a fold adds them to each row's sums, on a CPU while they are in the
cache. No logit is ever rounded below float32, and no more of them exist at a time than a tile.

With e_j = exp(z_j - a), s = Σ_{j≠y} e_j and S = s + e_y:

    log p_y    = -log1p(s·exp(a - z_y))
    ∂/∂z_j     = e_j / S, and -s / S at the label, each with the sign turned

The anchor a is the label's logit as a dot product of its own gives it. It is only near the z_y of the tile, which is
the one that counts: rounded like all others of its row, it leaves a common offset without effect. A row whose sum would
pass 2^60, or 2^10 where an entropy is wanted, moves its anchor up to its maximum.

So where a row's e (with -s in the label's place) was kept, both gradients are library products of it, whatever the
upstream gradient g: d_hidden = -diag(g/S)·(e·W) and d_weight = -eᵀ·(diag(g/S)·X). Nothing cancels, at any log-prob.
Where it was not kept, the logits are made again, and a second fold turns them into the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref_kernels import eager

# Columns that a gradient is filtered by. A CPU's products are at full speed from 1024 columns on, and a row of so many
# stays in an L1 cache.
COLUMNS = 4096
LOSS_BYTES = 1 << 30  # of exponentials a loss keeps at a time, on a device with memory of its own
# Sums past this move the anchor, as in the kernels. An entropy's digits want it near the row's mass, not only in range.
LIMIT, ENTROPY_LIMIT = 2.0**60, 2.0**10
_NEAR = 600.0  # below this, exp(a - z_y) is a float64 with room to spare
UNSCORED = -2  # what `shard_labels` has for ignore_index; -1 is a label of a shard before, and columns or more after


class Tile(NamedTuple):
    """The largest product of hidden states and the head that is made at a time.

    Attributes:
        rows: rows of hidden; the default of `chunk_rows`.
        columns: columns of the vocabulary; they divide `COLUMNS` or are a multiple of it.
    """

    rows: int
    columns: int


class Backend(NamedTuple):
    """What a device brings.

    Attributes:
        product: (out, a, b, add): out (M, N) = a (M, K) @ b (K, N), or += it; out and its sums are float32 (float64
            for float64 operands).
        fold: adds a tile of logits to the rows' sums. See `fold`.
        fold_backward: turns a tile of logits into its gradient. See `fold_backward`.
        scratch: (name, shape, dtype, device) -> uninitialised memory, the same at the next call of that name.
        empty: (shape, dtype, device) -> uninitialised memory for what outlives the call.
        gradient_dtype: the dtype of hidden -> that of the gradient's tiles.
        tile: returns the size of a tile.
        whole: whether kept exponentials are multiplied in one product, and not a tile's columns at a time.
        product_fold: (x, weight, bias, targets, logit_scale, temperature, softcap, stats, state, store), or None where
            there is no such kernel: multiplies and folds all columns of some rows, as `_product_fold` does with
            `product` and `fold`, and returns what it does; None where those two are to be used, which it says from the
            device, the dtype and the shapes alone.
    """

    product: Callable[[Tensor, Tensor, Tensor, bool], None]
    fold: Callable[..., None]
    fold_backward: Callable[..., None]
    scratch: Callable[[str, tuple[int, ...], torch.dtype, torch.device], Tensor]
    empty: Callable[[Sequence[int], torch.dtype, torch.device], Tensor]
    gradient_dtype: Callable[[torch.dtype], torch.dtype]
    tile: Callable[[], Tile]
    whole: bool
    product_fold: Callable[..., tuple[Tensor, Tensor, int] | None] | None = None


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose products' operands have the dtypes they are to have: an autocast around it rounds none."""

    @functools.wraps(function)
    def call(backend: Backend, *arguments: Any) -> Any:
        device = next(value.device.type for value in arguments if isinstance(value, Tensor))
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(backend, *arguments)
        with torch.autocast(device, enabled=False):
            return function(backend, *arguments)

    return call


def widened(*dtypes: torch.dtype) -> torch.dtype:
    """What these are computed in: their common dtype, float32 at the least."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _transformed(
    x: Tensor, bias: Tensor | None, logit_scale: float, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor | float]:
    """z of raw logits x, and dz/dx."""
    if bias is not None:
        x = x + bias.to(x.dtype)
    transform = eager.Transform.of(logit_scale, temperature, softcap)
    u = transform.u(x)
    return u * transform.rate, transform.derivative(u)


def fold(
    z: Tensor, bias: Tensor | None, targets: Tensor, column: int, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, state: Tensor, anchors: Tensor, masses: Tensor, store: Tensor | None,
) -> None:  # fmt: skip
    """Add a tile of logits to the sums of its rows: the definition, which the kernels do in one pass.

    Args:
        z: (R, C) products hidden @ weightᵀ, float32 or float64; may be written to.
        bias: (C,) or None.
        targets: (R,) the rows' labels.
        column: the vocabulary column the tile starts at.
        logit_scale: as in `logprobs`, like the two after it.
        temperature: divides the logits.
        softcap: caps the logits.
        stats: bits of the statistics asked for.
        state: (8, R) float64, in and out, of d_j = z_j - anchor over the tiles so far: the anchor, -inf while there is
            none (the label's logit and all others are -inf); Σ exp d, Σ d·exp d and Σ exp 2d over j ≠ label; Σ z over
            all j; the maxima of z before and after the label; z of the label.
        anchors: (R,) float64, out: the anchor of this tile.
        masses: (R,) float64, out: this tile's Σ_{j≠label} exp d.
        store: (R, C) or None, out: exp(d)·dz/dx, and 0 at the label.
    """
    z, slope = _transformed(z, bias, logit_scale, temperature, softcap)
    anchor, rest, weighted, squares, total, highest_before, highest_after, label = state
    columns = torch.arange(column, column + z.shape[1], device=z.device)
    before, after = columns < targets[:, None], columns > targets[:, None]
    if stats & 4:
        total += z.sum(-1, dtype=torch.float64)
    if stats & 8:
        for highest, side in ((highest_before, before), (highest_after, after)):
            highest.copy_(torch.maximum(highest, z.masked_fill(~side, -torch.inf).amax(-1).double()))
    own = ~(before | after)
    label.copy_(torch.where(own.any(-1), z.masked_fill(~own, 0.0).sum(-1).double(), label))
    others = z.masked_fill(own, -torch.inf)
    tile = (others - anchor[:, None].to(z.dtype)).exp().sum(-1, dtype=torch.float64)
    redone = ~(rest + tile < (ENTROPY_LIMIT if stats & 2 else LIMIT))
    old = torch.where((rest > 0) | anchor.isfinite(), anchor, -torch.inf)
    moved = torch.where(redone, torch.maximum(old, others.amax(-1).double()), anchor)
    # Any number where there is nothing but -inf yet: a sum of 0 and no NaN, and the row stays without an anchor.
    base = moved.masked_fill(moved == -torch.inf, 0.0)
    gap = torch.where(redone, anchor - base, 0.0)
    factor = gap.exp()
    gap = gap.masked_fill(factor == 0, 0.0)
    d = others - base[:, None].to(z.dtype)
    e = d.exp()
    weighted.copy_(factor * (weighted + gap * rest) + (e * d.masked_fill(e == 0, 0.0)).sum(-1, dtype=torch.float64))
    squares.copy_(factor * factor * squares + (e * e).sum(-1, dtype=torch.float64))
    masses.copy_(e.sum(-1, dtype=torch.float64))
    rest.copy_(factor * rest + masses)
    anchor.copy_(moved)
    anchors.copy_(moved)
    if store is not None:
        store.copy_(e * slope)


def fold_backward(
    z: Tensor, bias: Tensor | None, targets: Tensor, column: int, logit_scale: float, temperature: float,
    softcap: float | None, norm: Tensor, grad: Tensor | None, grad_entropy: Tensor | None, out: Tensor,
) -> None:  # fmt: skip
    """Turn a tile of logits into their gradient: the definition, which the kernels do in one pass.

    Args:
        z: (R, C) products hidden @ weightᵀ; may be written to.
        bias: (C,) or None.
        targets: (R,) the rows' labels.
        column: the vocabulary column the tile starts at.
        logit_scale: as in `logprobs`, like the two after it.
        temperature: divides the logits.
        softcap: caps the logits.
        norm: (3, R): anchor, 1/S and log-prob of each row, and its entropy where there is a fourth.
        grad: (R,) or None, of the log-probs.
        grad_entropy: (R,) or None, of the entropies.
        out: (R, C), may be `z`.
    """
    z, slope = _transformed(z, bias, logit_scale, temperature, softcap)
    anchor, inverse, logp = (norm[i][:, None] for i in range(3))
    own = torch.arange(column, column + z.shape[1], device=z.device) == targets[:, None]
    d = z - anchor
    p = d.exp() * inverse
    result = torch.zeros_like(z)
    if grad is not None:
        result = torch.where(own, -grad[:, None] * torch.expm1(logp), -grad[:, None] * p)
    if grad_entropy is not None:
        entropy = norm[3][:, None]
        log_p = torch.where(own, logp, d + inverse.log())
        p = torch.where(own, logp.exp(), p)
        result = result - grad_entropy[:, None] * p * (log_p + entropy).masked_fill(p == 0, 0.0)
    out.copy_(result * slope)


class _Rows(NamedTuple):
    """The scored rows: which they are among (B·T) positions, where their results go in (B, T'), and their labels."""

    position: Tensor
    place: tuple[Tensor, Tensor]
    label: Tensor

    @classmethod
    def of(cls, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool) -> _Rows:
        targets, scored = eager.scored_targets(labels, cu_seqlens, ignore_index, shift)
        batch, time = scored.nonzero(as_tuple=True)
        return cls(batch * labels.shape[1] + time, (batch, time), targets[batch, time].long())

    def __len__(self) -> int:
        return self.label.shape[0]


def _column_chunks(vocabulary: int, columns: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, vocabulary, columns):
        yield begin, min(begin + columns, vocabulary)


def _label_logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, logit_scale: float, temperature: float,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    """z of the labels (R,), from a float32 dot product; where they are another shard's, of the nearest column here."""
    dtype = widened(x.dtype)
    if not len(weight):
        return x.new_full(labels.shape, -torch.inf, dtype=dtype)
    labels = labels.clamp(0, len(weight) - 1)
    raw = (x.to(dtype) * weight[labels].to(dtype)).sum(-1)
    return _transformed(raw, None if bias is None else bias[labels], logit_scale, temperature, softcap)[0]


def _tile_columns(backend: Backend, filter_eps: float | None) -> int:
    """Return the columns of a tile: `COLUMNS` where a gradient is filtered by them, else what the device wants."""
    return backend.tile().columns if filter_eps is None else COLUMNS


def _product_fold(
    backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_scale: float,
    temperature: float, softcap: float | None, stats: int, state: Tensor, store: Tensor | None, columns: int,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Multiply and fold every column of some rows. Returns anchors and masses (pieces, R), and a piece's columns.

    Args:
        backend: whose products and row passes.
        x: (R, H).
        weight: (V, H).
        bias: (V,) or None.
        targets: (R,), as in `fold`, like every argument after it but the last two.
        logit_scale: multiplies the logits.
        temperature: divides the logits.
        softcap: caps the logits.
        stats: bits of the statistics asked for.
        state: (8, R) float64, in and out, over all columns.
        store: (R, V) or None, out: what each piece stores is relative to its own anchor.
        columns: columns of a piece, unless the backend's own kernel decides.
    """
    if backend.product_fold is not None:
        done = backend.product_fold(
            x, weight, bias, targets, logit_scale, temperature, softcap, stats, state, store
        )  # fmt: skip
        if done is not None:
            return done
    vocabulary, transform = weight.shape[0], (logit_scale, temperature, softcap)
    chunks = list(_column_chunks(vocabulary, columns))
    anchors, masses = state.new_empty((2, len(chunks), len(targets)))
    tile = backend.scratch("logits", (len(targets), min(columns, vocabulary)), widened(x.dtype), x.device)
    for i, (begin, end) in enumerate(chunks):
        z = tile[:, : end - begin]
        backend.product(z, x, weight[begin:end].t(), False)
        backend.fold(
            z, None if bias is None else bias[begin:end], targets, begin, *transform, stats, state, anchors[i],
            masses[i], None if store is None else store[:, begin:end],
        )  # fmt: skip
    return anchors, masses, columns


def _tiles(pieces: Tensor, columns: int) -> Tensor:
    """Values of pieces of `columns` columns (pieces, R) by tile: (chunks, pieces of a tile, R), zeros past the end."""
    count = max(COLUMNS // columns, 1)
    return torch.nn.functional.pad(pieces, (0, 0, 0, -len(pieces) % count)).unflatten(0, (-1, count))


def _masses(anchors: Tensor, masses: Tensor, columns: int, anchor: Tensor) -> Tensor:
    """Σ exp(z - anchor) of every tile of every row (chunks, R), its label's aside, from pieces of `columns` columns."""
    return _tiles(masses * (anchors - anchor).exp(), columns).sum(1)


def _rows_of_tiles(mask: Tensor) -> tuple[Tensor, ...]:
    """The rows of every tile where `mask` (chunks, R) is True, read at once: a device waits for every answer."""
    return mask.nonzero()[:, 1].split(mask.sum(1).tolist())


def _reanchor(kept: Tensor, anchors: Tensor, anchor: Tensor, columns: int, dtype: torch.dtype) -> None:
    """Bring stored exponentials (R, V), each piece of `columns` columns at an anchor of its own, to their row's."""
    gaps = _tiles(anchors - anchor, columns)
    moved = _rows_of_tiles((gaps != 0).any(1))
    tiles = _column_chunks(kept.shape[1], max(columns, COLUMNS))
    for (begin, end), rows, gap in zip(tiles, moved, gaps, strict=True):
        if not len(rows):
            continue
        factor = gap.exp().to(dtype).t()[..., None].expand(-1, -1, columns).reshape(len(kept), -1)[:, : end - begin]
        if 8 * len(rows) > len(kept):
            kept[:, begin:end].mul_(factor)  # every row in place: most are to change, and a gather costs more
        else:
            kept[rows, begin:end] = kept[rows, begin:end].mul_(factor[rows])


def _kept(shares: Tensor, labels: Tensor, columns: int, filter_eps: float) -> Tensor:
    """Which tiles of each row carry gradient (chunks, R): enough mass, or the label; NaN stays to be seen."""
    chunk = torch.arange(shares.shape[0], device=shares.device)[:, None]
    return ~(shares < filter_eps) | (labels // columns == chunk)


def _check(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, shift: bool, vocabulary: int) -> None:
    if cu_seqlens is not None:
        eager.check_boundaries(cu_seqlens, labels.shape[1])
    eager.check_labels(*eager.scored_targets(labels, cu_seqlens, ignore_index, shift), vocabulary)


def _fold_rows(
    backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows, store: Tensor | None,
    transform: tuple[float, float, float | None], stats: int, chunk_rows: int | None, filter_eps: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sums of rows over all columns, as `fold`'s state (8, R), and each tile's mass (chunks, R).

    What is kept of a row, and the masses, which are told where `filter_eps` will ask for them, are at the row's anchor.
    """
    flat, chunks = hidden.reshape(-1, hidden.shape[-1]), (weight.shape[0] + COLUMNS - 1) // COLUMNS
    state = torch.zeros((8, len(rows)), dtype=torch.float64, device=hidden.device)
    state[5:7] = -torch.inf
    shares = hidden.new_zeros((0 if filter_eps is None else chunks, len(rows)), dtype=torch.float32)
    size = min(chunk_rows or backend.tile().rows, max(len(rows), 1))
    for first in range(0, len(rows), size):
        part = slice(first, min(first + size, len(rows)))
        y, x = rows.label[part], flat[rows.position[part]]
        of_part = state[:, part].contiguous()
        of_part[0] = _label_logits(x, weight, bias, y, *transform)
        kept = None if store is None else store[part]
        anchors, masses, columns = _product_fold(
            backend, x, weight, bias, y, *transform, stats, of_part, kept, _tile_columns(backend, filter_eps)
        )
        state[:, part] = of_part
        anchor = of_part[0].masked_fill(of_part[0] == -torch.inf, 0.0)  # nothing but -inf: any anchor does
        if kept is not None:
            _reanchor(kept, anchors, anchor, columns, widened(hidden.dtype))
        if filter_eps is not None:
            shares[:, part] = _masses(anchors, masses, columns, anchor).float()
    return state, shares


def _settle_rows(
    rows: _Rows, state: Tensor, whole_state: Tensor, vocabulary: Tensor | int, store: Tensor | None, transform: Any,
    stats: int,
) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:  # fmt: skip
    """What follows from the sums of rows: log-probs, anchor and 1/S, each (R,), and the statistics asked for, by bit.

    Args:
        rows: with labels that are columns here, or outside of them.
        state: (8, R), the sums over the columns here, which may be a shard of all.
        whole_state: (8, R), the sums over all columns, at an anchor that is no lower; `state` where they are all here.
        vocabulary: the number of all columns.
        store: (R, V) or None: receives what the gradient's products need at the label.
        transform: logit_scale, temperature and softcap.
        stats: bits of the statistics asked for.
    """
    own, highest, *sums = state[0], *whole_state
    rest, weighted, squares, total, before, after, z_y = sums
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    e_y = (z_y - highest).exp()
    whole = rest + e_y
    gap = highest - z_y
    near = -torch.log1p(rest * gap.clamp(max=_NEAR).exp())
    logp = torch.where(gap < _NEAR, near, -gap - whole.log()).masked_fill(z_y == torch.inf, torch.nan)
    # A shard's own anchor serves it, as long as what it is away from that of all columns leaves room in float32.
    moved = ~(highest - own < math.log(LIMIT))
    anchor = torch.where(moved, highest, own)
    if store is not None:
        store = store[: len(rows)]
        if whole_state is not state and moved.any():
            factor = torch.where(own == -torch.inf, 0.0, own - highest).exp()
            store[moved] = store[moved].mul_(factor[moved, None].to(widened(store.dtype)))
        of_z = eager.Transform.of(*transform)
        here = torch.arange(len(rows), device=store.device)
        if whole_state is not state:
            here = here[(rows.label >= 0) & (rows.label < store.shape[1])]
        at_label = -rest * (highest - anchor).exp() * of_z.derivative(z_y / of_z.rate)
        store[here, rows.label[here]] = at_label[here].to(store.dtype)
    values: dict[int, Callable[[], Tensor]] = {
        0: lambda: highest + whole.log(),
        1: lambda: torch.where(
            gap < _NEAR,  # from the label, where an entropy near 0 keeps its digits
            -logp - (weighted + gap * rest) / whole,
            whole.log() - (weighted - (e_y * gap).masked_fill(e_y == 0, 0.0)) / whole,
        ),
        2: lambda: total / vocabulary,
        3: lambda: (before < z_y) & (after <= z_y),
        4: lambda: (squares + e_y * e_y).log() - 2 * whole.log(),
    }
    inverse = (anchor - highest).exp() / whole
    return logp, anchor, inverse, {bit: value() for bit, value in values.items() if stats >> bit & 1}


def _settled(
    hidden: Tensor, shape: tuple[int, ...], rows: _Rows, state: Tensor, whole_state: Tensor, shares: Tensor,
    vocabulary: Tensor | int, store: Tensor | None, transform: Any, stats: int, filter_eps: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of `fastpref::linear_logprobs`, of `shape` (B, T'), from the sums of rows; hidden for its dtype."""
    dtype = widened(hidden.dtype)
    logp, anchor, inverse, found = _settle_rows(rows, state, whole_state, vocabulary, store, transform, stats)
    if len(shares):
        scale = inverse * torch.where(state[0] == -torch.inf, 0.0, state[0] - anchor).exp()
        shares = (shares * scale).float()
    if stats >> 5 & 1:
        dropped = shares.new_zeros(len(rows))
        if filter_eps is not None:
            dropped = shares.masked_fill(_kept(shares, rows.label, COLUMNS, filter_eps), 0.0).sum(0)
        found[5] = dropped

    def spread(values: Tensor, kind: torch.dtype) -> Tensor:
        out = values.new_zeros((*values.shape[:-1], *shape), dtype=kind)
        out[(..., *rows.place)] = values.to(kind)
        return out

    statistics = [
        spread(found[bit], torch.bool if bit == 3 else dtype)
        if stats >> bit & 1
        else hidden.new_zeros(0, dtype=torch.bool if bit == 3 else dtype)
        for bit in range(6)
    ]
    norm = torch.stack([anchor, inverse, logp, *([found[1]] if stats & 2 else [])])
    return spread(logp, dtype), spread(norm, dtype), spread(shares, torch.float32), *statistics


def _shape(labels: Tensor, shift: bool) -> tuple[int, ...]:
    return tuple(labels[:, 1:].shape if shift else labels.shape)


@_outside_autocast
def logprobs(
    backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    store: Tensor | None, ignore_index: int, shift: bool, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, chunk_rows: int | None, filter_eps: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::linear_logprobs`."""
    transform = (logit_scale, temperature, softcap)
    _check(labels, cu_seqlens, ignore_index, shift, weight.shape[0])
    rows = _Rows.of(labels, cu_seqlens, ignore_index, shift)
    state, shares = _fold_rows(
        backend, hidden, weight, bias, rows, store, transform, stats, chunk_rows, filter_eps
    )  # fmt: skip
    state[0].masked_fill_(state[0] == -torch.inf, 0.0)
    return _settled(
        hidden, _shape(labels, shift), rows, state, state, shares, weight.shape[0], store, transform, stats, filter_eps
    )


def shard_labels(
    labels: Tensor, cu_seqlens: Tensor | None, shard: Tensor, columns: int, ignore_index: int, shift: bool
) -> Tensor:
    """`fastpref::shard_labels`."""
    first, vocabulary = shard[0], int(shard[1])
    _check(labels, cu_seqlens, ignore_index, shift, vocabulary)
    # Past all tiles, and not only past the columns, so that no tile's padding is taken for the label.
    after = (columns + COLUMNS - 1) // COLUMNS * COLUMNS
    here = (labels.long() - first).clamp(min=-1)
    return here.masked_fill(here >= columns, after).masked_fill(labels == ignore_index, UNSCORED)


@_outside_autocast
def fold_shard(
    backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None,
    store: Tensor | None, ignore_index: int, shift: bool, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, chunk_rows: int | None, filter_eps: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fastpref::linear_fold`."""
    rows = _Rows.of(labels, cu_seqlens, ignore_index, shift)
    state, shares = _fold_rows(
        backend, hidden, weight, bias, rows, store, (logit_scale, temperature, softcap), stats, chunk_rows, filter_eps
    )  # fmt: skip
    sums = state.new_zeros((8, *_shape(labels, shift)))
    sums[(slice(None), *rows.place)] = state
    masses = shares.new_zeros((len(shares), *sums.shape[1:]))
    masses[(slice(None), *rows.place)] = shares
    return sums, masses


def settle_shard(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None, shard: Tensor, sums: Tensor, whole_sums: Tensor,
    masses: Tensor, store: Tensor | None, ignore_index: int, shift: bool, logit_scale: float, temperature: float,
    softcap: float | None, stats: int, filter_eps: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`fastpref::linear_settle`."""
    rows = _Rows.of(labels, cu_seqlens, ignore_index, shift)
    place = (slice(None), *rows.place)
    return _settled(
        hidden, _shape(labels, shift), rows, sums[place], whole_sums[place], masses[place], shard[1], store,
        (logit_scale, temperature, softcap), stats, filter_eps,
    )  # fmt: skip


def _picked(values: Any, pick: Tensor | None) -> Any:
    """Rows of something (..., R), if there is something, and a choice of rows."""
    return values if values is None or pick is None else values[..., pick].contiguous()


@_outside_autocast
def accumulate_gradients(
    backend: Backend, grad: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, norm: Tensor, store: Tensor | None,
    shares: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None, fresh: bool,
    ignore_index: int, shift: bool, logit_scale: float, temperature: float, softcap: float | None,
    chunk_rows: int | None, filter_eps: float | None,
) -> None:  # fmt: skip
    """`fastpref::linear_logprobs_backward_`. A d_weight of a narrower dtype is for rows of one chunk, rounded once."""
    vocabulary, transform, dtype = weight.shape[0], (logit_scale, temperature, softcap), widened(hidden.dtype)
    rows = _Rows.of(labels, cu_seqlens, ignore_index, shift)
    for total in (d_hidden, d_weight, d_bias):
        # The weight's is worth not writing twice: the first product of its columns overwrites it.
        if fresh and total is not None and (total is not d_weight or not len(rows) or filter_eps is not None):
            total.zero_()
    overwrite = fresh and filter_eps is None
    # The kept exponentials serve the log-probs alone: an entropy's gradient needs the log-probs of every entry too.
    kept = store if grad_entropy is None else None
    columns = _tile_columns(backend, filter_eps)
    if backend.whole and kept is not None and filter_eps is None:
        columns = vocabulary
    flat = hidden.reshape(-1, hidden.shape[-1])
    size = min(chunk_rows or backend.tile().rows, max(len(rows), 1))
    for first in range(0, len(rows), size):
        part = slice(first, min(first + size, len(rows)))
        place = (rows.place[0][part], rows.place[1][part])
        y, x, of_row = rows.label[part], flat[rows.position[part]], norm[(slice(None), *place)].contiguous()
        g = None if grad is None else grad[place].to(dtype).contiguous()
        h = None if grad_entropy is None else grad_entropy[place].to(dtype).contiguous()
        picks = None
        if filter_eps is not None and h is None:
            picks = _rows_of_tiles(_kept(shares[(slice(None), *place)], y, COLUMNS, filter_eps))
        row_scale = None
        right = x
        if kept is not None:
            assert g is not None
            row_scale = -g * of_row[1]
            right = (x.to(dtype) * row_scale[:, None]).to(x.dtype)
        rows_gradient = None
        if d_hidden is not None:
            rows_gradient = backend.scratch("hidden", (len(y), hidden.shape[-1]), dtype, x.device).zero_()
        for i, (begin, end) in enumerate(_column_chunks(vocabulary, columns)):
            pick = None if picks is None or len(picks[i]) == len(y) else picks[i]
            if pick is not None and not len(pick):
                continue
            w, b = weight[begin:end], None if bias is None else bias[begin:end]
            if kept is not None:
                tile = kept[part, begin:end] if pick is None else kept[part, begin:end][pick]
            else:
                n = len(y) if pick is None else len(pick)
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
                    backend.product(rows_gradient, tile, w, True)
                else:
                    some = rows_gradient.new_empty(len(pick), rows_gradient.shape[1])
                    backend.product(some, tile, w, False)
                    rows_gradient.index_add_(0, pick, some)
            if d_weight is not None:
                of_rows = right if pick is None else right[pick]
                if d_weight.dtype == dtype:
                    backend.product(d_weight[begin:end], tile.t(), of_rows, not (overwrite and first == 0))
                else:
                    sums = backend.scratch("weight", (end - begin, d_weight.shape[1]), dtype, x.device)
                    backend.product(sums, tile.t(), of_rows, False)
                    d_weight[begin:end] = sums
            if d_bias is not None:
                wide = tile.to(dtype)
                d_bias[begin:end] += wide.sum(0) if row_scale is None else _picked(row_scale, pick) @ wide
        if d_hidden is not None:
            assert rows_gradient is not None
            if row_scale is not None:
                rows_gradient *= row_scale[:, None]
            d_hidden.view(-1, d_hidden.shape[-1])[rows.position[part]] += rows_gradient


def gradients(
    backend: Backend, grad: Tensor | None, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, labels: Tensor, cu_seqlens: Tensor | None, norm: Tensor, store: Tensor | None,
    shares: Tensor, needed: list[bool], hidden_dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype,
    *scoring: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`fastpref::linear_logprobs_backward`."""
    dtypes = (hidden_dtype, weight_dtype, bias_dtype)
    wide, chunk_rows = widened(hidden.dtype), scoring[-2]
    # Rows of one chunk need no sums between chunks, and so no float32 weight gradient but a tile's.
    once = labels.numel() <= (chunk_rows or backend.tile().rows) and not backend.whole
    kinds = (wide, weight_dtype if once else wide, wide)
    totals: list[Tensor | None] = [
        backend.empty(tensor.shape, kind, tensor.device) if want and tensor is not None else None
        for tensor, want, kind in zip((hidden, weight, bias), needed, kinds, strict=True)
    ]
    given = (grad, grad_entropy, hidden, weight, bias, labels, cu_seqlens, norm, store, shares)
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
    if dtype == total.dtype:
        return torch.mul(total, upstream, out=out)
    # Rounding in the same call would make the product whole first, in float32.
    for part, rounded in zip(total.split(COLUMNS), out.split(COLUMNS), strict=True):
        rounded.copy_(
            torch.mul(part, upstream, out=backend.scratch("weight", tuple(part.shape), total.dtype, out.device))
        )
    return out


def library_product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (M, N) = a (M, K) @ b (K, N), or += it, with float32 sums and result whatever the operands' dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif not a.is_cuda:
        library_product(out, a.to(out.dtype), b.to(out.dtype), add)
    elif add:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of PyTorch's allocator."""
    return torch.empty(shape, dtype=dtype, device=device)


def fresh_scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of an allocator that keeps its own."""
    del name
    return empty(shape, dtype, device)


def library_backend(
    fold: Callable[..., None], fold_backward: Callable[..., None],
    product_fold: Callable[..., tuple[Tensor, Tensor, int] | None] | None = None,
    tile: Callable[[], Tile] = lambda: Tile(rows=4096, columns=COLUMNS),
) -> Backend:  # fmt: skip
    """A device's own products around the given row passes, with tiles large enough to fill a GPU."""
    return Backend(
        library_product, fold, fold_backward, fresh_scratch, empty, lambda dtype: dtype,
        tile=tile, whole=True, product_fold=product_fold,
    )  # fmt: skip
