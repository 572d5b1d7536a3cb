"""The launch table: how the work of every Triton kernel is cut up.

Launchers read their entry at every call and state no size of their own, so a benchmark that replaces an entry measures
exactly what a user would run with it. This module does not import Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpref_kernels.linear import Tile


class Launch(NamedTuple):
    """How a program of a kernel works through its elements.

    Attributes:
        block: elements of one iteration.
        warps: warps of the program.
        stages: iterations whose loads are in flight at a time; 1 loads an element when it is used. Only the kernels of
            `ROWS` have a loop that this applies to.
    """

    block: int
    warps: int
    stages: int = 1


class ProductLaunch(NamedTuple):
    """How the fused product and fold is cut up.

    Attributes:
        block_m: rows of a block.
        block_n: columns of a block; it divides `fastpref_kernels.linear.COLUMNS`.
        block_k: terms of a sum that are multiplied at a time.
        group_m: blocks of rows that go over the columns together, so that a cache holds what they share.
        stages: loads of `block_k` terms in flight.
        warps: warps of a program.
        width: columns of a block that are folded at a time, `block_n` over a power of 2. Fewer columns take fewer
            registers where one warp holds all columns of a row.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    stages: int
    warps: int
    width: int


class Measured(NamedTuple):
    """Shapes at which the fused product and fold was measured to be faster than the product and fold it replaces.

    Attributes:
        device: the device's name, as PyTorch gives it.
        dtype: the dtype of hidden and weight.
        rows: rows of a chunk.
        features: H.
        vocabulary: V.
        launch: the fastest launch.
        measurement: the date, the driver, the version of Triton, and both times.
    """

    device: str
    dtype: torch.dtype
    rows: range
    features: range
    vocabulary: range
    launch: ProductLaunch
    measurement: str


# Kernels that go over rows, by the bytes of an element of the row.
ROWS: dict[tuple[str, int], Launch] = {
    # Enough loads in flight to cover the memory's latency with a few programs a multiprocessor, and few enough
    # registers for nothing to spill.
    ("logprobs_forward", 2): Launch(4096, 8),
    ("logprobs_forward", 4): Launch(4096, 4),
    ("logprobs_forward", 8): Launch(2048, 8),
    # A thread holds three more sums, and every block waits for its maximum: smaller programs, more of them.
    ("logprobs_statistics", 2): Launch(2048, 4),
    ("logprobs_statistics", 4): Launch(2048, 4),
    ("logprobs_statistics", 8): Launch(1024, 4),
    ("logprobs_backward", 2): Launch(4096, 4),
    ("logprobs_backward", 4): Launch(4096, 4),
    ("logprobs_backward", 8): Launch(2048, 8),
    # A tile's row is short, so what is done once a row is kept small: one warp reduces without a barrier, and few
    # columns are masked. With more columns a thread, the sums of every statistic would take too many registers.
    ("fold", 4): Launch(256, 1),
    ("fold", 8): Launch(128, 1),
    ("fold_backward", 4): Launch(1024, 2),
    ("fold_backward", 8): Launch(512, 2),
}

# Kernels on (B,), (B, K) and (B, T) tensors. A block counts pairs, prompts x K, prompts x K x K, or tokens.
SMALL: dict[str, Launch] = {
    "dpo": Launch(1024, 8),
    # Each pair is compared with all others, so many small programs share that.
    "order": Launch(64, 2),
    "kto": Launch(1024, 4),
    "pairwise_reward": Launch(1024, 4),
    "best_of_k": Launch(1024, 4),
    "ranking": Launch(1024, 4),
    # A prompt of more than 32 answers fills more than one block.
    "ranking_wide": Launch(1024, 8),
    "gae": Launch(1024, 4),
}

# Rows and columns of a product of hidden states and the head, on a device with memory of its own.
TILE = Tile(rows=4096, columns=4096)

# Empty, because no GPU has measured the fused kernel yet: until one has, no shape takes it.
PRODUCTS: tuple[Measured, ...] = ()

# (blocks of columns, rows, warps) of one step of the kernel that adds up the fused kernel's blocks.
COMBINE = (32, 32, 4)


def product_launch(device: str, dtype: torch.dtype, rows: int, features: int, vocabulary: int) -> ProductLaunch | None:
    """Return the fused kernel's launch for a chunk of rows, or None where a library's product and a fold are used."""
    for row in PRODUCTS:
        fits = rows in row.rows and features in row.features and vocabulary in row.vocabulary
        if fits and (device, dtype) == (row.device, row.dtype):
            return row.launch
    return None
