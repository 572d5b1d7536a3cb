"""The log-probs' operators under gradcheck, opcheck, torch.compile, autocast and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpref
from fastpref import sequence_logprobs, token_logprobs
from tests.tolerance import ALL_STATS

BOUNDS = torch.tensor([0, 4, 4, 6, 8])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unshifted": {"shift": False},
    "transformed": {"temperature": 0.7, "logit_scale": 0.5, "softcap": 3.0},
}
SEQUENCES: dict[str, dict[str, Any]] = {
    "sum": {},
    "mean, transformed": {"reduction": "mean", **OPTIONS["transformed"]},
    "packed": {"cu_seqlens": BOUNDS},
    "packed mean, length-desensitised": {"cu_seqlens": BOUNDS, "reduction": "mean", "ld_alpha": 0.5},
}


def packed(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return (logits.flatten(0, 1), labels.flatten()) if "cu_seqlens" in options else (logits, labels)


@pytest.mark.usefixtures("implementation")
class TestGradcheck:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_token_logprobs(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> None:
        def call(z: Tensor) -> tuple[Tensor, Tensor]:
            result = token_logprobs(z, labels, stats=("lse", "entropy"), **options)
            return result.logprobs, result.entropy

        assert torch.autograd.gradcheck(call, logits.requires_grad_())

    @pytest.mark.parametrize("options", SEQUENCES.values(), ids=SEQUENCES)
    def test_sequence_logprobs(self, logits: Tensor, labels: Tensor, options: dict[str, Any]) -> None:
        z, y = packed(logits, labels, options)

        def call(z: Tensor) -> tuple[Tensor, Tensor]:
            result = sequence_logprobs(z, y, stats=("entropy",), **options)
            return result.logprobs, result.entropy

        assert torch.autograd.gradcheck(call, z.requires_grad_())

    def test_views_of_logits(self, logits: Tensor, labels: Tensor) -> None:
        def call(z: Tensor) -> Tensor:
            return token_logprobs(z.transpose(0, 1)[..., :6].expand(2, 4, 6), labels.clamp(max=5))

        assert torch.autograd.gradcheck(call, logits[:1].transpose(0, 1).contiguous().requires_grad_())


def scoring(options: dict[str, Any], reduction: str) -> tuple[Any, ...]:
    """Return the operators' common arguments for keywords of the public functions."""
    return (
        -100,
        options.get("shift", True),
        options.get("logit_scale", 1.0),
        options.get("temperature", 1.0),
        options.get("softcap"),
        reduction,
    )


def forward_arguments(logits: Tensor, labels: Tensor, case: str) -> tuple[Any, ...]:
    every, none = 2 ** len(ALL_STATS) - 1, 0
    weights = torch.rand(2, 3)
    return {
        "tokens": (logits, labels, None, None, *scoring({}, "none"), none),
        "tokens, statistics, transformed": (
            logits,
            labels,
            None,
            None,
            *scoring(OPTIONS["transformed"], "none"),
            every,
        ),
        "sequences, weighted": (logits, labels, None, weights, *scoring({}, "sum"), none),
        "packed mean": (
            logits.reshape(1, 8, 7),
            labels.reshape(1, 8),
            BOUNDS,
            None,
            *scoring({"shift": False}, "mean"),
            every,
        ),
    }[case]


CASES = ("tokens", "tokens, statistics, transformed", "sequences, weighted", "packed mean")


def backward_arguments(logits: Tensor, labels: Tensor, case: str) -> tuple[Any, ...]:
    forward = forward_arguments(logits, labels, case)
    logps, sequences, norm, counts, *_ = torch.ops.fastpref.logprobs(*forward)
    *tensors, stats = forward[:4], forward[-1]
    reduced = forward[-2] != "none"
    grad = torch.randn_like(sequences if reduced else logps)
    grad_entropy = torch.randn_like(logps) if stats else None
    return (grad, grad_entropy, *tensors[0], norm, counts, *forward[4:-1])


