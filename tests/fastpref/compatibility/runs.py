"""Checks of a training step as users run it: backwards, memory, precision, processes, heads and tensors."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastpref
from tests.fastpref.compatibility.steps import (
    VOCABULARY,
    WIDTH,
    Attached,
    Hidden,
    HiddenLoss,
    Logits,
    Losses,
    Step,
    batch,
    build,
    gradients,
    head_of,
    hold,
    outcome,
    values,
)


def retain_graph(kind: type[Step]) -> None:
    step = build(kind)
    loss, parameters = step(*batch()), list(step.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, parameters)
    for results in zip(first, second, kept, strict=True):
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[2])


def accumulation(kind: type[Step]) -> None:
    step, data = build(kind), batch(pairs=4)
    wanted = outcome(step, data=data)
    step.zero_grad()
    for half in range(2):
        (step(*(torch.cat([part.chunk(2)[half] for part in rows.chunk(2)]) for rows in data)) / 2).backward()
    hold(gradients(step), {name: value for name, value in wanted.items() if name != "loss"})


def no_gradients(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)["loss"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = step(*batch())
            assert not loss.requires_grad
            hold(loss.clone(), wanted)


def step_in_backward(kind: type[Step]) -> None:
    """Step the optimizer in a hook of each parameter, under anomaly detection."""
    step = build(kind)
    before, wanted = values(step), outcome(step)

    def descend(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.sub_(parameter.grad)
        parameter.grad = None

    for parameter in step.parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(descend)
    with torch.autograd.detect_anomaly(check_nan=True):
        step(*batch()).backward()
    hold(values(step), {name: value - wanted[name] for name, value in before.items()})


def checkpointed(kind: type[Step], **options: Any) -> None:
    step = build(kind)
    wanted, scored = outcome(step), []

    def score(hidden: Tensor, labels: Tensor) -> Tensor:
        scored.append(torch.is_grad_enabled())
        return step.score(hidden, labels)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        loss = checkpoint(score, torch.tanh(step.embed(ids)), labels, **options)
        assert isinstance(loss, Tensor)
        return loss

    hold(outcome(step, call), wanted)
    assert len(scored) == 2


def checkpoint_selective(kind: type[Step]) -> None:
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in products else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpointed(kind, use_reentrant=False, context_fn=contexts)


def offloading(kind: type[Step]) -> None:
    step, packed = build(kind), []

    def pack(tensor: Tensor) -> bytes:
        packed.append(tensor)
        return pickle.dumps(tensor.detach())

    wanted = outcome(step)
    with torch.autograd.graph.saved_tensors_hooks(pack, pickle.loads):
        hold(outcome(step), wanted)
    assert packed
    with torch.autograd.graph.save_on_cpu():
        hold(outcome(step), wanted)


def autocast(kind: type[Step], dtype: torch.dtype) -> None:
    step = build(kind)
    wanted = outcome(step)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            loss = step(ids, labels)
        assert loss.dtype == torch.float32
        return loss

    for name, value in outcome(step, call).items():
        assert value.dtype == torch.float32
        assert (value - wanted[name]).abs().max() <= 8 * torch.finfo(dtype).eps * wanted[name].abs().max()


def grad_scaler(kind: type[Step]) -> None:
    """Train with gradients that fp16 holds only scaled, and first with a scale so large that the step is skipped."""
    step = build(kind)
    before, wanted = values(step), outcome(step)
    optimizer = torch.optim.SGD(step.parameters(), lr=1e6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    for factor, finite in ((1e6, False), (1e-6, True)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = factor * step(*batch())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        if finite:
            found = values(step)
            for name, value in before.items():
                allowed = 8 * torch.finfo(torch.float16).eps * wanted[name].abs().max() + 1e-6
                assert (found[name] - (value - wanted[name])).abs().max() <= allowed
        else:
            hold(values(step), before, rtol=0.0, atol=0.0)
            scaler.update()
            assert scaler.get_scale() == 2.0**126
            scaler.update(2.0**20)


def deterministic(kind: type[Step]) -> None:
    step = build(kind)
    torch.use_deterministic_algorithms(True)
    hold(outcome(step), outcome(step), rtol=0.0, atol=0.0)


def copies(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        for parameter in step.parameters():
            parameter.data.mul_(1.1)
        hold(outcome(other), wanted, rtol=0.0, atol=0.0)


def results(kind: type[Step]) -> None:
    (ids, labels), step = batch(), build(kind)
    hidden, weight = torch.randn(4, 9, WIDTH), torch.randn(VOCABULARY, WIDTH)
    stats: dict[str, Any] = {"stats": ("lse", "entropy")}
    made: dict[type[Step], Callable[[], list[Any]]] = {
        Logits: lambda: [fastpref.token_logprobs(hidden @ weight.T, labels, **stats)],
        Hidden: lambda: [fastpref.linear_sequence_logprobs(hidden, weight, labels, **stats)],
        HiddenLoss: lambda: [
            fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True),
            fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True, **stats),
            fastpref.linear_preference_loss(hidden, weight, labels, lambda x: x.sum(-1), group_size=2, **stats),
        ],
        Losses: lambda: [fastpref.dpo_loss(*hidden[:2, :, 0], reference_free=True)],
        Attached: lambda: [step.heads()(ids, labels=labels, fastpref=True, use_cache=False)],
    }
    with torch.no_grad():
        for result in made[kind]():
            again = pickle.loads(pickle.dumps(result))
            assert type(again) is type(result)
            hold([value for value in again if value is not None], [value for value in result if value is not None])


def replica(step: nn.Module, scale: float) -> Any:
    """A replica as DataParallel makes it, with weights of its own."""
    made = {module: module._replicate_for_data_parallel() for module in step.modules()}
    for module, other in made.items():
        for name, child in module._modules.items():
            other._modules[name] = None if child is None else made[child]
        for name, parameter in module._parameters.items():
            setattr(other, name, None if parameter is None else scale * parameter)
    return made[step]


def replicas(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)
    data = [batch(), batch(seed=2)]
    made = [replica(step, scale) for scale in (1.0, 1.3)]
    apart = [other(*given) for other, given in zip(made, data, strict=True)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda other, given: other(*given), made, data))
    hold(together, apart, rtol=0.0, atol=0.0)
    step.zero_grad()
    together[0].backward()
    hold(gradients(step), {name: value for name, value in wanted.items() if name != "loss"})


def threads(kind: type[Step]) -> None:
    steps, data, meet = (
        [build(kind), build(kind)],
        [batch(), batch(pairs=3, length=11)],
        threading.Barrier(2, timeout=600),
    )
    wanted = [outcome(step, data=given) for step, given in zip(steps, data, strict=True)]

    def work(number: int) -> None:
        for _ in range(10):
            meet.wait()
            hold(outcome(steps[number], data=data[number]), wanted[number], rtol=0.0, atol=0.0)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


class Outcomes(torch.utils.data.Dataset):
    """A data set whose items are outcomes of a step in the process that reads them."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return outcome(self.step, data=batch(seed=index))


