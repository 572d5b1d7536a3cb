"""What two ranks must agree on with one process. Run by torchrun, which test_two_ranks.py does once for all checks.

Every check is a function of the rank: it makes the whole problem from a seed, as the one process would, and asserts.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastpref
from fastpref import reference

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[..., None]) -> Callable[..., None]:
    CHECKS[function.__name__] = function
    return function


def over(**axes: list[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A check for every combination of values."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for values in itertools.product(*axes.values()):
            given = dict(zip(axes, values, strict=True))
            name = "-".join(str(value).removeprefix("torch.") for value in values)
            CHECKS[f"{function.__name__}[{name}]"] = lambda given=given: function(**given)
        return function

    return register


def parts(whole: Tensor, dim: int = 0) -> list[Tensor]:
    """As torch.chunk and DTensor cut: the last ranks' may be smaller, or empty."""
    size = -(-whole.shape[dim] // dist.get_world_size())
    return [whole.narrow(dim, min(r * size, whole.shape[dim]), max(0, min(size, whole.shape[dim] - r * size)))
            for r in range(dist.get_world_size())]  # fmt: skip


def own(whole: Tensor, dim: int = 0) -> Tensor:
    """This rank's part of a gradient or a parameter."""
    return parts(whole, dim)[dist.get_rank()].clone()


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Relative to the largest, as gradients are judged; and NaN nowhere."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    if not wanted.numel():
        return
    scale = wanted.double().abs().amax().clamp(min=1e-9)
    off = ((found.double() - wanted.double()).abs().amax() / scale).item()
    assert off <= tolerance, f"relative error {off:.2e}, allowed {tolerance:.0e}"


TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}


class Head:
    """Hidden states, head and labels of 2B sequences, the same on every rank."""

    def __init__(self, vocabulary: int, dtype: torch.dtype, *, bias: bool = True, spread: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(vocabulary)
        self.hidden = torch.randn(4, 9, 16, generator=generator, dtype=torch.float64).to(dtype)
        weight = torch.randn(vocabulary, 16, generator=generator, dtype=torch.float64) * spread
        self.weight, self.bias = weight.to(dtype), None
        if bias:
            self.bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(vocabulary, (4, 9), generator=generator)
        self.labels[:, :3] = -100
        self.upstream = torch.randn(4, 8, generator=generator, dtype=torch.float64)

    def leaves(self, place: Callable[[Tensor, int], Tensor]) -> list[Any]:
        """Hidden, weight and bias as leaves, the last two as `place` puts them."""
        tensors = [self.hidden.clone(), place(self.weight.clone(), 0)]
        if self.bias is not None:
            tensors.append(place(self.bias.clone(), 0))
        return [tensor.detach().requires_grad_() for tensor in tensors]


def by_group(whole: Tensor, dim: int) -> Tensor:
    return own(whole, dim)


def by_dtensor(whole: Tensor, dim: int) -> Any:
    return distribute_tensor(whole, mesh(), [Shard(dim)])


WAYS = {"group": by_group, "dtensor": by_dtensor}


def options_of(way: str) -> dict[str, Any]:
    return {"process_group": dist.group.WORLD} if way == "group" else {}


def local(gradient: Any) -> Tensor:
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def compare(problem: Head, way: str, run: Callable[..., Any], tolerance: float) -> None:
    """Hold `run(hidden, weight, bias, **options)`, a tuple whose first is differentiated, against one process's."""
    found_leaves, wanted_leaves = problem.leaves(WAYS[way]), problem.leaves(lambda whole, dim: whole)
    found = run(*found_leaves, *[None] * (3 - len(found_leaves)), **options_of(way))
    wanted = run(*wanted_leaves, *[None] * (3 - len(wanted_leaves)))
    for a, b in zip(found, wanted, strict=True):
        close(a, b, tolerance)
    upstream = torch.linspace(0.5, 1.5, wanted[0].numel(), dtype=wanted[0].dtype).view(wanted[0].shape)
    found[0].backward(upstream)
    wanted[0].backward(upstream)
    close(found_leaves[0].grad, wanted_leaves[0].grad, tolerance)
    for a, b in zip(found_leaves[1:], wanted_leaves[1:], strict=True):
        close(local(a.grad), own(b.grad), tolerance)


# Two ranks divide none of these; of 1 the second holds nothing; 9001 are several tiles of columns.
@over(way=list(WAYS), dtype=list(TOLERANCE), vocabulary=[1, 5, 77, 9001], mode=["save", "recompute"])
def linear_token_logprobs(way: str, dtype: torch.dtype, vocabulary: int, mode: str) -> None:
    problem = Head(vocabulary, dtype)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, **group: Any) -> Any:
        made = fastpref.linear_token_logprobs(
            hidden, weight, problem.labels, bias, mode=mode, stats=("lse", "mean_logits", "log_sum_sq_probs"), **group
        )
        return made.logprobs, made.lse, made.mean_logits, made.log_sum_sq_probs

    compare(problem, way, run, TOLERANCE[dtype])


