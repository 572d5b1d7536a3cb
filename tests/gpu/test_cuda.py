"""The public functions on CUDA tensors: dispatch, autograd, compilation, capture, launches and synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.cli.check.report import describe
from fastpref.cli.check.run import run
from fastpref.losses import TABLE, Loss
from fastpref.testing.case import DTYPES
from fastpref.testing.product_cases import product_cases
from tests.synchronisation import no_synchronisation
from tests.tolerance import assert_matches_reference

pytestmark = pytest.mark.usefixtures("unpoisoned")
_Results = TypeVar("_Results")
every_loss = pytest.mark.parametrize("loss", TABLE, ids=lambda loss: loss.name)


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    labels = torch.randint(shape[-1], shape[:-1], device="cuda")
    labels[..., 1] = -100
    return (3 * torch.randn(shape, device="cuda")).to(dtype), labels


def step(logits: Tensor, labels: Tensor) -> Tensor:
    """A DPO loss of [chosen; rejected] logits, against a reference of zeros."""
    chosen, rejected = fastpref.sequence_logprobs(logits, labels).chunk(2)
    return fastpref.dpo_loss(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(rejected)).loss


def arguments(loss: Loss, batch: int) -> tuple[list[Tensor], dict[str, Any]]:
    tensors, options = loss.example(torch.Generator().manual_seed(batch), batch)
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    return [t.cuda().requires_grad_(t.is_floating_point()) for t in tensors], {**loss.options, **moved}


def launches(function: Callable[[], object]) -> int:
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def captured(call: Callable[[], _Results]) -> tuple[torch.cuda.CUDAGraph, _Results]:
    """Return a graph of a call, and its results in the memory that a replay writes to."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [50257, 128256])
