"""Counts of what the host does in a small call. They are the same on every machine, unlike times."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from fastpref.losses import TABLE
from fastpref_kernels import cpu


def operators(function: Callable[[], Any]) -> int:
    """Return how many ATen operators a call runs on this thread, those inside of other operators too."""
    function()  # a first call does more
    with torch.autograd.profiler.profile() as profile:
        function()
    assert profile is not None
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def python_calls(function: Callable[[], Any]) -> int:
    """Return how many Python functions a call enters."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    function()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(128, (4, 9))
    labels[:, :4] = -100
    return torch.randn(4, 9, 32, requires_grad=True), torch.randn(128, 32, requires_grad=True), labels


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs (B, T') from the logits of the scored rows alone."""
    targets = labels[:, 1:]
    scored = targets != -100
    logps = -F.cross_entropy(F.linear(hidden[:, :-1][scored], weight), targets[scored], reduction="none")
    return logps.new_zeros(scored.shape).masked_scatter(scored, logps)


def step(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], None]:
    """Return a call of `function` and the backward of its sum, or of its loss."""

    def call() -> None:
        result = function(*arguments, **options)
        (result if isinstance(result, Tensor) else result.loss).sum().backward()

    return call


class TestFromHiddenStates:
    @pytest.fixture(autouse=True)
    def native(self) -> None:
        if not cpu.native():
            pytest.skip("no compiler: PyTorch's operators are all there is")

    def test_log_probs_take_fewer_operators_than_eager(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        assert operators(step(fastpref.linear_token_logprobs, *batch)) <= operators(step(eager, *batch))
        forward = operators(lambda: fastpref.linear_token_logprobs(*batch))
        assert forward <= operators(lambda: eager(*batch))

    def test_sequences_take_fewer_than_eager(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        ours = operators(step(fastpref.linear_sequence_logprobs, *batch))
        assert ours <= operators(step(lambda *given: eager(*given).sum(-1), *batch))

    @pytest.mark.skipif(
        not isinstance(vars(torch.autograd.Function)["apply"], classmethod),
        reason="this torch binds a Function's arguments in C++, always",
    )
    def test_few_functions_are_entered(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Few functions are entered; `autograd.Function.apply` would bind the arguments to a signature, for one."""
        assert python_calls(lambda: fastpref.linear_token_logprobs(*batch)) <= 120


class TestLosses:
    @pytest.fixture
    def pairs(self) -> tuple[Tensor, ...]:
        return tuple(torch.randn(8, requires_grad=i < 2) for i in range(4))

    def test_dpo(self, pairs: tuple[Tensor, ...]) -> None:
        chosen, rejected, *reference = pairs

        def formula() -> tuple[Tensor, Tensor, Tensor]:
            gains = chosen - reference[0], rejected - reference[1]
            loss = -F.logsigmoid(0.1 * (gains[0] - gains[1])).mean()
            return loss, 0.1 * gains[0].detach(), 0.1 * gains[1].detach()

        assert operators(lambda: fastpref.dpo_loss(*pairs)) <= operators(formula) + 4
        assert python_calls(lambda: fastpref.dpo_loss(*pairs)) <= 60

    def test_pairwise_reward(self, pairs: tuple[Tensor, ...]) -> None:
        formula = operators(lambda: -F.logsigmoid(pairs[0] - pairs[1]).mean())
        assert operators(lambda: fastpref.pairwise_reward_loss(*pairs[:2])) <= formula
        assert python_calls(lambda: fastpref.pairwise_reward_loss(*pairs[:2])) <= 25

    def test_kto(self, pairs: tuple[Tensor, ...]) -> None:
        desirable = torch.arange(8) % 2 == 0

        def formula() -> tuple[Tensor, Tensor]:
            ratio = pairs[0] - pairs[2]
            signed = torch.where(desirable, ratio - 0.5, 0.5 - ratio)
            return torch.sigmoid(-0.1 * signed).mean(), 0.1 * ratio.detach()

        assert operators(lambda: fastpref.kto_loss(pairs[0], pairs[2], desirable, kl=0.5)) <= operators(formula) + 2
        assert python_calls(lambda: fastpref.kto_loss(pairs[0], pairs[2], desirable, kl=0.5)) <= 35

    def test_best_of_k(self) -> None:
        rewards, best = torch.randn(8, 4, requires_grad=True), torch.randint(4, (8,))
        formula = operators(lambda: F.cross_entropy(rewards, best))
        assert operators(lambda: fastpref.best_of_k_loss(rewards, best)) <= formula + 1
        assert python_calls(lambda: fastpref.best_of_k_loss(rewards, best)) <= 25


class TestLossesOnAGPU:
    """Losses on tensors of a stand-in for a GPU, up to the launch, which does nothing here."""

    @pytest.fixture(autouse=True)
    def stubbed(self) -> Iterator[None]:
        pytest.importorskip("triton")
        from benchmarks import sass
        from benchmarks.stubbed_driver import stubbed_launches
        from benchmarks.triton_on_cpu import launchers_on_cpu

        with stubbed_launches(sass.TARGETS["sm_90"]), launchers_on_cpu():
            yield

    # A forward allocates what the launch writes, and a backward multiplies once. Every function counts that PyTorch,
    # Triton and the stubs enter too, which differ between their versions.
    @pytest.mark.parametrize(
        ("name", "in_forward", "in_step", "entered"),
        [
            ("dpo_loss:sigmoid", 12, 48, 112),
            ("kto_loss", 9, 35, 105),
            ("pairwise_reward_loss", 6, 28, 100),
            ("best_of_k_loss", 6, 24, 94),
            ("ranking_loss", 6, 24, 99),
            ("plackett_luce_loss", 6, 24, 99),
        ],
    )
    def test_counts(self, name: str, in_forward: int, in_step: int, entered: int) -> None:
        (row,) = [loss for loss in TABLE if loss.name == name]
        tensors, options = row.example(torch.Generator().manual_seed(0), 8)
        given = [tensor.float().requires_grad_() if tensor.is_floating_point() else tensor for tensor in tensors]
        options = {name: value for name, value in options.items() if not name.endswith("lengths")}
        call = functools.partial(row.function, *given, **row.options, **options)
        assert operators(call) <= in_forward
        assert operators(step(call)) <= in_step
        if isinstance(vars(torch.autograd.Function)["apply"], classmethod):
            assert python_calls(step(call)) <= entered
