"""List the cases of the launchers that work on tiles of logits from hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.smoke.case import SmokeCase
from fastpref.reference.logprobs import transform_logits
from fastpref.testing.case import Arguments, Case, normal
from fastpref_kernels import linear
from fastpref_kernels.contract import STATISTICS, RowSums
from fastpref_kernels.linear.library import fresh_scratch
from fastpref_kernels.triton import filtered, launches, product
from fastpref_kernels.triton import linear as tiles

# Two whole tiles and a narrow one, in blocks of 256 columns at the most.
TILE = 1024 + 16
ROWS, VOCABULARY = 5, 2 * TILE + 37
# Of a product: several blocks of rows, of columns and of terms, and the last of each is not whole. A tensor descriptor
# wants rows of a multiple of 16 bytes.
PRODUCT_ROWS, PRODUCT_VOCABULARY, TERMS = 70, 2 * 256 + 125, 3 * 64 + 8
TRANSFORMS = {"plain": (1.0, 1.0, None), "capped": (0.6, 1.3, 4.0)}
EVERY_STATISTIC = sum(STATISTICS.values())
LAUNCHES = {
    "narrow": launches.ProductLaunch(launches.Blocks(32, 64, 32, 2, 2, 4), width=32),
    "wide": launches.ProductLaunch(launches.Blocks(128, 256, 64, 8, 3, 8), width=64, described=True),
}
Transform = tuple[float, float, float | None]


class Sums(NamedTuple):
    """Hold the sums of each row (R,) without their anchor, which each implementation may choose for itself.

    Attributes:
        lse: the log of the sum of exp z over all columns but the label, as is everything but `total` and `label`.
        expected: the mean of z under that softmax.
        log_squares: the log of the sum of exp 2z.
        total: the sum of z over all columns.
        before: the largest z before the label.
        after: the largest z after it.
        label: its z.
        second: the second largest z of all columns but the label's.
        shares: of each tile of columns (tiles, R), its part of the softmax.
        kept: what is stored of every column (R, V), 0 at the label: the softmax times dz/dx.
    """

    lse: Tensor
    expected: Tensor
    log_squares: Tensor
    total: Tensor
    before: Tensor
    after: Tensor
    label: Tensor
    second: Tensor
    shares: Tensor
    kept: Tensor


class Gradient(NamedTuple):
    """The gradient of a tile of products."""

    products: Tensor


class Gradients(NamedTuple):
    """The gradients of the operands of a product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def kernels_cases() -> Iterator[SmokeCase]:
    """Yield the cases, each of a few rows."""
    for name, transform in TRANSFORMS.items():
        for biased in (False, True):
            told = f"{name}{'-bias' if biased else ''}"
            tier = 0 if told == "plain" else 2
            for peak in (0.0, 90.0):
                peaked = f"{told}{'-label-far-below' if peak else ''}"
                call = Case(
                    name=f"fold/{peaked}",
                    function=functools.partial(_folded, tiles.fold, transform),
                    definition=functools.partial(_folded, linear.fold, transform),
                    draw=functools.partial(_draw_products, biased, False, peak),
                    summed=_summed,
                    slack=4.0,
                )
                yield from (SmokeCase(call=call, dtype=dtype, tier=tier) for dtype in (torch.float32, torch.float64))
            for with_entropy in (False, True):
                options: dict[str, Any] = {"transform": transform, "with_entropy": with_entropy}
                call = Case(
                    name=f"fold_backward/{told}{'-entropy' if with_entropy else ''}",
                    function=functools.partial(_gradient, tiles.fold_backward, **options),
                    definition=functools.partial(_gradient, linear.fold_backward, **options),
                    draw=functools.partial(_draw_products, biased, True, 0.0),
                    slack=4.0,
                )
                yield from (SmokeCase(call=call, dtype=dtype, tier=tier) for dtype in (torch.float32, torch.float64))
    for stored in (False, True):
        for told, transform in TRANSFORMS.items():
            call = Case(
                name=f"filtered_gradients/{'kept' if stored else 'recomputed'}-{told}",
                function=functools.partial(_filtered, False, stored, transform),
                definition=functools.partial(_filtered, True, stored, transform),
                draw=functools.partial(_draw_operands, 0.0),
                slack=4.0,
            )
            for dtype in (torch.bfloat16, torch.float32):
                reason = "the interpreter cannot multiply bfloat16" if dtype == torch.bfloat16 else None
                yield SmokeCase(call=call, dtype=dtype, tier=2 if stored or reason else 0, not_interpreted=reason)
    for name, launch in LAUNCHES.items():
        for told, transform in TRANSFORMS.items():
            for peak in (0.0, 90.0):
                call = Case(
                    name=f"product_fold/{name}-{told}{'-label-far-below' if peak else ''}",
                    function=functools.partial(_product_folded, launch, transform),
                    definition=functools.partial(_multiplied_and_folded, launch.width, transform),
                    draw=functools.partial(_draw_operands, peak),
                    summed=_summed_product,
                )
                # Exact float32 products of a wide block take more than a minute to compile.
                dtypes = (torch.bfloat16, torch.float16) if name == "wide" else (torch.bfloat16, torch.float32)
                for dtype in dtypes:
                    first = (name, told, peak, dtype) == ("narrow", "plain", 0.0, torch.float32)
                    reason = "the interpreter cannot multiply bfloat16" if dtype == torch.bfloat16 else None
                    yield SmokeCase(call=call, dtype=dtype, tier=0 if first else 2, not_interpreted=reason)


