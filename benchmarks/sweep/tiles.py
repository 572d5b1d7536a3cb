"""Vary the fold of a tile of logits, the products around it, and both over a whole vocabulary."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from benchmarks.sweep.case import JUDGED, Case, Trial, copies, furthest, furthest_ratio, normal, poisoned, replaced
from fastpref_kernels import linear
from fastpref_kernels.contract import RowSums, Statistic
from fastpref_kernels.linear import Tile, library_product
from fastpref_kernels.triton import launches, product
from fastpref_kernels.triton import linear as triton_linear

PLAIN = (1.0, 1.0, None)  # logit_scale, temperature, softcap
STATS = (Statistic.ENTROPY | Statistic.MEAN_LOGITS | Statistic.IS_TOP1).value
LAUNCHES = (launches.Launch(256, 1), launches.Launch(512, 2), launches.Launch(1024, 4), launches.Launch(2048, 4))
TILES = (Tile(2048, 2048), Tile(4096, 2048), Tile(4096, 4096), Tile(4096, 16384))
# None of these spills on sm_90. A multiprocessor may hold two programs of 128 x 128 logits, and one of them folds while
# the other multiplies.
FUSED = tuple(
    launches.ProductLaunch(launches.Blocks(*blocks), width, described)
    for blocks, width, described in (
        ((128, 256, 64, 8, 3, 8), 64, True),
        ((128, 256, 64, 8, 4, 8), 64, True),
        ((128, 256, 64, 8, 3, 8), 64, False),
        ((128, 128, 64, 8, 3, 8), 64, True),
        ((128, 128, 64, 8, 3, 4), 32, True),
        ((64, 256, 64, 8, 3, 4), 64, True),
    )
)


def _state(device: str, R: int, anchor: float = 0.0) -> Tensor:
    state = RowSums.start((R,), torch.device(device))
    RowSums.of(state).anchor.fill_(anchor)
    return state


def _logp(state: Tensor) -> Tensor:
    sums = RowSums.of(state)
    gap = sums.label - sums.anchor
    return gap - (sums.rest + gap.exp()).log()


def _fold(C: int, stats: int, stored: bool, device: str, R: int) -> Trial:
    tiles = [normal(device, R, C, dtype=torch.float32, scale=3.0) for _ in range(copies(4 * R * C, device))]
    targets = torch.randint(C, (R,), device=device)
    stores = [torch.empty(R, C, dtype=torch.bfloat16, device=device) if stored else None for _ in tiles]
    anchors, masses = torch.empty(2, R, dtype=torch.float64, device=device)
    # Far above the logits, so that no sum reaches the limit at which the anchor moves, however often they are added.
    anchor = 25.0
    state = _state(device, R, anchor)

    turns = itertools.cycle(zip(tiles, stores, strict=True))

    def run(z: Tensor, store: Tensor | None, state: Tensor) -> None:
        triton_linear.fold(z, None, targets, 0, *PLAIN, stats, state, anchors, masses, store)

    def error() -> float:
        n = min(JUDGED, R)
        fresh, truth = _state(device, R, anchor), _state(device, n, anchor)
        outs = [out for out in (anchors, masses, stores[0]) if out is not None]
        for out in outs:
            out.fill_(torch.nan)
        run(tiles[0], stores[0], fresh)
        unused = torch.empty(n, dtype=torch.float64, device=device)
        linear.fold(tiles[0][:n].double(), None, targets[:n], 0, *PLAIN, stats, truth, unused, unused.clone(), None)
        found, wanted = RowSums.of(fresh[:, :n]), RowSums.of(truth)
        off = furthest(found.rest.log(), wanted.rest.log())
        if stats:
            off = max(off, furthest(found.weighted / found.rest, wanted.weighted / wanted.rest))
        return off if all(out.isfinite().all() for out in outs) else float("nan")

    return Trial(lambda: run(*next(turns), state), error, 1e-5, R * C * (4 + 2 * stored) / 1e9)


def _fold_backward(C: int, device: str, R: int) -> Trial:
    z = normal(device, R, C, dtype=torch.float32, scale=3.0)
    targets, grad = torch.randint(C, (R,), device=device), torch.ones(R, device=device)
    log_s = z.logsumexp(-1)
    logp = z.gather(-1, targets[:, None])[:, 0] - log_s
    norm = torch.stack([log_s, torch.ones_like(log_s), logp])
    out = torch.empty(R, C, dtype=torch.bfloat16, device=device)

    def run() -> None:
        triton_linear.fold_backward(z, None, targets, 0, *PLAIN, norm, grad, None, out)

    def error() -> float:
        out.fill_(torch.nan)
        run()
        n = min(JUDGED, R)
        truth = -z[:n].double().softmax(-1)
        truth.scatter_add_(-1, targets[:n, None], torch.ones(n, 1, dtype=torch.float64, device=device))
        return furthest_ratio(out[:n], truth) if out.isfinite().all() else float("nan")

    return Trial(run, error, 2**-7, R * C * 6 / 1e9)


def _weight_gradient(V: int, H: int, fused: bool, device: str, R: int) -> Trial:
    kept = normal(device, R, V, dtype=torch.bfloat16)
    return _accumulated(kept.t(), normal(device, R, H, dtype=torch.bfloat16), fused)


def _hidden_gradient(K: int, H: int, fused: bool, device: str, R: int) -> Trial:
    tile, weight = normal(device, R, K, dtype=torch.bfloat16), normal(device, K, H, dtype=torch.bfloat16)
    return _accumulated(tile, weight, fused)


def _accumulated(a: Tensor, b: Tensor, fused: bool) -> Trial:
    """Return a trial that adds a product to float32 sums, in one call of the library or in two."""
    sums = torch.zeros(a.shape[0], b.shape[1], device=a.device)

    def run() -> None:
        if fused:
            library_product(sums, a, b, True)
        else:
            sums.add_(torch.mm(a, b, out_dtype=torch.float32))

    def error() -> float:
        sums.zero_()
        run()
        truth = a[:JUDGED].double() @ b.double()
        return furthest(sums[:JUDGED], truth) / truth.abs().max().item()

    return Trial(run, error, 1e-4, tflop=2 * a.shape[0] * a.shape[1] * b.shape[1] / 1e12)


def _loop(V: int, H: int, tile: Tile, streams: int, graph: bool, device: str, N: int) -> Trial:
    """Return a trial that makes the logits of N rows in tiles, and folds each on the products' stream or on another."""
    x, weight = normal(device, N, H, dtype=torch.bfloat16), normal(device, V, H, dtype=torch.bfloat16, scale=3 / H**0.5)
    targets, state = torch.randint(V, (N,), device=device), _state(device, N)
    anchors, masses = torch.empty(2, N, dtype=torch.float64, device=device)
    rows = min(tile.rows, N)
    buffers = [torch.empty(rows, min(tile.columns, V), device=device) for _ in range(streams)]
    side = torch.cuda.Stream() if streams > 1 else None

    def run() -> None:
        made = [torch.cuda.Event() for _ in buffers] if side else []
        free = [torch.cuda.Event() for _ in buffers] if side else []
        count = 0
        for first in range(0, N, rows):
            part = slice(first, min(first + rows, N))
            for begin in range(0, V, tile.columns):
                i, end = count % streams, min(begin + tile.columns, V)
                z = buffers[i][: part.stop - first, : end - begin]
                if side and count >= streams:
                    torch.cuda.current_stream().wait_event(free[i])
                library_product(z, x[part], weight[begin:end].t(), False)
                if side:
                    made[i].record()
                    side.wait_event(made[i])
                with torch.cuda.stream(side) if side else contextlib.nullcontext():
                    triton_linear.fold(
                        z, None, targets[part], begin, *PLAIN, 0, state[:, part], anchors[part], masses[part], None
                    )
                    if side:
                        free[i].record()
                count += 1
        if side:
            torch.cuda.current_stream().wait_stream(side)

    def error() -> float:
        state.copy_(_state(device, N))
        call()
        z = x[:JUDGED].double() @ weight.double().T
        truth = z.gather(-1, targets[:JUDGED, None])[:, 0] - z.logsumexp(-1)
        return furthest(_logp(state[:, :JUDGED]), truth)

    call = captured(run) if graph else run
    # Timed by the clock, because the cost of the host matters here.
    return Trial(call, error, 1e-4, tflop=2 * N * V * H / 1e12, whole=True)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of a graph of `run`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _fused(V: int, H: int, dtype: torch.dtype, launch: launches.ProductLaunch, device: str, R: int) -> Trial:
    columns = V if device == "cuda" else min(V, 8192)  # a CPU compiles the kernel or rehearses it
    x, weight = normal(device, R, H, dtype=dtype), normal(device, columns, H, dtype=dtype, scale=3 / H**0.5)
    targets, state = torch.randint(columns, (R,), device=device), _state(device, R)

    def run() -> None:
        with mock.patch.object(launches, "product_launch", return_value=launch):
            product.product_fold(x, weight, None, targets, *PLAIN, 0, state, None)

    def error() -> float:
        state.copy_(_state(device, R))
        with poisoned():
            run()
        z = x[:JUDGED].double() @ weight.double().T
        truth = z.gather(-1, targets[:JUDGED, None])[:, 0] - z.logsumexp(-1)
        return furthest(_logp(state[:, :JUDGED]), truth)

    return Trial(run, error, 1e-4, tflop=2 * R * columns * H / 1e12)


