"""Memory that fastpref keeps between calls on a CPU."""

from __future__ import annotations

from fastpref._core.checks import check_int
from fastpref_kernels import ops


def release_memory(*, keep: int | None = None) -> None:
    """Release the memory that fastpref keeps on a CPU for later calls.

    Gradients and kept exponentials of 4 MiB and more reuse the memory of earlier ones that were freed, so that a
    training step does not wait for the operating system to provide zeroed pages. At most `keep` bytes are held for
    reuse, over all threads. A thread that computes from hidden states also keeps its tiles, some tens of MiB; this
    function releases those of the calling thread. Tensors in use are not affected. PyTorch manages the memory of a GPU.

    Args:
        keep: the most bytes to hold from now on. None leaves the limit as it is; at first it is 1 GiB.

    Returns:
        None.

    Raises:
        TypeError: `keep` is not an int.
        ValueError: `keep` is negative.
    """
    ops.release_memory(None if keep is None else check_int("keep", keep, least=0))