@over(way=list(WAYS), vocabulary=[5, 9001])
def entropy_and_its_gradient(way: str, vocabulary: int) -> None:
    problem = Head(vocabulary, torch.float32)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, **group: Any) -> Any:
        made = fastpref.linear_token_logprobs(
            hidden, weight, problem.labels, bias, stats=("entropy", "is_top1"), softcap=4.0, temperature=0.7, **group
        )
        scores = problem.upstream.float()
        return (made.logprobs * scores).sum() + (made.entropy * scores.flip(0)).sum(), made.entropy, made.is_top1

    compare(problem, way, run, 2e-6)


@over(way=list(WAYS), reduction=["sum", "mean"], packed=[False, True])
def linear_sequence_logprobs(way: str, reduction: str, packed: bool) -> None:
    problem = Head(300, torch.float32)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, **group: Any) -> Any:
        labels, boundaries = problem.labels, None
        if packed:
            hidden, labels = hidden.flatten(0, 1), labels.flatten()
            boundaries = torch.tensor([0, 7, 18, 18, 36])
        return (
            fastpref.linear_sequence_logprobs(
                hidden, weight, labels, bias, reduction=reduction, cu_seqlens=boundaries, ld_alpha=0.3, **group
            ),
        )

    compare(problem, way, run, 1e-6)


@over(way=list(WAYS), side=["here", "there"])
def far_labels_and_sure_ones(way: str, side: str) -> None:
    """Each rank's columns 130 above or below the other's, in both modes, and a log-prob near 0."""
    problem = Head(64, torch.float32, spread=0.1)
    problem.bias = torch.zeros(64)
    problem.bias[slice(0, 32) if side == "here" else slice(32, 64)] = 130.0
    problem.labels[:, 3:6] = 3
    problem.labels[:, 6:] = 40
    problem.bias[40] = 150.0
    for mode in ("save", "recompute"):

        def run(hidden: Tensor, weight: Tensor, bias: Tensor, mode: str = mode, **group: Any) -> Any:
            made = fastpref.linear_token_logprobs(
                hidden, weight, problem.labels, bias, mode=mode, stats=("lse", "entropy"), **group
            )
            return made.logprobs, made.lse, made.entropy + 1  # near 0, its digits are not those of one process

        compare(problem, way, run, 1e-6)
        logps, _, entropy = run(
            problem.hidden, own(problem.weight), own(problem.bias), process_group=dist.group.WORLD
        )  # fmt: skip
        exact = reference.linear_token_logprobs(
            problem.hidden.double(), problem.weight.double(), problem.labels, problem.bias.double(), stats=("entropy",)
        )
        torch.testing.assert_close(entropy.double() - 1, exact.entropy, rtol=0, atol=2e-7)
        sure = (exact.logprobs < 0) & (exact.logprobs > -1e-3)
        assert sure.any()
        assert (exact.logprobs < -19).any()
        torch.testing.assert_close(logps[sure].double(), exact.logprobs[sure], rtol=2e-5, atol=0)