class TestOpcheck:
    """On detached inputs: the `autograd.Function` sits above the operators, which know nothing of gradients."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("operator", ["logprobs", "logprobs_backward", "logprobs_backward_"])
    def test_operator(self, operator: str, case: str, dtype: torch.dtype, logits: Tensor, labels: Tensor) -> None:
        build = forward_arguments if operator == "logprobs" else backward_arguments
        arguments = build(logits.to(dtype), labels, case)
        torch.library.opcheck(getattr(torch.ops.fastpref, operator).default, arguments)

    def test_every_operator_of_the_cpu_is_checked(self) -> None:
        on_cpu = {
            name.removeprefix("fastpref::")
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("fastpref::") and torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CPU")
        }
        checked_elsewhere = {
            "linear_logprobs",
            "linear_logprobs_backward",
            "linear_logprobs_backward_",
            "scaled_gradient",
            "gae",
            "shard_labels",
            "linear_fold",
            "linear_finalize",
        }
        assert on_cpu == {"logprobs", "logprobs_backward", "logprobs_backward_"} | checked_elsewhere

    def test_inplace_operator_writes_what_the_other_returns(self, logits: Tensor, labels: Tensor) -> None:
        arguments = backward_arguments(logits, labels, "tokens, statistics, transformed")
        wanted = torch.ops.fastpref.logprobs_backward(*arguments)
        torch.ops.fastpref.logprobs_backward_(*arguments)
        assert torch.equal(logits, wanted)


def dpo_step(logits: Tensor, labels: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    logps = sequence_logprobs(logits, labels)
    chosen, rejected = logps.chunk(2)
    result = fastpref.dpo_loss(chosen, rejected, *ref.chunk(2))
    return result.loss, result.chosen_rewards


def step_with_statistics(logits: Tensor, labels: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    result = sequence_logprobs(logits, labels, reduction="mean", stats=ALL_STATS, softcap=5.0, ld_alpha=0.5)
    scale = result.log_sum_sq_probs.sum() + result.is_top1.sum() + result.mean_logits.sum() + result.lse.sum()
    return (result.logprobs * ref).sum() - 0.1 * result.entropy.mean() + scale, result.logprobs.detach()


def inplace_step(logits: Tensor, labels: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    logps = token_logprobs(logits * 1.5, labels, inplace_backward=True)
    return (logps.sum(-1) * ref).sum(), logps.detach()


def outcome(step: Callable[..., Any], batch: int, time: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, time, 33, generator=generator).requires_grad_()
    labels = torch.randint(33, (batch, time), generator=generator)
    loss, rest = step(logits, labels, torch.randn(batch, generator=generator))
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), rest, logits.grad


# Inductor's own imports and codegen use what the newest Python deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("unpoisoned", "fresh_compiler")
class TestCompile:
    @pytest.mark.parametrize("step", [dpo_step, step_with_statistics, inplace_step])
    def test_whole_graph_equals_eager(self, step: Callable[..., Any]) -> None:
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for wanted, got in zip(outcome(step, 4, 6, 1), outcome(compiled, 4, 6, 1), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("stats", [(), ALL_STATS], ids=["plain", "statistics"])
    @pytest.mark.parametrize("function", [token_logprobs, sequence_logprobs])
    def test_whole_graph_without_gradients(self, function: Callable[..., Any], stats: tuple[str, ...]) -> None:
        logits, labels = torch.randn(2, 5, 33, requires_grad=True), torch.randint(33, (2, 5))

        def step(logits: Tensor) -> Any:
            return function(logits, labels, stats=stats)

        def inside(logits: Tensor) -> Any:
            with torch.no_grad():
                return step(logits)

        wanted = step(logits.detach())
        for around, body, given in (
            (torch.no_grad, step, logits),
            (torch.inference_mode, step, logits),
            (torch.enable_grad, inside, logits),
            (torch.enable_grad, step, logits.detach()),
        ):
            torch.compiler.reset()
            with around():
                found = torch.compile(body, fullgraph=True, backend="aot_eager")(given)
            for one, other in zip(found, wanted, strict=True):
                assert not one.requires_grad
                assert torch.equal(one, other)

    def test_dynamic_shapes_compile_once(self) -> None:
        compiled = torch.compile(step_with_statistics, fullgraph=True, dynamic=True, backend="aot_eager")
        outcome(compiled, 4, 6, 1)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch, time in ((6, 9), (10, 3), (8, 17)):
                both = outcome(step_with_statistics, batch, time, 2), outcome(compiled, batch, time, 2)
                for wanted, got in zip(*both, strict=True):
                    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)

    def test_dynamic_shapes_in_place(self) -> None:
        def step(logits: Tensor, labels: Tensor) -> Tensor:
            return sequence_logprobs(logits * 1, labels, inplace_backward=True).sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for time in (5, 6, 8):
            logits, labels = torch.randn(2, time, 11), torch.randint(11, (2, time))
            gradients = []
            for function in (step, compiled):
                leaf = logits.clone().requires_grad_()
                function(leaf, labels).backward()
                gradients.append(leaf.grad)
            torch.testing.assert_close(*gradients)

    @pytest.mark.slow
    def test_inductor(self) -> None:
        compiled = torch.compile(dpo_step, fullgraph=True)
        for wanted, got in zip(outcome(dpo_step, 4, 6, 1), outcome(compiled, 4, 6, 1), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)

    def test_packed(self) -> None:
        def step(logits: Tensor, labels: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
            logps = sequence_logprobs(logits, labels, cu_seqlens=torch.tensor([0, 2, 2, 9]))
            return (logps * ref[0]).sum(), logps.detach()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for wanted, got in zip(outcome(step, 1, 9, 1), outcome(compiled, 1, 9, 1), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


class TestGraph:
    def test_double_backward_is_refused(self, logits: Tensor, labels: Tensor) -> None:
        logps = token_logprobs(logits.requires_grad_(), labels)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(logps.sum(), logits, create_graph=True)

    def test_no_grad_and_detached(self, logits: Tensor, labels: Tensor) -> None:
        wanted = token_logprobs(logits, labels)
        assert not wanted.requires_grad
        with torch.no_grad():
            logps = token_logprobs(logits.requires_grad_(), labels)
        assert not logps.requires_grad
        assert torch.equal(logps, wanted)
        with torch.inference_mode():
            assert torch.equal(token_logprobs(logits, labels), wanted)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
    def test_forward_mode_is_refused(self, logits: Tensor, labels: Tensor) -> None:
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.func.jvp(lambda z: token_logprobs(z, labels), (logits,), (logits,))

    def test_retain_graph_gives_the_same_gradient_again(self, logits: Tensor, labels: Tensor) -> None:
        logps = sequence_logprobs(logits.requires_grad_(), labels)
        weight = torch.randn_like(logps)
        (first,) = torch.autograd.grad(logps, logits, weight, retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(logps, logits, weight)
        assert torch.equal(first, kept)
        assert torch.equal(second, kept)

    def test_an_output_that_is_not_used_costs_no_gradient(self, logits: Tensor, labels: Tensor) -> None:
        result = token_logprobs(logits.requires_grad_(), labels, stats=("entropy",))
        (by_logp,) = torch.autograd.grad(result.logprobs.sum(), logits, retain_graph=True)
        (by_entropy,) = torch.autograd.grad(result.entropy.sum(), logits, retain_graph=True)
        (by_both,) = torch.autograd.grad(result.logprobs.sum() + result.entropy.sum(), logits)
        (alone,) = torch.autograd.grad(token_logprobs(logits, labels).sum(), logits)
        torch.testing.assert_close(by_logp, alone, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(by_both, by_logp + by_entropy, rtol=1e-13, atol=1e-14)

    def test_logits_changed_before_the_backward_are_noticed(self, logits: Tensor, labels: Tensor) -> None:
        changed = logits.requires_grad_().clone()
        logps = token_logprobs(changed, labels)
        changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logps.sum().backward()

    def test_results_may_be_written_to(self, logits: Tensor, labels: Tensor) -> None:
        gradients = []
        for write in (False, True):
            leaf = logits.clone().requires_grad_()
            out = token_logprobs(leaf, labels, stats=("entropy",))
            values, entropy = out.logprobs, out.entropy
            if write:
                values[:, 0] = 0
                entropy[:, 0] = 0
            (values[:, 1:].sum() + entropy[:, 1:].sum()).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)

    def test_labels_changed_before_the_backward_are_noticed(self, logits: Tensor, labels: Tensor) -> None:
        logps = token_logprobs(logits.requires_grad_(), labels)
        labels.fill_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logps.sum().backward()

    def test_checkpoint(self, logits: Tensor, labels: Tensor) -> None:
        logits.requires_grad_()
        logps = torch.utils.checkpoint.checkpoint(token_logprobs, logits, labels, use_reentrant=False)
        (gradient,) = torch.autograd.grad(logps.sum(), logits)
        assert torch.equal(gradient, torch.autograd.grad(token_logprobs(logits, labels).sum(), logits)[0])


class Bigram(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def plain_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sequence log-probs of a training loop in plain PyTorch."""
    logits, labels = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:]
    logps = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(-1)


