"""The launch table: how the work of every Triton kernel is divided.

Launchers read their entry at every call and state no size of their own, so a benchmark that replaces an entry measures
exactly what a user would run with it. This module does not import Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastpref_kernels.linear.backend import Tile


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


class RowLaunch(NamedTuple):
    """How a forward kernel goes through rows of logits.

    Attributes:
        block: logits of one iteration.
        warps: warps of a program.
        stages: iterations whose loads are in flight at a time.
        segment_blocks: blocks of a segment.
        programs: programs that share a row.
    """

    block: int
    warps: int
    stages: int
    segment_blocks: int
    programs: int


class Blocks(NamedTuple):
    """How a matrix product is divided.

    Attributes:
        block_m: rows of a block.
        block_n: columns of a block.
        block_k: terms of a sum that are multiplied at a time.
        group_m: blocks of rows that go over the columns together, so that a cache holds what they share.
        stages: loads of `block_k` terms in flight.
        warps: warps of a program.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    stages: int
    warps: int


class ProductLaunch(NamedTuple):
    """How the fused product and fold is divided.

    Attributes:
        blocks: how the product is divided; `block_n` divides `contract.COLUMNS`.
        width: columns of a block that are folded at a time, `block_n` over a power of 2. Fewer columns take fewer
            registers.
        described: whether tensor descriptors load the blocks, where the operands allow it. NVIDIA's GPUs have a unit
            for that since compute capability 9.0, and other GPUs are slow at it. In float32 it takes more registers.
    """

    blocks: Blocks
    width: int
    described: bool = False


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
    # At least 64 KiB of loads in flight a multiprocessor, and few enough registers for nothing to spill.
    ("logprobs_forward", 2): Launch(4096, 4, 3),
    ("logprobs_forward", 4): Launch(2048, 2, 3),
    ("logprobs_forward", 8): Launch(2048, 8, 3),
    ("logprobs_statistics", 2): Launch(4096, 4, 3),
    ("logprobs_statistics", 4): Launch(2048, 2, 2),
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

# A row of logits is summed in at most SEGMENTS segments, so that as many programs can share it. All but the last have
# SHORTEST_SEGMENT logits or more: the end of a segment then costs a few percent of it.
SEGMENTS = 8
SHORTEST_SEGMENT = 16384

# Programs for each multiprocessor where rows of logits are few: with 8 KiB of loads each they have 64 KiB in flight.
PROGRAMS = 8

# Kernels on (B,), (B, K), (B, T) and (R, H) tensors. A block counts pairs, prompts x K, prompts x K x K, or tokens.
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
    # A block counts features of a row of hidden states.
    "row_dot": Launch(1024, 4),
    "row_copy": Launch(1024, 4),
}

# Rows and columns of a product of hidden states and the head, on a device with memory of its own.
TILE = Tile(rows=4096, columns=4096)

# Products over the rows that a filtered gradient keeps, by the bytes of an element. NVIDIA's tensor cores would round
# float32, so there the threads multiply, and the registers that this takes limit a block.
PICKED: dict[int, Blocks] = {
    2: Blocks(128, 128, 64, 8, 3, 8),
    4: Blocks(64, 32, 16, 8, 2, 4),
}

# (rows, columns, warps) of one step of the kernel that sums those rows for the gradient of a bias.
PICKED_SUMS = (16, 128, 4)

# Empty, because no GPU has measured the fused kernel yet: until one has, no shape takes it.
PRODUCTS: tuple[Measured, ...] = ()

# (pieces of columns, rows, warps) of one step of the kernel that adds up the pieces that the fused kernel folded.
COMBINE = (32, 32, 4)


def segment_blocks(V: int, block: int) -> int:
    """Return the blocks of a segment. They depend on V and the block alone, because they decide a row's bits."""
    return max(-(-V // (SEGMENTS * block)), SHORTEST_SEGMENT // block, 1)


def forward_launch(kernel: str, itemsize: int, rows: int, V: int, *, wide: bool, multiprocessors: int) -> RowLaunch:
    """Return how a forward kernel goes through rows of logits.

    Args:
        kernel: its name in `ROWS`.
        itemsize: bytes of a logit.
        rows: number of rows.
        V: logits of a row.
        wide: whether logits of a row are apart in memory.
        multiprocessors: those of the device.
    """
    block, warps, stages = ROWS[kernel, itemsize]
    if wide:
        block //= 4  # a lane is then one logit, and its maximum and sums take registers of their own
    length = segment_blocks(V, block)
    programs = row_programs(rows, -(-V // (length * block)), multiprocessors)
    return RowLaunch(block, warps, stages, length, programs)


def row_programs(rows: int, parts: int, multiprocessors: int) -> int:
    """Return how many programs share a row of `parts` parts: 1 if the rows alone fill the device.

    No program is left without a part.
    """
    wanted = min(parts, -(-PROGRAMS * multiprocessors // rows))
    return -(-parts // -(-parts // wanted))


def product_launch(device: str, dtype: torch.dtype, rows: int, features: int, vocabulary: int) -> ProductLaunch | None:
    """Return the fused kernel's launch for a chunk of rows, or None where a library's product and a fold are used."""
    for row in PRODUCTS:
        fits = rows in row.rows and features in row.features and vocabulary in row.vocabulary
        if fits and (device, dtype) == (row.device, row.dtype):
            return row.launch
    return None
