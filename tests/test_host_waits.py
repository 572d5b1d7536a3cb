"""The stand-in for a GPU does what a GPU does, and every wait for it is counted, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from tests.gpu_stand_in import DEVICE, DeviceTensor, on_gpu
from tests.host_waits import host_trace

pytest.importorskip("triton")


def values() -> Any:
    return on_gpu(torch.tensor([3.0, 0.0, 2.0, 5.0]))


def mask() -> Any:
    return on_gpu(torch.tensor([True, False, True, True]))


def places() -> Any:
    return on_gpu(torch.tensor([2, 0]))


def assign(x: Any, index: Any, value: Any) -> None:
    x[index] = value


def added(total: Any) -> None:
    narrow = total.bfloat16()
    torch.addmm(total, narrow, narrow, out_dtype=torch.float32, out=total)


WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: values()[0].item(),
    "int": lambda: int(places()[0]),
    "float": lambda: float(values()[0]),
    "bool": lambda: bool(values().any()),
    "if": lambda: 1 if (values() > 1).all() else 2,
    "is_nonzero": lambda: torch.is_nonzero(values()[0]),
    "equal": lambda: torch.equal(values(), values()),
    "allclose": lambda: torch.allclose(values(), values()),
    "a tensor as an index": lambda: range(9)[places()[0]],
    "slice up to a tensor": lambda: values()[: places()[0]],
    "split by a tensor's list": lambda: values().split([2, *places().tolist()]),
    "nonzero": lambda: values().nonzero(),
    "nonzero as tuple": lambda: values().nonzero(as_tuple=True),
    "where": lambda: torch.where(mask()),
    "argwhere": lambda: torch.argwhere(values()),
    "masked_select": lambda: values().masked_select(mask()),
    "index by a mask": lambda: values()[mask()],
    "assign a tensor by a mask": lambda: assign(values(), mask(), on_gpu(torch.ones(3))),
    "assign to columns of a mask": lambda: assign(values().view(2, 2), (slice(None), mask()[:2]), values()[:2, None]),
    "assign a number by places": lambda: assign(values(), places(), 1.0),
    "assign a number to one place": lambda: assign(values(), 1, 1.0),
    "index by the host's places": lambda: values()[torch.tensor([2, 0])],
    "index by a list": lambda: values()[[2, 0]],
    "unique": lambda: values().unique(),
    "unique_consecutive": lambda: values().unique_consecutive(),
    "isin": lambda: torch.isin(values(), values()),
    "bincount": lambda: torch.bincount(places()),
    "repeat_interleave": lambda: values()[:2].repeat_interleave(places()),
    "masked_fill with a tensor": lambda: values().masked_fill(mask(), values()[0]),
    "tolist": lambda: values().tolist(),
    "cpu": lambda: values().cpu(),
    "to the host": lambda: values().to("cpu"),
    "to the host in another dtype": lambda: values().to("cpu", torch.float64),
    "copied to the host": lambda: torch.empty(4).copy_(values()),
    "a tensor of a list": lambda: torch.tensor([1, 2], device=DEVICE),
    "a tensor of a number": lambda: torch.tensor(1, device=DEVICE),
    "as_tensor": lambda: torch.as_tensor([1, 2], device=DEVICE),
    "new_tensor": lambda: values().new_tensor([1.0]),
    "from the host": lambda: torch.ones(4).to(DEVICE),
    "copied from the host": lambda: values().copy_(torch.ones(4)),
}
NO_WAITS: dict[str, Callable[[], Any]] = {
    "arithmetic": lambda: (values() * 2 + values()).sum(),
    "a number of the host": lambda: values() + torch.tensor(2.0),
    "factories": lambda: (torch.zeros(3, device=DEVICE), torch.arange(3, device=DEVICE), values().new_full((2,), 1.0)),
    "where with numbers": lambda: torch.where(mask(), 0.0, values()),
    "masked_fill": lambda: values().masked_fill_(mask(), 0.0),
    "assign a number by a mask": lambda: assign(values(), mask(), 0.0),
    "assign a number to a slice": lambda: assign(values(), slice(1, 3), 0.0),
    "assign a tensor by places": lambda: assign(values(), places(), on_gpu(torch.ones(2))),
    "index by places": lambda: values()[places()],
    "index_add": lambda: values().index_add(0, places(), on_gpu(torch.ones(2))),
    "nonzero of a known number": lambda: torch.nonzero_static(values(), size=3),
    "repeat_interleave by a number": lambda: values().repeat_interleave(2),
    "repeat_interleave of a known size": lambda: values()[:2].repeat_interleave(places(), output_size=2),
    "sort, cumsum, bucketize": lambda: torch.bucketize(values().sort().values, values().cumsum(0)),
    "another dtype": lambda: values().to(torch.float64),
    "to where it is": lambda: values().to(DEVICE),
    "shapes": lambda: (values().shape, values().numel(), values().is_contiguous(), len(values()), values().stride()),
    "a copy that is not waited for": lambda: values().to("cpu", non_blocking=True),
    "a copy from pinned memory": lambda: torch.ones(3).pin_memory().to(DEVICE, non_blocking=True),
    "narrow operands": lambda: torch.mm(*[values().view(2, 2).bfloat16()] * 2, out_dtype=torch.float32),
    "narrow operands added": lambda: added(values().view(2, 2)),
    "the host's own": lambda: torch.ones(3).nonzero().tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_counted(name: str) -> None:
    with host_trace() as trace:
        WAITS[name]()
    assert len(trace.waits) == 1, trace.waits


@pytest.mark.parametrize("name", NO_WAITS)
def test_what_waits_for_nothing_is_not(name: str) -> None:
    with host_trace() as trace:
        NO_WAITS[name]()
    assert not trace.waits


def test_a_wait_is_told_with_its_line() -> None:
    with host_trace() as trace:
        bool(values().any())
    (wait,) = trace.waits
    assert wait.startswith("test_host_waits.py:")
    labels = on_gpu(torch.tensor([[1, 2, 3]]))
    with host_trace() as trace:
        fastpref.linear_token_logprobs(on_gpu(torch.ones(1, 3, 4)), on_gpu(torch.ones(9, 4)), labels)
    assert trace.waits
    assert all(wait.startswith("fastpref") for wait in trace.waits)


def test_a_device_tensor_is_taken_for_a_gpus() -> None:
    with host_trace():
        for tensor in (values(), values() + 1, torch.zeros(2, device="cuda"), values()[1:], torch.empty_like(values())):
            assert isinstance(tensor, DeviceTensor)
            assert tensor.is_cuda
            assert not tensor.is_cpu
            assert tensor.device == DEVICE
        assert not torch.zeros(2).is_cuda
        assert not values().cpu().is_cuda
    with pytest.raises(RuntimeError, match="outside of gpu_stand_in"):
        values() + 1


@pytest.mark.parametrize("options", [{"mode": "save"}, {"mode": "recompute"}, {"softcap": 9.0}])
def test_the_steps_that_are_counted_are_those_that_compute(options: dict[str, Any]) -> None:
    """So that no branch is counted that a GPU would not take."""
    leaves = [torch.randn(2, 5, 8), torch.randn(5000, 8), torch.randn(5000)]
    labels = torch.randint(5000, (2, 5))

    def run(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        hidden, weight, bias = (place(leaf.clone().requires_grad_()) for leaf in leaves)
        found = fastpref.linear_token_logprobs(hidden, weight, place(labels), bias, **options)
        found.sum().backward()
        grads = [tensor.grad for tensor in (hidden, weight, bias)]
        return [getattr(x, "numbers", x).detach() for x in (found, *grads)]

    with host_trace():
        found = run(on_gpu)
    for ours, wanted in zip(found, run(lambda tensor: tensor), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