class TestTraining:
    def batch(self) -> tuple[Tensor, Tensor]:
        ids = torch.randint(61, (8, 12))
        labels = ids.clone()
        labels[:, :4] = -100
        return ids, labels

    @pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_dpo_steps_equal_plain_pytorch(self, dtype: torch.dtype, inplace: bool) -> None:
        ids, labels = self.batch()
        start, ref = Bigram(61, 16).to(dtype), Bigram(61, 16).to(dtype).requires_grad_(False)
        trained = []
        for ours in (True, False):
            model = Bigram(61, 16).to(dtype)
            model.load_state_dict(start.state_dict())
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            losses = []
            for _ in range(3):
                if ours:
                    logps = sequence_logprobs(model(ids), labels, inplace_backward=inplace)
                    loss = fastpref.dpo_loss(*logps.chunk(2), *sequence_logprobs(ref(ids), labels).chunk(2)).loss
                else:
                    chosen, rejected = (plain_logps(model(ids), labels) - plain_logps(ref(ids), labels)).chunk(2)
                    loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            assert losses[2] < losses[0]
            trained.append([*losses, *(parameter.detach() for parameter in model.parameters())])
        precision = 1e-12 if dtype == torch.float64 else 2e-5
        for got, wanted in zip(*trained, strict=True):
            torch.testing.assert_close(got, wanted, rtol=precision, atol=precision)

    def test_autocast(self) -> None:
        ids, labels = self.batch()
        model = Bigram(61, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids)
            assert logits.dtype == torch.bfloat16
            logps = sequence_logprobs(logits, labels)
            wide = sequence_logprobs(logits.float(), labels)
        assert logps.dtype == torch.float32
        # Nothing is cast on the way in: neither bf16 logits up, nor float32 ones down.
        assert torch.equal(logps, sequence_logprobs(logits.detach(), labels))
        assert torch.equal(wide, sequence_logprobs(logits.detach().float(), labels))
        torch.testing.assert_close(wide, plain_logps(logits, labels))
        logps.sum().backward()
        weight = model.head.weight.grad
        assert weight is not None
        assert weight.dtype == torch.float32
        assert weight.isfinite().all()

    def test_gradient_accumulation_over_micro_batches(self) -> None:
        ids, labels = self.batch()
        model = Bigram(61, 16).double()
        sequence_logprobs(model(ids), labels).sum().backward()
        whole = model.head.weight.grad
        model.zero_grad()
        for part, their in zip(ids.chunk(4), labels.chunk(4), strict=True):
            sequence_logprobs(model(part), their).sum().backward()
        assert whole is not None
        torch.testing.assert_close(model.head.weight.grad, whole, rtol=1e-12, atol=1e-12)
