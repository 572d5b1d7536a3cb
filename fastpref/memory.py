"""Memory that fastpref keeps between calls on a CPU."""

from __future__ import annotations

from fastpref._checks import check_int
from fastpref_kernels import ops


def release_memory(*, keep: int | None = None) -> None:
    """Give back the memory that calls on a CPU have kept for their next.

    Gradients and kept exponentials of 4 MiB and more are made in memory that earlier ones have freed, so that a step
    of training does not wait for the operating system to hand out zeroed pages. At most `keep` bytes lie ready so, in
    all threads; a thread that works on hidden states also keeps its tiles, some tens of MiB, which are given back if it
    is the one that calls. Tensors in use are left alone. A GPU's memory is PyTorch's to keep.

    Args:
        keep: from now on hold at most so many bytes; None: as many as before, at first 1 GiB.

    Returns:
        None.

    Raises:
        TypeError: `keep` is not an int.
        ValueError: `keep` is negative.
    """
    ops.release_memory(None if keep is None else check_int("keep", keep, least=0))