def _draw_products(biased: bool, upstream: bool, peak: float, generator: torch.Generator) -> Arguments:
    products = 3 * normal(generator, ROWS, VOCABULARY)
    products[:, [3, TILE + 700]] += torch.tensor([peak, 2 * peak], dtype=products.dtype)
    bias = normal(generator, VOCABULARY) if biased else None
    # In the first block, in the middle of a tile, at both sides of a tile's end, and last.
    targets = torch.tensor([0, TILE // 2, TILE - 1, TILE, VOCABULARY - 1])
    constants: dict[str, Any] = {"products": products, "bias": bias, "targets": targets}
    if upstream:
        constants["grad"], constants["grad_entropy"] = normal(generator, 2, ROWS)
    return {}, constants


def _draw_operands(peak: float, generator: torch.Generator) -> Arguments:
    hidden = normal(generator, PRODUCT_ROWS, TERMS)
    weight = 3 / TERMS**0.5 * normal(generator, PRODUCT_VOCABULARY, TERMS)
    bias = normal(generator, PRODUCT_VOCABULARY)
    bias[300] += peak
    targets = torch.linspace(0, PRODUCT_VOCABULARY - 1, PRODUCT_ROWS).long()
    return {}, {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets}


def _transformed(products: Tensor, bias: Tensor | None, transform: Transform) -> Tensor:
    x = products if bias is None else products + bias
    return transform_logits(x, logit_scale=transform[0], temperature=transform[1], softcap=transform[2])


def _state(z: Tensor, targets: Tensor) -> Tensor:
    """Return the state of rows before anything is folded."""
    state = RowSums.start((len(z),), z.device)
    RowSums.of(state).anchor.copy_(z.gather(1, targets[:, None])[:, 0])
    return state


def _folded(
    fold: Callable[..., None], transform: Transform, products: Tensor, bias: Tensor | None, targets: Tensor,
    tile: int = TILE,
) -> Sums:  # fmt: skip
    """Fold products (R, V) tile by tile."""
    state = _state(_transformed(products, bias, transform), targets)
    store = torch.empty_like(products)
    begins = range(0, products.shape[1], tile)
    anchors, masses = torch.empty(2, len(begins), len(products), dtype=torch.float64, device=products.device)
    for i, begin in enumerate(begins):
        columns = slice(begin, begin + tile)
        fold(
            products[:, columns].clone(), None if bias is None else bias[columns], targets, begin, *transform,
            EVERY_STATISTIC, state, anchors[i], masses[i], store[:, columns],
        )  # fmt: skip
    return _sums(state, anchors, masses, tile, store, products.dtype)


def _sums(state: Tensor, anchors: Tensor, masses: Tensor, columns: int, store: Tensor, dtype: torch.dtype) -> Sums:
    """Return the sums of a fold without its anchors, given (pieces, R) anchors and masses of `columns` columns each."""
    sums = RowSums.of(state)
    lse = sums.anchor + sums.rest.log()
    relative = (anchors - lse).exp()
    of_column = relative.repeat_interleave(columns, 0)[: store.shape[1]].t()
    return Sums(
        lse=lse.to(dtype),
        expected=(sums.weighted / sums.rest + sums.anchor).to(dtype),
        log_squares=(2 * sums.anchor + sums.squares.log()).to(dtype),
        total=sums.total.to(dtype),
        before=sums.before.to(dtype),
        after=sums.after.to(dtype),
        label=sums.label.to(dtype),
        second=sums.second.to(dtype),
        shares=(masses * relative).to(dtype),
        kept=(store * of_column).to(store.dtype),
    )


def _summed(leaves: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, float]:
    """Return the sum of the absolute terms of `total`, and the largest |z|, which scales exponentials' errors."""
    products, bias = constants["products"], constants["bias"]
    z = products if bias is None else products + bias
    largest = z.abs().max().item()
    return {"total": z.abs().sum(1).max().item(), **dict.fromkeys(("kept", "shares"), largest)}


def _gradient(
    fold_backward: Callable[..., None], products: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor,
    grad_entropy: Tensor, *, transform: Transform, with_entropy: bool,
) -> Gradient:  # fmt: skip
    """Turn a tile of products, which may hold a row's label or not, into its gradient."""
    z = _transformed(products.double(), None if bias is None else bias.double(), transform)
    anchor, log_p = z.gather(1, targets[:, None]), z.log_softmax(1)
    inverse = (anchor - z.logsumexp(1, keepdim=True)).exp()
    entropy = -(log_p.exp() * log_p).sum(1)
    norm = torch.stack([anchor[:, 0], inverse[:, 0], log_p.gather(1, targets[:, None])[:, 0], entropy])
    out = torch.empty_like(products)
    for begin in range(0, VOCABULARY, TILE):
        columns = slice(begin, begin + TILE)
        fold_backward(
            products[:, columns].clone(), None if bias is None else bias[columns], targets, begin, *transform,
            norm.to(products.dtype), grad, grad_entropy if with_entropy else None, out[:, columns],
        )  # fmt: skip
    return Gradient(out)


def _filtered(
    eager: bool, stored: bool, transform: Transform, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor
) -> Gradients:
    """Differentiate log-probs by two of every three tiles of 256 columns, from kept exponentials or from products."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    x, w, b = (tensor.to(wide) for tensor in (hidden, weight, bias))
    z = _transformed(x @ w.T, b, transform)
    anchor, log_p = z.gather(1, targets[:, None]), z.log_softmax(1)
    norm = torch.stack([anchor[:, 0], (anchor[:, 0] - z.logsumexp(1)).exp(), log_p.gather(1, targets[:, None])[:, 0]])
    grad = torch.linspace(1, 2, len(x), dtype=wide, device=x.device)
    whole = torch.empty_like(z)
    linear.fold_backward(x @ w.T, b, targets, 0, *transform, norm, grad, None, whole)
    tile = torch.arange(-(-len(w) // 256), device=x.device)
    keep = (tile[:, None] + torch.arange(len(x), device=x.device)) % 3 > 0
    if eager:
        g = (whole * keep.repeat_interleave(256, 0)[: len(w)].T).to(hidden.dtype)
        return Gradients(g @ weight, g.T @ hidden, g.sum(0))
    kept = (whole / (-grad * norm[1])[:, None]).to(hidden.dtype) if stored else None
    found = Gradients(torch.zeros_like(x), torch.empty_like(w), torch.empty_like(b))
    done = filtered.filtered_gradients(
        hidden, weight, bias, targets, keep, 256, kept, norm, grad, transform, *found, False, fresh_scratch
    )
    assert done
    return found


def _product_folded(
    launch: launches.ProductLaunch, transform: Transform, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor
) -> Sums:
    """Multiply and fold in one kernel."""
    z = _transformed(hidden.float() @ weight.float().T, bias.float(), transform)
    state, store = _state(z, targets), hidden.new_empty(z.shape, dtype=torch.float32)
    with mock.patch.object(launches, "product_launch", return_value=launch):
        done = product.product_fold(hidden, weight, bias, targets, *transform, EVERY_STATISTIC, state, store)
    assert done is not None
    return _sums(state, *done, store, torch.float32)


def _multiplied_and_folded(
    columns: int, transform: Transform, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor
) -> Sums:
    """Multiply and fold as eager PyTorch does, in tiles of as many columns as the kernel folds at a time."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return _folded(linear.fold, transform, hidden.to(wide) @ weight.to(wide).T, bias.to(wide), targets, columns)


def _summed_product(leaves: dict[str, Tensor], constants: dict[str, Any]) -> dict[str, float]:
    """Return the sums of the absolute terms of the products."""
    products = constants["hidden"].abs() @ constants["weight"].abs().T + constants["bias"].abs()
    largest = products.max().item()
    return {"total": products.sum(1).max().item(), **{name: largest for name in Sums._fields if name != "total"}}