def _fold_case(
    kernel: str, name: str, R: int, C: int, launch: launches.Launch, make: Callable[[str, int], Trial]
) -> Case:
    """Return a case that replaces the entry `name` of the launch table."""
    config, within = f"{launch.block}x{launch.warps} s{launch.stages}", functools.partial(replaced, (name, 4), launch)
    return Case("fold", kernel, "float32", R, C, 0, config, make, launches.ROWS[name, 4] == launch, within)


def cases(small: bool) -> Iterator[Case]:
    """Yield the variants, those of most value first; `small` ones for a machine without a GPU."""
    V, H = (8192 + 37, 32) if small else (128256, 4096)
    rows = (4,) if small else (4096, 1024)
    for R, C, stored, stats in itertools.product(rows, (4096,) if small else (4096, 16384), (True, False), (0, STATS)):
        kernel = "fold" + (", stored" if stored else "") + (", statistics" if stats else "")
        for launch in dict.fromkeys((launches.ROWS["fold", 4], *(LAUNCHES[:2] if small else LAUNCHES))):
            yield _fold_case(kernel, "fold", R, C, launch, functools.partial(_fold, C, stats, stored))
    for launch in dict.fromkeys((launches.ROWS["fold_backward", 4], *LAUNCHES[1:])):
        yield _fold_case(
            "fold_backward", "fold_backward", rows[0], 4096, launch, functools.partial(_fold_backward, 4096)
        )
    for name, make, sizes in (
        ("gradient of the head", functools.partial(_weight_gradient, V, H), (V, H)),
        ("hidden's gradient, a tile", functools.partial(_hidden_gradient, 4096, H), (4096, H)),
        ("hidden's gradient, whole V", functools.partial(_hidden_gradient, V, H), (V, H)),
    ):
        for fused in (True, False):
            config, trial = "addmm" if fused else "mm and add", functools.partial(make, fused)
            shape = ("bfloat16", rows[0], *sizes)
            yield Case("products", name, *shape, config, trial, fused, compiles=False, cuda=not fused)
    for N, tile, streams, graph in itertools.product(
        (4,) if small else (4096, 512), TILES[2:] if small else TILES, (1, 2), (False, True)
    ):
        if N < tile.rows < launches.TILE.rows:
            continue  # with only N rows, this is the same as another tile
        config = f"{min(tile.rows, N)}x{tile.columns}, {streams} stream{'s'[: streams - 1]}{', graph' * graph}"
        make, current = functools.partial(_loop, V, H, tile, streams, graph), (launches.TILE, 1, False)
        yield Case(
            *("tile loop", "product and fold", "bfloat16", N, V, H, config, make),
            current=(tile, streams, graph) == current,
            compiles=False,  # the cases of the fold compile its kernels
            cuda=streams > 1 or graph,
            graph=graph,
            profiled=False,
        )
    dtype = torch.float32 if small else torch.bfloat16  # the interpreter cannot multiply bfloat16
    for launch in FUSED[-1:] if small else FUSED:
        blocks = launch.blocks
        config = f"{blocks.block_m}x{blocks.block_n}x{blocks.block_k} w{blocks.warps} s{blocks.stages}"
        config += f" /{launch.width}{', descriptors' * launch.described}"
        columns, name = 256 if small else V, str(dtype).removeprefix("torch.")
        make = functools.partial(_fused, columns, H, dtype, launch)
        yield Case("product_fold", "product_fold", name, rows[0], columns, H, config, make)