def forked_worker(kind: type[Step]) -> None:
    step = build(kind)
    here = [outcome(step, data=batch(seed=seed)) for seed in range(2)]
    there = torch.utils.data.DataLoader(
        Outcomes(step), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=600
    )
    hold(list(there), here)


def tied(kind: type[Step]) -> None:
    step = build(kind)
    module, name = head_of(step)
    head = getattr(module, name)
    head.weight = step.embed.weight
    found = outcome(step)["embed.weight" if kind is not Attached else "model.model.embed_tokens.weight"]
    untied = build(kind)
    module, name = head_of(untied)
    getattr(module, name).weight = nn.Parameter(untied.embed.weight.detach().clone())
    untied(*batch()).backward()
    hold(found, untied.embed.weight.grad + getattr(module, name).weight.grad)


def quantised(kind: type[Step]) -> None:
    """Score with PyTorch's dynamic int8 head, whose weight is not a tensor."""
    step = build(kind)
    wanted = outcome(step)
    module, name = head_of(step)
    whole = nn.Sequential(getattr(module, name))
    setattr(module, name, torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, torch.qint8)[0])
    hold(step(*batch()).detach(), wanted["loss"], rtol=0.05)


def parametrised(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)
    module, name = head_of(step)
    head = torch.nn.utils.parametrizations.weight_norm(getattr(module, name))
    loss = step(*batch())
    loss.backward()
    hold(loss.detach(), wanted["loss"])
    weight = head.parametrizations.weight
    norm = weight.original1.norm(dim=1, keepdim=True)
    along = (wanted[f"{'model.' if kind is Attached else ''}{name}.weight"] * weight.original1 / norm).sum(1, True)
    hold(weight.original0.grad, along)


class Marked(Tensor):
    """A subclass that changes nothing, as `nn.Buffer` or a library's annotation."""


def subclass(kind: type[Step]) -> None:
    step = build(kind)

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        return step.score(torch.tanh(step.embed(ids)).as_subclass(Marked), labels)

    wanted = outcome(step)
    found = outcome(step, call)
    assert isinstance(found["loss"], Marked)
    hold({name: value.as_subclass(Tensor) for name, value in found.items()}, wanted)


def wrapper_subclass(kind: type[Step]) -> None:
    """Train weights that hold two tensors each, on which every operator runs twice."""
    step, scaled = build(kind), build(kind)
    for one, other in zip(step.modules(), scaled.modules(), strict=True):
        for name, parameter in list(one._parameters.items()):
            if parameter is not None:
                other._parameters[name].data.mul_(1.1)
                one._parameters[name] = nn.Parameter(TwoTensor(parameter.detach(), 1.1 * parameter.detach()))
    found = outcome(step)
    hold({name: value.a for name, value in found.items()}, outcome(build(kind)))
    hold({name: value.b for name, value in found.items()}, outcome(scaled))


def nested(kind: type[Step]) -> None:
    step, lengths = build(kind), (5, 9, 6, 7)
    rows = [torch.randn(length, WIDTH) for length in lengths]
    hidden = torch.nested.nested_tensor(rows, layout=torch.jagged)
    labels = torch.nested.nested_tensor_from_jagged(torch.randint(VOCABULARY, (sum(lengths),)), hidden.offsets())
    step.score(hidden, labels)
