"""Memory that freed results leave for the next call."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch

import fastpref
from fastpref_kernels import cpu
from fastpref_kernels.cpu.linear import empty

MIB = 1 << 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    fastpref.release_memory(keep=64 * MIB)
    yield
    fastpref.release_memory(keep=1024 * MIB)


def kept() -> int:
    native = cpu.native()
    assert native is not None
    return native.kept_memory()


def test_freed_memory_is_used_again() -> None:
    first = empty((8 * MIB,), torch.uint8, CPU)
    place = first.data_ptr()
    assert place % (2 * MIB) == 0
    assert kept() == 0
    view = first[MIB:]
    del first
    assert kept() == 0, "a view still holds it"
    del view
    assert kept() == 8 * MIB
    # A little smaller will do; what is in use is nobody else's.
    again, other = empty((7, MIB), torch.uint8, CPU), empty((2 * MIB,), torch.float32, CPU)
    assert again.data_ptr() == place
    assert other.data_ptr() != place
    assert kept() == 0


def test_what_is_much_too_large_is_not_used() -> None:
    large = empty((32 * MIB,), torch.uint8, CPU)
    place = large.data_ptr()
    del large
    small = empty((8 * MIB,), torch.uint8, CPU)
    assert small.data_ptr() != place
    assert kept() == 32 * MIB


def test_small_memory_is_pytorchs() -> None:
    small = empty((MIB,), torch.uint8, CPU)
    del small
    assert kept() == 0


def freed(*sizes: int) -> None:
    blocks = [empty((size * MIB,), torch.uint8, CPU) for size in sizes]
    while blocks:
        del blocks[0]


def test_no_more_is_kept_than_is_allowed() -> None:
    freed(40, 20, 10)
    assert kept() == 30 * MIB, "the oldest makes room"
    freed(100)
    assert kept() == 30 * MIB, "what is more than may be kept at all does not"
    fastpref.release_memory()
    assert kept() == 0
    fastpref.release_memory(keep=0)
    freed(8)
    assert kept() == 0


def test_gradients_of_padded_logits_are_made_in_it() -> None:
    logits = torch.randn(1, 64, 20001, requires_grad=True)
    fastpref.token_logprobs(logits[..., :20000], torch.zeros(1, 64, dtype=torch.int64)).sum().backward()
    assert kept() >= 64 * 20000 * 4


def test_it_is_uninitialised_and_a_test_may_ask_for_nan() -> None:
    assert empty((2 * MIB,), torch.float32, CPU).isnan().all()
    assert empty((4 * MIB,), torch.bfloat16, CPU).isnan().all()


def test_a_tensor_of_it_can_be_resized_and_saved() -> None:
    tensor = empty((2 * MIB,), torch.float32, CPU).zero_()
    tensor.resize_(4 * MIB)
    assert (tensor[: 2 * MIB] == 0).all()
    assert torch.equal(tensor.clone()[:5], tensor[:5])


def test_freed_in_another_thread() -> None:
    held = [empty((8 * MIB,), torch.uint8, CPU)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert kept() == 8 * MIB


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_has_memory_of_its_own() -> None:
    block = empty((8 * MIB,), torch.uint8, CPU)
    block[5] = 1
    del block
    child = os.fork()
    if child == 0:  # one byte: OpenMP's threads are not there to fill more
        mine = empty((8 * MIB,), torch.uint8, CPU)
        mine[5] = 2
        del mine
        os._exit(0 if kept() == 8 * MIB else 1)
    assert os.waitpid(child, 0)[1] == 0
    torch.use_deterministic_algorithms(False)  # or it would be filled again
    assert empty((8 * MIB,), torch.uint8, CPU)[5] == 1


def test_gradients_are_made_in_it() -> None:
    hidden, weight = torch.randn(1, 8, 64, requires_grad=True), torch.randn(20000, 64, requires_grad=True)
    labels = torch.arange(8)[None]

    def step() -> int:
        weight.grad = None
        fastpref.linear_token_logprobs(hidden, weight, labels).sum().backward()
        assert weight.grad is not None
        return weight.grad.data_ptr()

    assert step() == step()
    logits = torch.randn(1, 64, 20000, requires_grad=True)
    for _ in range(2):
        logits.grad = None
        fastpref.token_logprobs(logits, torch.zeros(1, 64, dtype=torch.int64)).sum().backward()
        before = kept()
        assert logits.grad is not None
        del logits.grad
        assert kept() - before >= logits.nbytes


@pytest.mark.parametrize(("keep", "kind"), [(-1, ValueError), (1.5, TypeError)])
def test_refuses(keep: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"keep must .*got"):
        fastpref.release_memory(keep=keep)
