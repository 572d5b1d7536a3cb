"""Checks of a training step under PyTorch's compilers, `torch.func` and export."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from tests.fastpref.compatibility.steps import (
    OURS,
    VOCABULARY,
    WIDTH,
    Step,
    batch,
    build,
    gradients,
    hold,
    outcome,
    values,
)


def inductor(kind: type[Step]) -> None:
    found, wanted = _by_inductor()
    name = OURS.index(kind)
    for key in wanted:
        if key == "loss" or key.startswith(f"{name}."):
            hold(found[key], wanted[key], rtol=1e-4, atol=1e-5)


@functools.cache
def _by_inductor() -> tuple[Any, Any]:
    """Return the outcome of the steps of our functions, compiled as one graph because the compiler starts slowly."""
    steps = nn.ModuleList(map(build, OURS))

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([step(ids, labels) for step in steps]).sum()

    torch.compiler.reset()
    runs: Any = (call, torch.compile(call, fullgraph=True))
    found, wanted = (outcome(steps, run) for run in reversed(runs))  # type: ignore[arg-type]
    return found, wanted


def dynamic(kind: type[Step]) -> None:
    step = build(kind)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="eager")
    hold(outcome(step, compiled), outcome(step))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (10, 12):
            data = batch(length=length, seed=2)
            hold(outcome(step, compiled, data), outcome(step, data=data))


def compiled_backward(kind: type[Step]) -> None:
    step = build(kind)
    wanted = outcome(step)
    torch.compiler.reset()

    def call(ids: Tensor, labels: Tensor) -> Tensor:
        loss = step(ids, labels)
        loss.backward()
        return loss

    step.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        loss = torch.compile(call, backend="aot_eager")(*batch())
    hold({"loss": loss.detach(), **gradients(step)}, wanted)


def functional(kind: type[Step]) -> None:
    step, other = build(kind), build(kind)
    leaves = {name: value.requires_grad_() for name, value in values(step).items()}
    for parameter in other.parameters():
        parameter.data.zero_()
    loss = functional_call(other, leaves, batch())
    loss.backward()
    hold({"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}, outcome(step))


def func_grad(kind: type[Step]) -> None:
    step = build(kind)
    by_values = torch.func.grad_and_value(lambda given: functional_call(step, given, batch()))
    found, loss = by_values(values(step))
    hold({"loss": loss, **found}, outcome(step))


def func_grad_compiled(kind: type[Step]) -> None:
    step, data = build(kind), batch()
    wanted = outcome(step)
    torch.compiler.reset()

    def call(given: dict[str, Tensor]) -> Any:
        return torch.func.grad_and_value(lambda given: functional_call(step, given, data))(given)

    found, loss = torch.compile(call, fullgraph=True, backend="eager")(values(step))
    hold({"loss": loss, **found}, wanted)


def vmap(kind: type[Step]) -> None:
    """Take the gradients of each part of a batch."""
    step, parts = build(kind), [batch(seed=seed) for seed in (1, 2)]
    one = torch.func.grad(lambda given, ids, labels: functional_call(step, given, (ids, labels)))
    ids, labels = (torch.stack(part) for part in zip(*parts, strict=True))
    found = torch.vmap(one, in_dims=(None, 0, 0))(values(step), ids, labels)
    for number, data in enumerate(parts):
        wanted = outcome(step, data=data)
        hold({name: gradient[number] for name, gradient in found.items()}, {k: wanted[k] for k in found})


def forward_mode(kind: type[Step]) -> None:
    step, (_, labels) = build(kind), batch()
    hidden, along = torch.randn(2, 4, 9, WIDTH).unbind()
    leaf = hidden.clone().requires_grad_()
    wanted = (torch.autograd.grad(step.score(leaf, labels), leaf)[0] * along).sum()
    with forward_ad.dual_level():
        dual = step.score(forward_ad.make_dual(hidden, along), labels)
        hold(forward_ad.unpack_dual(dual).tangent, wanted)
    hold(torch.func.jvp(lambda hidden: step.score(hidden, labels), (hidden,), (along,))[1], wanted)


def double_backward(kind: type[Step]) -> None:
    step = build(kind).double()
    parameters = list(step.parameters())

    def penalty() -> Tensor:
        found = torch.autograd.grad(step(*batch()), parameters, create_graph=True)
        return sum((gradient.square().sum() for gradient in found), torch.zeros(()))

    (slope,) = torch.autograd.grad(penalty(), step.embed.weight)
    along = torch.randn_like(slope)
    either = []
    for distance in (1e-5, -1e-5):
        step.embed.weight.data.add_(distance * along)
        either.append(penalty())
        step.embed.weight.data.sub_(distance * along)
    hold((slope * along).sum(), (either[0] - either[1]) / 2e-5, rtol=1e-4)


def exported(kind: type[Step], gradients: bool) -> None:
    step, data = build(kind), batch(pairs=3, length=12)
    rows, length = 2 * torch.export.Dim("pairs", min=2, max=32), torch.export.Dim("length", min=9, max=12)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(step, batch(), dynamic_shapes=({0: rows, 1: length},) * 2).module()
    wanted = outcome(step, data=data)
    if gradients:
        hold(outcome(program, data=data), wanted)  # type: ignore[arg-type]
    else:
        with torch.no_grad():
            hold(program(*data), wanted["loss"])


def shapes_only(kind: type[Step], fake: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.device("meta"):
        step, labels = build(kind), torch.zeros(4, 9, dtype=torch.long)
        step(labels, labels).backward()
    for parameter in step.parameters():
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert isinstance(parameter.grad, FakeTensor) if fake else parameter.grad.is_meta


def flops(kind: type[Step]) -> None:
    step = build(kind)
    with FlopCounterMode(display=False) as counter:
        outcome(step)
    head = 2 * 4 * 9 * WIDTH * VOCABULARY
    assert counter.get_total_flops() >= 3 * head, "the head's products are not counted"
