"""A vocabulary over two ranks, by process group and by DTensor, against all of it in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import close, main, mesh, over, own
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

import fastpref
from fastpref import reference

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


@over(way=list(WAYS), form=["logits", "linear", "sequences", "loss"])
def the_definition_of_a_split_vocabulary(way: str, form: str) -> None:
    """`reference` takes the same arguments, and gives the same; so do its gradients."""
    problem = Head(77, torch.float64)
    group, ref = options_of(way), torch.zeros(4, dtype=torch.float64).chunk(2)
    results = []
    for library in (fastpref, reference):
        hidden, weight, bias = leaves = problem.leaves(WAYS[way])
        if form == "logits":
            whole = problem.hidden @ problem.weight.T
            leaves = [WAYS[way](whole, 2).detach().requires_grad_()]
            value = library.token_logprobs(leaves[0], problem.labels, **group)
        elif form == "linear":
            value = library.linear_token_logprobs(hidden, weight, problem.labels, bias, **group)
        elif form == "sequences":
            value = library.linear_sequence_logprobs(hidden, weight, problem.labels, bias, **group)
        else:
            value = library.linear_dpo_loss(hidden, weight, problem.labels, *ref, bias=bias, **group).loss
        value.backward(torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape))
        results.append([value.detach(), *(local(leaf.grad) for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-12)


def payload(run: Callable[[], Any]) -> int:
    """Bytes that a call gives to all-reduces."""
    found, reduce = 0, dist.all_reduce

    def all_reduce(values: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal found
        found += values.nbytes
        return reduce(values, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        run()
    finally:
        dist.all_reduce = reduce
    return found


@over(form=["logits", "linear", "loss"], statistics=[False, True])
def what_travels_is_what_the_documentation_says(form: str, statistics: bool) -> None:
    """24 bytes a scored row, the gradient of hidden states in float32, and so much for each statistic."""
    problem = Head(77, torch.bfloat16)
    rows, features = int((problem.labels[:, 1:] != -100).sum()), problem.hidden.shape[-1]
    stats = {"entropy": 8, "mean_logits": 8, "log_sum_sq_probs": 8, "is_top1": 16} if statistics else {}
    leaves = problem.leaves(by_group)
    logits = (problem.hidden @ own(problem.weight).T).requires_grad_()
    group, ref = {"process_group": dist.group.WORLD}, torch.zeros(4).chunk(2)

    def run() -> None:
        if form == "logits":
            out = fastpref.token_logprobs(logits, problem.labels, stats=tuple(stats), **group)
        elif form == "linear":
            out = fastpref.linear_token_logprobs(*leaves[:2], problem.labels, leaves[2], stats=tuple(stats), **group)
        else:
            out = fastpref.linear_dpo_loss(
                *leaves[:2], problem.labels, *ref, bias=leaves[2], stats=tuple(stats), chunk_rows=16, **group
            ).loss
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    run()  # once for each group, what the ranks give is compared
    wanted = rows * (24 + sum(stats.values())) + (0 if form == "logits" else 4 * rows * features)
    assert payload(run) == wanted


if __name__ == "__main__":
    main()