def test_real_vocabularies(vocabulary: int, dtype: torch.dtype) -> None:
    logits, labels = make(2, 9, vocabulary, dtype=dtype)
    assert_matches_reference("token_logprobs", logits, labels)
    assert_matches_reference("sequence_logprobs", logits, labels, reduction="mean", stats=("entropy",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_every_layout_and_size(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    cases = [case for case in product_cases() if case.runs_on(device) and dtype in case.dtypes]
    assert cases
    wrong = [describe(result) for case in cases for result in run(case, device, dtype) if result.fault is not None]
    assert not wrong


@every_loss
def test_loss(loss: Loss) -> None:
    results = []
    for function in (loss.function, loss.reference):
        tensors, options = arguments(loss, 37)
        result = function(*tensors, **options)
        value = result.loss if isinstance(result, tuple) else result
        value.backward()
        gradients = (torch.zeros_like(t) if t.grad is None else t.grad for t in tensors if t.requires_grad)
        results.append([value.detach(), *gradients])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


def both_ways(loss: Loss, batch: int) -> Callable[[], tuple[Tensor, ...]]:
    """The loss and its gradients from a gradient that is there, as one in the middle of a graph is."""
    tensors, options = arguments(loss, batch)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    one = torch.ones((), device="cuda", dtype=torch.float64)

    def call() -> tuple[Tensor, ...]:
        result = loss.function(*tensors, **options)
        value = result.loss if isinstance(result, tuple) else result
        return (value, *torch.autograd.grad(value, leaves, one))

    return call


@every_loss
@pytest.mark.parametrize("batch", [8, 5000])
def test_a_loss_is_at_most_three_launches(loss: Loss, batch: int) -> None:
    # The kernel and its scale; many programs meet at a counter that is set to 0, and what is sorted is sorted before.
    assert launches(both_ways(loss, batch)) <= 3


@every_loss
def test_a_loss_waits_for_nothing_and_is_captured(loss: Loss) -> None:
    call = both_ways(loss, 37)
    truth = call()
    with no_synchronisation():
        call()
    graph, results = captured(call)
    graph.replay()
    for found, wanted in zip(results, truth, strict=True):
        assert torch.equal(found, wanted)


def test_rlhf_waits_for_nothing() -> None:
    logps, old, ref, values, rewards = torch.randn(5, 4, 300, device="cuda").unbind()
    mask = torch.rand(4, 300, device="cuda") < 0.8
    logps.requires_grad_()

    def call() -> list[Tensor]:
        shaped = fastpref.kl_shaped_rewards(rewards[:, 0], old, ref, mask, kl_coef=0.1)
        advantages, returns = fastpref.gae(shaped, values, mask)
        whitened = fastpref.masked_whiten(advantages, mask)
        result = fastpref.ppo_loss(logps, old, whitened, 1.1 * values, values, returns, mask)
        return [*result, *torch.autograd.grad(result.loss + fastpref.ptx_loss(logps, mask), logps)]

    call()
    with no_synchronisation():
        found = call()
    device = [value.cpu() for value in found]
    logps, old, ref, values, rewards, mask = (x.detach().cpu() for x in (logps, old, ref, values, rewards, mask))
    logps.requires_grad_()
    for value, wanted in zip(device, call(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_waits_for_the_device() -> None:
    logits, labels = make(4, 8, 1000)
    leaf = logits.requires_grad_()
    step(leaf, labels).backward()
    with no_synchronisation():
        step(leaf, labels).backward()


def test_two_runs_agree_bit_for_bit() -> None:
    logits, labels = make(4, 64, 50257)
    gradients = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        step(leaf, labels).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_compiles_whole() -> None:
    logits, labels = make(4, 8, 1000, dtype=torch.float32)
    gradients = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        function(leaf, labels).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_captured_in_a_graph() -> None:
    logits, labels = make(4, 8, 1000, dtype=torch.float32)
    static = logits.clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(step(static, labels), static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(static, labels)
        (gradient,) = torch.autograd.grad(loss, static)
    with torch.no_grad():
        static.copy_(torch.randn_like(logits))
    graph.replay()
    leaf = static.detach().clone().requires_grad_()
    chosen, rejected = reference.sequence_logprobs(leaf, labels).chunk(2)
    truth = reference.dpo_loss(chosen, rejected, reference_free=True).loss
    (wanted,) = torch.autograd.grad(truth, leaf)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def from_hidden(hidden: Tensor, labels: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """`step` from hidden states, by way of log-probs and by the loss that makes its gradients in the forward."""
    chosen, rejected = fastpref.linear_sequence_logprobs(hidden, weight, labels, **options).chunk(2)
    loss = fastpref.dpo_loss(chosen, rejected, reference_free=True).loss
    return loss + fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True, chunk_rows=16, **options).loss


def test_scored_rows_are_counted_by_the_host() -> None:
    """So no graph can hold what is made from hidden states where nobody says how many there are."""
    _, labels = make(4, 8, 1000)
    hidden = torch.randn(4, 8, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    from_hidden(hidden, labels, weight).backward()
    for call in (fastpref.linear_token_logprobs, fastpref.linear_sequence_logprobs):
        with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
            call(hidden, weight, labels)


@pytest.mark.parametrize("options", [{"mode": "save"}, {"mode": "recompute"}, {}, {"filter_eps": 1e-3}], ids=str)
@pytest.mark.parametrize("room", [0, 2])
def test_told_its_scored_rows_a_step_waits_for_nothing_and_is_captured(room: int, options: dict[str, Any]) -> None:
    """A replay is of other labels too, of which as many are scored, or fewer."""
    _, labels = make(4, 8, 1000)
    hidden = torch.randn(4, 8, 64, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", requires_grad=True)
    counts = [count + room for count in (labels[:, 1:] != -100).sum(-1).tolist()]

    def call() -> list[Tensor]:
        value = from_hidden(hidden, labels, weight, scored_rows=counts, **options)
        return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]

    call()
    with no_synchronisation():
        call()
    graph, results = captured(call)
    with torch.no_grad():
        labels.copy_(torch.randint(1000, labels.shape, device="cuda"))
        labels[:, 1] = -100
        labels[0, 3:5] = -100
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    value = from_hidden(hidden, labels, weight, **options)
    wanted = [value.detach(), *torch.autograd.grad(value, (hidden, weight))]
    torch.testing.assert_close(results, wanted, rtol=1e-5, atol=1e-6)


def test_wrong_labels_and_too_few_rows_are_never_numbers() -> None:
    _, labels = make(4, 8, 1000)
    hidden, weight = torch.randn(4, 8, 64, device="cuda"), torch.randn(1000, 64, device="cuda")
    scored = labels[:, 1:] != -100
    assert fastpref.linear_token_logprobs(hidden, weight, labels, scored_rows=20)[scored].isnan().all()
    labels[2, 4] = 1000
    found = fastpref.linear_token_logprobs(hidden, weight, labels, scored_rows=28)
    assert found.isnan().nonzero().tolist() == [[2, 3]]
    with pytest.raises(IndexError, match=r"label 1000 at scored position \[2, 3\]"):
        fastpref.linear_token_logprobs(hidden, weight, labels)


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_compiles_with_graphs(form: str) -> None:
    """Graphs of what is captured, and the operators that cannot be run between them."""
    _, labels = make(4, 8, 1000)
    weight = torch.randn(1000, 64, device="cuda")

    def call(hidden: Tensor) -> Tensor:
        return from_hidden(hidden, labels, weight) if form == "hidden" else step(hidden @ weight.T, labels)

    compiled = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        hidden, gradients = torch.randn(4, 8, 64, device="cuda"), []
        for function in (call, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            leaf = hidden.clone().requires_grad_()
            function(leaf).backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad.clone())
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
