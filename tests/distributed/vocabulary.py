"""A vocabulary over two ranks, by process group and by DTensor, against all of it in one process."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import close, main, mesh, over, own
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

import fastpref
from fastpref import reference
from fastpref_kernels.cpu import linear as cpu_linear

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
        """Return hidden, weight and bias as leaves, the last two as `place` puts them."""
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
    """Hold `run(hidden, weight, bias, **options)`, whose first result is differentiated, against one process."""
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


STATS = ("lse", "mean_logits", "log_sum_sq_probs", "top2_margin")


# Two ranks divide none of these; of 1 the second holds nothing; 9001 are several tiles of columns.
@over(way=list(WAYS), dtype=list(TOLERANCE), vocabulary=[1, 5, 77, 9001], mode=["save", "recompute"])
def linear_token_logprobs(way: str, dtype: torch.dtype, vocabulary: int, mode: str) -> None:
    problem = Head(vocabulary, dtype)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, **group: Any) -> Any:
        made = fastpref.linear_token_logprobs(hidden, weight, problem.labels, bias, mode=mode, stats=STATS, **group)
        return made.logprobs, made.lse, made.mean_logits, made.log_sum_sq_probs, made.top2_margin

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
    """The columns of one rank lie 130 above those of the other, in both modes, and one log-prob is near 0."""
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
        logps, _, entropy = run(problem.hidden, own(problem.weight), own(problem.bias), process_group=dist.group.WORLD)
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
            hidden,
            weight,
            problem.labels,
            bias=bias,
            ref_hidden=problem.hidden.flip(0) / 2,
            ref_weight=reference,
            loss_type=loss_type,
            mode=mode,
            chunk_rows=chunk_rows,
            stats=("mean_logits",),
            **group,
        )
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


@over(way=list(WAYS), dtype=list(TOLERANCE), vocabulary=[1, 5, 77, 9001])
def token_logprobs(way: str, dtype: torch.dtype, vocabulary: int) -> None:
    from_logits(way, dtype, vocabulary, False)


@over(dtype=list(TOLERANCE), vocabulary=[1, 5, 77])
def token_logprobs_in_place(dtype: torch.dtype, vocabulary: int) -> None:
    from_logits("group", dtype, vocabulary, True)
    split = by_dtensor(torch.randn(4, 9, vocabulary), 2) * 1.0
    labels = Head(vocabulary, dtype).labels
    with pytest.raises(ValueError, match="got a DTensor"):
        fastpref.token_logprobs(split, labels, inplace_backward=True)


def from_logits(way: str, dtype: torch.dtype, vocabulary: int, inplace: bool) -> None:
    problem = Head(vocabulary, dtype)
    stats = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "top2_margin")
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
    """`reference` takes the same arguments and returns the same values and gradients."""
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


@over(form=["logits", "linear", "loss"], scored=["none", "one rank's", "no rows"])
def few_rows_or_none(form: str, scored: str) -> None:
    """A batch may have no scored label, labels of one rank only, or no sequence."""
    problem = Head(77, torch.float32)
    labels = problem.labels.clone()
    labels[:] = torch.where(labels == -100, -100, 70) if scored == "one rank's" else -100
    kept = slice(0, 0 if scored == "no rows" else 4)
    results = []
    for place, group in ((by_group, options_of("group")), (lambda whole, dim: whole, {})):
        hidden, weight, bias = leaves = problem.leaves(place)
        rows = hidden[kept]
        if form == "logits":
            leaves = [place(problem.hidden @ problem.weight.T, 2).detach().requires_grad_()]
            loss = fastpref.token_logprobs(leaves[0][kept], labels[kept], stats=("entropy",), **group).logprobs.sum()
        elif form == "linear":
            loss = fastpref.linear_sequence_logprobs(rows, weight, labels[kept], bias, **group).sum()
        else:
            options: dict[str, Any] = {"bias": bias, "reference_free": True, "chunk_rows": 16, **group}
            loss = fastpref.linear_dpo_loss(rows, weight, labels[kept], **options).loss
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    found, wanted = results
    close(found[0], wanted[0], 1e-6)
    for number, (a, b) in enumerate(zip(found[1:], wanted[1:], strict=True)):
        close(a, own(b, 2) if form == "logits" else own(b) if number else b, 2e-6)


@over(trained=["hidden", "weight", "bias", "none"])
def only_what_is_trained(trained: str) -> None:
    """A frozen head and frozen hidden states get no gradient, and no rank waits for one."""
    problem = Head(77, torch.float32)
    for function in (fastpref.linear_sequence_logprobs, functools.partial(fastpref.linear_dpo_loss, chunk_rows=16)):
        results = []
        for place, group in ((by_group, options_of("group")), (lambda whole, dim: whole, {})):
            hidden, weight, bias = leaves = problem.leaves(place)
            for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True):
                leaf.requires_grad_(name == trained)
            extra = {} if function is fastpref.linear_sequence_logprobs else {"reference_free": True}
            value = function(hidden, weight, problem.labels, bias=bias, **extra, **group)
            value = (value if isinstance(value, Tensor) else value.loss).sum()
            assert value.requires_grad == (trained != "none")
            if value.requires_grad:
                value.backward()
            results.append([leaf.grad for leaf in leaves])
        for number, (a, b) in enumerate(zip(*results, strict=True)):
            assert (a is None) == (b is None)
            if a is not None:
                close(a, own(b) if number else b, 2e-6)


@over(ignore_index=[0, 76])
def an_ignored_label_within_the_vocabulary(ignore_index: int) -> None:
    problem = Head(77, torch.float32)
    problem.labels[:, :3] = ignore_index
    options = {"ignore_index": ignore_index}

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, **group: Any) -> Any:
        return (fastpref.linear_token_logprobs(hidden, weight, problem.labels.int(), bias, **options, **group),)

    compare(problem, "group", run, 1e-6)
    whole = problem.hidden @ problem.weight.T
    found = fastpref.token_logprobs(own(whole, 2), problem.labels.int(), **options, **options_of("group"))
    close(found, fastpref.token_logprobs(whole, problem.labels.int(), **options), 1e-6)


@over(offset=[-1000.0, 0.0, 300.0, 1000.0], form=["logits", "linear"])
def a_common_offset_costs_no_digits(offset: float, form: str) -> None:
    """A common offset of the logits costs sure and unsure labels no digits."""
    problem = Head(78, torch.float32, spread=0.2)
    problem.bias = torch.full((78,), offset)
    problem.bias[[5, 60]] += 14.0
    problem.labels[:, 3:] = torch.tensor([5, 60, 7])[torch.arange(24).view(4, 6) % 3]
    z = torch.nn.functional.linear(problem.hidden, problem.weight, problem.bias)
    stats, group = {"stats": ("entropy",)}, options_of("group")
    if form == "logits":
        exact = reference.token_logprobs(z.double(), problem.labels, **stats)
        found = fastpref.token_logprobs(own(z, 2), problem.labels, **stats, **group)
        plain = fastpref.token_logprobs(own(z, 2), problem.labels, **group)
        one = fastpref.token_logprobs(z, problem.labels, **stats)
    else:
        wide = (problem.hidden.double(), problem.weight.double(), problem.labels, problem.bias.double())
        exact = reference.linear_token_logprobs(*wide, **stats)
        rows = (problem.hidden, own(problem.weight), problem.labels, own(problem.bias))
        found = fastpref.linear_token_logprobs(*rows, **stats, **group)
        plain = fastpref.linear_token_logprobs(*rows, **group)
        one = fastpref.linear_token_logprobs(problem.hidden, problem.weight, problem.labels, problem.bias, **stats)

    def off(values: Tensor, truth: Tensor) -> float:
        return (values.double() - truth).abs().max().item()

    allowed = 2 * off(one.logprobs, exact.logprobs) + 1e-6
    assert off(found.logprobs, exact.logprobs) <= allowed
    assert off(plain, exact.logprobs) <= allowed
    assert off(found.entropy, exact.entropy) <= 2 * off(one.entropy, exact.entropy) + 1e-6
    if form == "logits":  # a product's own rounding is the linear form's
        assert allowed < 6e-6


@over(first=[0.8, 0.2], form=["linear", "loss"])
def parts_of_any_number_of_columns(first: float, form: str) -> None:
    """One rank holds four fifths of the columns. Both plan the same chunks, by the bytes of the larger part."""
    problem = Head(1000, torch.float32)
    assert problem.bias is not None
    cut = int(1000 * first)
    mine = slice(0, cut) if dist.get_rank() == 0 else slice(cut, 1000)
    results = []
    with mock.patch.object(cpu_linear, "LOSS_BYTES", 14 * 800 * 4):
        for part, group in ((mine, options_of("group")), (slice(0, 1000), {})):
            leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight[part], problem.bias[part])]
            hidden, weight, bias = leaves
            if form == "linear":
                loss = fastpref.linear_sequence_logprobs(hidden, weight, problem.labels, bias, **group).sum()
            else:
                options: dict[str, Any] = {"bias": bias, "reference_free": True, **group}
                loss = fastpref.linear_dpo_loss(hidden, weight, problem.labels, **options).loss
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    found, (loss, d_hidden, d_weight, d_bias) = results
    for a, b in zip(found, (loss, d_hidden, d_weight[mine], d_bias[mine]), strict=True):
        close(a, b, 2e-6)


@over(mode=["save", "recompute"])
def columns_that_are_left_out(mode: str) -> None:
    """The statistic tells the mass that filter_eps drops in all parts, which the gradient lacks."""
    problem = Head(20000, torch.float32, bias=False, spread=3.0)
    eps, halves = 1e-3, (slice(0, 10000), slice(10000, 20000))
    z = (problem.hidden.double() @ problem.weight.double().T)[:, :-1]
    p, targets = z.softmax(-1), problem.labels[:, 1:]
    scored = targets != -100
    of_label = p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    kept = torch.zeros_like(p, dtype=torch.bool)
    for half in halves:
        for begin in range(half.start, half.stop, 4096):
            tile = slice(begin, min(begin + 4096, half.stop))
            has_label = (targets >= tile.start) & (targets < tile.stop)
            others = p[..., tile].sum(-1) - torch.where(has_label, of_label, 0.0)
            kept[..., tile] = ((others >= eps) | has_label)[..., None]
    dropped = (p * ~kept).sum(-1).masked_fill(~scored, 0.0)
    assert (dropped > 0).any()
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight[halves[dist.get_rank()]].clone()
    options: dict[str, Any] = {"filter_eps": eps, "mode": mode, "stats": ("dropped_mass",), **options_of("group")}
    made = fastpref.linear_token_logprobs(hidden, weight, problem.labels, **options)
    torch.testing.assert_close(made.dropped_mass.double(), dropped, rtol=1e-4, atol=1e-7)
    made.logprobs.sum().backward()
    one_hot = torch.nn.functional.one_hot(targets.clamp(min=0), 20000).double()
    assert hidden.grad is not None
    close(hidden.grad[:, :-1].double(), ((one_hot - p) * kept * scored[..., None]) @ problem.weight.double(), 1e-4)


@over()
def the_first_of_equal_logits_is_the_top() -> None:
    """A label is the top if no earlier column equals it, on its own rank or another."""
    logits = torch.zeros(1, 6, 8)
    for row, columns in enumerate(([2, 6], [6, 7], [], [2, 6], [6, 7], [1, 6])):
        logits[0, row, columns] = 1.0
    labels = torch.tensor([[2, 6, 0, 6, 7, 6]])
    for options in ({}, {"softcap": 0.01, "temperature": 3.0}):
        found = fastpref.token_logprobs(
            own(logits, 2), labels, shift=False, stats=("is_top1",), **options, **options_of("group")
        )
        assert found.is_top1.tolist() == [[True, True, True, False, False, False]]


@over(form=["logits", "hidden"])
def the_two_largest_logits_lie_on_either_rank(form: str) -> None:
    """The margin of rows whose two largest logits are on one rank, on both, equal, or next to -inf and NaN alone."""
    rows = torch.full((1, 7, 8), -1.0)
    for row, values in enumerate(
        ({1: 5.0, 2: 3.0}, {6: 5.0, 7: 4.5}, {0: 5.0, 7: 2.0}, {3: 5.0, 4: 5.0}, {2: 5.0, 3: 5.0})
    ):
        for column, value in values.items():
            rows[0, row, column] = value
    rows[0, 5, 1:] = -torch.inf
    rows[0, 6, 5] = torch.nan
    labels = torch.tensor([[1, 0, 7, 3, 3, 0, 2]])
    options = {"shift": False, "stats": ("top2_margin",), **options_of("group")}
    if form == "logits":
        found = fastpref.token_logprobs(own(rows, 2), labels, **options)
    else:  # the identity's products are the head's columns
        found = fastpref.linear_token_logprobs(
            torch.eye(7)[None], own(rows[0].nan_to_num(-9.0).T.contiguous()), labels, **options
        )
    margins = found.top2_margin[0].tolist()
    assert margins[:5] == [2.0, 0.5, 3.0, 0.0, 0.0]
    if form == "logits":
        assert margins[5] == math.inf
        assert math.isnan(margins[6])


@over(form=["hidden", "permuted", "labels", "lengths", "logits"])
def ranks_that_differ_are_told(form: str) -> None:
    """Ranks whose hidden states or labels differ in value, order or number are told so before their sums are mixed."""
    group, rank = dist.new_group(), dist.get_rank()  # of its own: each group is looked at once
    generator = torch.Generator().manual_seed(rank if form == "hidden" else 0)
    hidden = torch.randn(8, 256, 64, generator=generator)
    labels = torch.randint(78, (8, 256), generator=torch.Generator().manual_seed(1))
    if form == "permuted":
        hidden = hidden.roll(rank, 0)
    if form in ("labels", "logits"):
        labels[3, 7] = rank
    if form == "lengths":
        hidden, labels = hidden[:, : 256 - rank], labels[:, : 256 - rank]
    call = functools.partial(fastpref.linear_token_logprobs, hidden, torch.randn(39, 64))
    if form == "logits":
        call = functools.partial(fastpref.token_logprobs, torch.zeros(8, 256, 39))
    with pytest.raises(ValueError, match="differ from rank to rank"):
        call(labels, process_group=group)


@over(value=[-torch.inf, torch.inf, torch.nan], where=["here", "there", "everywhere"])
def logits_that_are_no_numbers(value: float, where: str) -> None:
    """A shard of only −inf changes nothing, and a NaN is a NaN on every rank, as in one process."""
    problem = Head(78, torch.float32)
    problem.labels[:, 3:] = 5
    whole = problem.hidden @ problem.weight.T
    columns = {"here": slice(0, 39), "there": slice(39, 78), "everywhere": slice(0, 78, 3)}[where]
    whole[:, 4:, columns] = value
    leaves = [part.detach().clone().requires_grad_() for part in (own(whole, 2), whole)]
    found, wanted = (
        fastpref.token_logprobs(leaf, problem.labels, **group)
        for leaf, group in zip(leaves, (options_of("group"), {}), strict=True)
    )
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)
    usable = torch.isfinite(wanted)
    assert usable.any()
    for result in (found, wanted):
        result[usable].sum().backward()
    torch.testing.assert_close(leaves[0].grad, own(leaves[1].grad, 2), equal_nan=True, rtol=1e-5, atol=1e-6)


def payload(run: Callable[[], Any]) -> int:
    """Return the bytes that a call gives to all-reduces."""
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
    """24 bytes a row, the gradient of hidden states in float32, and so much for each statistic.

    The rows are those that are scored, of logits all.
    """
    problem = Head(77, torch.bfloat16)
    scored, features = problem.labels[:, 1:] != -100, problem.hidden.shape[-1]
    rows = scored.numel() if form == "logits" else int(scored.sum())
    top1 = 24 if form == "logits" else 16
    margin = 24 if form == "logits" else 16
    costs = {"entropy": 8, "mean_logits": 8, "log_sum_sq_probs": 8, "is_top1": top1, "top2_margin": margin}
    stats = costs if statistics else {}
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