@over(way=list(WAYS), mode=["auto", "save", "recompute"], loss_type=["sigmoid", "orpo", "aot"])
def linear_dpo_loss(way: str, mode: str, loss_type: str) -> None:
    problem = Head(501, torch.float32)
    chunk_rows = 16 if mode == "auto" else None  # more chunks than one, so that gradients are made in the forward

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, **group: Any) -> Any:
        reference = problem.weight.flip(0)
        if len(weight) < len(reference) or hasattr(weight, "to_local"):
            reference = WAYS[way](reference, 0)
        out = fastpref.linear_dpo_loss(
            hidden, weight, problem.labels, bias=bias, ref_hidden=problem.hidden.flip(0) / 2,
            ref_weight=reference, loss_type=loss_type, mode=mode, chunk_rows=chunk_rows,
            stats=("mean_logits",), **group,
        )  # fmt: skip
        return tuple(out)

    compare(problem, way, run, 2e-6)


@over(way=list(WAYS))
def linear_preference_loss(way: str) -> None:
    problem = Head(501, torch.float32, bias=False)
    ranks = torch.tensor([[2, 0, 3, 1]])

    def losses(logps: Tensor) -> Tensor:
        return fastpref.plackett_luce_loss(logps, ranks, reduction="none")

    def run(hidden: Tensor, weight: Tensor, bias: None, **group: Any) -> Any:
        out = fastpref.linear_preference_loss(
            hidden, weight, problem.labels, losses, group_size=4, chunk_rows=64, **group
        )
        return tuple(out)

    compare(problem, way, run, 2e-6)


@over(way=list(WAYS), dtype=list(TOLERANCE), vocabulary=[1, 5, 77, 9001], inplace=[False, True])
def token_logprobs(way: str, dtype: torch.dtype, vocabulary: int, inplace: bool) -> None:
    problem = Head(vocabulary, dtype)
    stats = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    whole = (problem.hidden.float() @ problem.weight.float().T).to(dtype)
    found_leaf, wanted_leaf = (
        place(whole.clone(), 2).detach().requires_grad_() for place in (WAYS[way], lambda whole, dim: whole)
    )
    results = []
    for leaf, group in ((found_leaf, options_of(way)), (wanted_leaf, {})):
        made = fastpref.token_logprobs(
            leaf * 1.0, problem.labels, stats=stats, softcap=30.0, logit_scale=0.5, inplace_backward=inplace, **group
        )
        scores = problem.upstream.to(made.logprobs.dtype)
        ((made.logprobs * scores).sum() + (made.entropy * scores.flip(0)).sum()).backward()
        results.append(made)
    for a, b in zip(*results, strict=True):
        close(a, b, max(1e-6, TOLERANCE[dtype]) if dtype != torch.bfloat16 else 2e-6)
    close(local(found_leaf.grad), own(wanted_leaf.grad, 2), max(2e-6, TOLERANCE[dtype]))


@over(way=list(WAYS), reduction=["sum", "mean"])
def sequence_logprobs(way: str, reduction: str) -> None:
    problem = Head(77, torch.float32)
    whole = problem.hidden @ problem.weight.T
    leaves = [place(whole.clone(), 2).detach().requires_grad_() for place in (WAYS[way], lambda whole, dim: whole)]
    found, wanted = (
        fastpref.sequence_logprobs(leaf, problem.labels, reduction=reduction, ld_alpha=0.4, **group)
        for leaf, group in zip(leaves, (options_of(way), {}), strict=True)
    )
    close(found, wanted, 1e-6)
    for result in (found, wanted):
        fastpref.dpo_loss(*result.chunk(2), *torch.zeros(4).chunk(2)).loss.backward()
    close(local(leaves[0].grad), own(leaves[1].grad, 2), 1e-6)


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, function in CHECKS.items():
        try:
            function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
            Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(results))
        failed = torch.tensor(float(bool(results[name])))
        dist.all_reduce(failed)  # a rank that failed has left its collectives, and the others with them
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(results))
    # What holds a group at the interpreter's end is torn down after the threads that serve it: now and then it aborts.
    mesh.cache_clear()
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def names() -> Iterator[str]:
    yield from CHECKS


if __name__ == "__main__":
    main(sys.argv[1])
