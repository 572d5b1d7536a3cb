"""Preference losses from hidden states: against the loss of the log-probs of the product, put together here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from fastpref import reference
from tests.tolerance import ALL_STATS, assert_accurate

PAIRS, TIME, FEATURES, VOCABULARY = 3, 7, 5, 23
FIELDS = ("loss", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps")
both = pytest.mark.usefixtures("implementation")
# label_smoothing, average_logps, ld_alpha: any two of them in all four ways.
COMBINATIONS = ((0.0, False, None), (0.2, True, None), (0.0, True, 0.3), (0.2, False, 0.3))
packages = pytest.mark.parametrize("package", [fastpref, reference], ids=["fastpref", "reference"])
# By how much a value may miss the truth, in parts of its largest magnitude, or of 1.
RELATIVE = {torch.float32: 2e-5, torch.float64: 1e-12}
Operands = dict[str, Tensor]


def make(sequences: int = 2 * PAIRS, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Operands, Tensor]:
    """Hidden states, weight and bias, and labels of unequal numbers of scored tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    operands = {
        "hidden": normal(sequences, TIME, FEATURES),
        "weight": normal(VOCABULARY, FEATURES),
        "bias": normal(VOCABULARY),
    }
    labels = torch.randint(VOCABULARY, (sequences, TIME), generator=generator)
    for sequence in range(sequences):
        labels[sequence, : 1 + sequence % 3] = -100
        labels[sequence, TIME - sequence % 2 :] = -100
    return operands, labels


def pack(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same sequences without the padding at their ends."""
    ends = [TIME - sequence % 2 for sequence in range(hidden.shape[0])]
    kept = torch.cat([torch.arange(TIME) < end for end in ends])
    bounds = torch.tensor([0, *itertools.accumulate(ends)])
    return hidden.flatten(0, 1)[kept], labels.flatten()[kept], bounds


def leaves_of(operands: Operands, dtype: torch.dtype | None = None) -> Operands:
    return {name: value.to(dtype or value.dtype, copy=True).requires_grad_() for name, value in operands.items()}


def composed(operands: Operands, labels: Tensor, average_logps: bool, options: dict[str, Any]) -> Tensor:
    """Sequence log-probs from the logits themselves, float64."""
    z = operands["hidden"].double() @ operands["weight"].double().T + operands["bias"].double()
    kept = {name: options[name] for name in ("cu_seqlens", "ld_alpha", "shared_lengths", "shift") if name in options}
    return reference.sequence_logprobs(z, labels, reduction="mean" if average_logps else "sum", **kept)


def incoming(loss: Tensor) -> Tensor:
    return torch.linspace(0.7, 2.1, loss.numel(), dtype=torch.float64).to(loss.dtype).view(loss.shape)


def assert_near(found: Tensor, truth: Tensor, dtype: torch.dtype, name: str) -> None:
    assert found.shape == truth.shape, name
    assert found.dtype == dtype, name
    size = truth.abs().max().item() if name.startswith("d") else max(1.0, truth.abs().max().item())
    error = (found.detach().double() - truth.detach()).abs().max().item()
    assert error <= RELATIVE[dtype] * size, f"{name}: {error:.2e} of {size:.2e}"


def gradients(leaves: Operands) -> dict[str, Tensor]:
    assert all(leaf.grad is not None for leaf in leaves.values())
    return {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


class TestDpoAgainstTheDefinition:
    @packages
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize("source", ["log-probs", "hidden states", "free"])
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    def test_every_combination(
        self, packed: bool, reduction: str, source: str, dtype: torch.dtype, package: Any
    ) -> None:
        operands, labels = make(dtype=dtype)
        others, _ = make(dtype=dtype, seed=1)
        shared: dict[str, Any] = {"stats": ("lse", "is_top1"), "reduction": reduction}
        if packed:
            others["hidden"], _, _ = pack(others["hidden"], labels)
            operands["hidden"], labels, shared["cu_seqlens"] = pack(operands["hidden"], labels)
        for smoothing, average, alpha in COMBINATIONS:
            options = {**shared, "label_smoothing": smoothing, "beta": 0.3, "ld_alpha": alpha}
            ref = composed(others, labels, average, options).chunk(2)
            truth_leaves = leaves_of(operands, torch.float64)
            chosen, rejected = composed(truth_leaves, labels, average, options).chunk(2)
            given = {} if source == "free" else {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
            truth = reference.dpo_loss(
                chosen, rejected, **given, beta=0.3, label_smoothing=smoothing, reduction=reduction,
                reference_free=source == "free",
            )  # fmt: skip
            truth.loss.backward(incoming(truth.loss))
            wanted = {**dict(zip(FIELDS, (*truth, chosen, rejected), strict=True)), **gradients(truth_leaves)}
            if source == "log-probs":
                options |= {name: value.to(dtype) for name, value in given.items()}
            elif source == "hidden states":
                options |= {f"ref_{name}": value for name, value in others.items()}
            else:
                options["reference_free"] = True
            # Shorter than a pair, than all the pairs, and what is chosen for us; to the reference they are one.
            for chunk_rows in (1, 12, None) if package is fastpref and dtype == torch.float32 else (12,):
                leaves = leaves_of(operands)
                found = package.linear_dpo_loss(
                    leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"], average_logps=average,
                    chunk_rows=chunk_rows, **options,
                )  # fmt: skip
                assert found._fields == (*FIELDS, "lse", "is_top1")
                found.loss.backward(incoming(found.loss))
                values = {**found._asdict(), **gradients(leaves)}
                for name, value in wanted.items():
                    assert_near(values[name], value, dtype, name)
                torch.testing.assert_close(found.margins, found.chosen_rewards - found.rejected_rewards)
                assert torch.equal(found.accuracies, (found.chosen_rewards > found.rejected_rewards).to(dtype))

    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_statistics_are_the_log_probs_functions(self, chunk_rows: int | None) -> None:
        operands, labels = make()
        stats = (*ALL_STATS, "dropped_mass")
        arguments = operands["hidden"], operands["weight"], labels
        wanted = reference.linear_token_logprobs(*arguments, operands["bias"], stats=stats)
        found = fastpref.linear_dpo_loss(
            *arguments, bias=operands["bias"], stats=stats, reference_free=True, chunk_rows=chunk_rows
        )
        assert found._fields == (*FIELDS, *stats)
        for name in stats:
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name))

    @both
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    @pytest.mark.parametrize("mode", ["auto", "recompute"])
    def test_gradients_in_every_dtype(self, mode: str, chunk_rows: int | None, dtype: torch.dtype) -> None:
        operands, labels = make(dtype=dtype)

        def outcome(package: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
            leaves = leaves_of(operands, dtype)
            found = package.linear_dpo_loss(
                leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"], reference_free=True, mode=mode,
                chunk_rows=chunk_rows,
            )  # fmt: skip
            found.loss.backward(incoming(found.loss))
            return found, gradients(leaves)

        truth, true_gradients = outcome(reference, torch.float64)
        _, eager = outcome(reference, dtype)
        ours, found = outcome(fastpref, dtype)
        for name, value in ours._asdict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), getattr(truth, name), rtol=1e-5, atol=1e-4)
        for name, value in found.items():
            summed = true_gradients[name].abs().max().item() * 4  # a pair's two sides cancel
            assert_accurate(value, eager[name], true_gradients[name], name, summed=summed)

    @both
    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_a_loss_scale_comes_last(self, chunk_rows: int | None) -> None:
        """What float16 would lose of a gradient as small as this is there after a GradScaler's factor."""
        operands, labels = make(dtype=torch.float16)

        def outcome(package: Any, dtype: torch.dtype, scale: float) -> dict[str, Tensor]:
            leaves = leaves_of(operands, dtype)
            found = package.linear_dpo_loss(
                leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"], reference_free=True, beta=1e-6,
                chunk_rows=chunk_rows,
            )  # fmt: skip
            (found.loss * scale).backward()
            return gradients(leaves)

        truth = outcome(reference, torch.float64, 65536.0)
        eager = outcome(reference, torch.float16, 65536.0)
        for name, value in outcome(fastpref, torch.float16, 65536.0).items():
            assert value.any()
            assert_accurate(value, eager[name], truth[name], name, summed=truth[name].abs().max().item() * 4)

    @pytest.mark.parametrize("options", [{"softcap": 2.0, "temperature": 0.7, "logit_scale": 0.4}, {"shift": False}])
    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_scoring_options_hold_for_the_policy_and_the_reference(
        self, chunk_rows: int | None, options: dict[str, Any]
    ) -> None:
        operands, labels = make()
        others, _ = make(seed=1)
        refs = {f"ref_{name}": value for name, value in others.items()}
        results = []
        for package in (fastpref, reference):
            leaves = leaves_of(operands)
            found = package.linear_dpo_loss(
                leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"], **refs, chunk_rows=chunk_rows,
                **options,
            )  # fmt: skip
            found.loss.backward()
            results.append({**found._asdict(), **gradients(leaves)})
        for name, value in results[1].items():
            assert_near(results[0][name], value.detach(), torch.float64, name)

    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_shared_lengths(self, chunk_rows: int | None) -> None:
        operands, labels = make()
        options = {"ld_alpha": 0.4, "shared_lengths": torch.tensor([1, 2, 3, 100, 0, 1])}
        found = fastpref.linear_dpo_loss(
            operands["hidden"], operands["weight"], labels, bias=operands["bias"], reference_free=True,
            chunk_rows=chunk_rows, **options,
        )  # fmt: skip
        logps = composed(operands, labels, False, options)
        torch.testing.assert_close(torch.cat((found.chosen_logps, found.rejected_logps)), logps)

    def test_no_bias_and_a_reference_of_another_width(self) -> None:
        operands, labels = make()
        others = torch.randn(2 * PAIRS, TIME, 11).double(), torch.randn(VOCABULARY, 11).double()
        found = fastpref.linear_dpo_loss(
            operands["hidden"], operands["weight"], labels, ref_hidden=others[0], ref_weight=others[1]
        )
        logps = reference.sequence_logprobs(operands["hidden"] @ operands["weight"].T, labels).chunk(2)
        refs = reference.sequence_logprobs(others[0] @ others[1].T, labels).chunk(2)
        for got, wanted in zip(found, reference.dpo_loss(*logps, *refs), strict=False):
            torch.testing.assert_close(got, wanted)

    def test_reference_free_ignores_what_is_given(self) -> None:
        operands, labels = make()
        arguments = operands["hidden"], operands["weight"], labels
        wanted = fastpref.linear_dpo_loss(*arguments, reference_free=True)
        given = torch.full((PAIRS,), 9.0, dtype=torch.float64)
        found = fastpref.linear_dpo_loss(*arguments, given, given, reference_free=True)
        made = fastpref.linear_dpo_loss(
            *arguments, reference_free=True, ref_hidden=arguments[0], ref_weight=arguments[1]
        )
        for a, b, c in zip(wanted, found, made, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def plackett_luce(logps: Tensor) -> Tensor:
    """(G, K) best first -> (G,): −Σ_i [a_i − logΣ_{j≥i} exp a_j]."""
    a = 0.5 * logps
    rest = [a[:, i:].logsumexp(-1) for i in range(a.shape[1])]
    return -(a - torch.stack(rest, -1)).sum(-1)


class TestGroupsAgainstTheDefinition:
    @packages
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
    def test_plackett_luce_of_three(self, packed: bool, reduction: str, dtype: torch.dtype, package: Any) -> None:
        operands, labels = make(6, dtype)
        options: dict[str, Any] = {}
        if packed:
            operands["hidden"], labels, options["cu_seqlens"] = pack(operands["hidden"], labels)
        lengths = torch.tensor([1, 2, 3, 4, 0, 1])
        for average, ld in itertools.product((False, True), ({}, {"ld_alpha": 0.3, "shared_lengths": lengths})):
            truth_leaves = leaves_of(operands, torch.float64)
            logps = composed(truth_leaves, labels, average, {**options, **ld})
            groups = torch.stack((logps[0::2], logps[1::2]))  # sequence k·G + i is member k of group i, and G is 2
            losses = plackett_luce(groups)
            loss = {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]
            loss.backward(incoming(loss))
            wanted = {"loss": loss, "logps": groups, **gradients(truth_leaves)}
            for chunk_rows in (1, 18, None) if package is fastpref and dtype == torch.float32 else (18,):
                leaves = leaves_of(operands)
                found = package.linear_preference_loss(
                    leaves["hidden"], leaves["weight"], labels, plackett_luce, bias=leaves["bias"], group_size=3,
                    reduction=reduction, average_logps=average, stats=("entropy",), chunk_rows=chunk_rows,
                    **options, **ld,
                )  # fmt: skip
                assert found._fields == ("loss", "logps", "entropy")
                found.loss.backward(incoming(found.loss))
                values = {**found._asdict(), **gradients(leaves)}
                for name, value in wanted.items():
                    assert_near(values[name], value, dtype, name)

    @pytest.mark.parametrize("chunk_rows", [None, 1, 12])
    def test_of_pairs_it_is_dpo(self, chunk_rows: int | None) -> None:
        operands, labels = make()
        results = []
        for name, arguments in (
            (
                "linear_preference_loss",
                {"loss_fn": lambda a: -F.logsigmoid(0.1 * (a[:, 0] - a[:, 1])), "group_size": 2},
            ),
            ("linear_dpo_loss", {"reference_free": True}),
        ):
            leaves = leaves_of(operands)
            found = getattr(fastpref, name)(
                leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"], ld_alpha=0.5, chunk_rows=chunk_rows,
                **arguments,
            )  # fmt: skip
            found.loss.backward()
            results.append({"loss": found.loss, **gradients(leaves)})
        for name, value in results[0].items():
            assert_near(value, results[1][name].detach(), torch.float64, name)

    @pytest.mark.parametrize("group_size", [1, 6])
    @pytest.mark.parametrize("chunk_rows", [None, 1])
    def test_groups_of_one_and_of_all(self, chunk_rows: int | None, group_size: int) -> None:
        operands, labels = make()
        found = fastpref.linear_preference_loss(
            operands["hidden"], operands["weight"], labels, lambda a: a.exp().sum(-1), bias=operands["bias"],
            group_size=group_size, reduction="none", chunk_rows=chunk_rows,
        )  # fmt: skip
        logps = composed(operands, labels, False, {}).view(group_size, -1).T
        torch.testing.assert_close(found.logps, logps)
        torch.testing.assert_close(found.loss, logps.exp().sum(-1))


def dpo(leaves: Operands, labels: Tensor, **options: Any) -> Any:
    return fastpref.linear_dpo_loss(
        leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), reference_free=True, **options
    )


def ranked(leaves: Operands, labels: Tensor, **options: Any) -> Any:
    return fastpref.linear_preference_loss(
        leaves["hidden"], leaves["weight"], labels, plackett_luce, bias=leaves.get("bias"), group_size=3, **options
    )


@both
@pytest.mark.parametrize("loss", [dpo, ranked])
@pytest.mark.parametrize("chunk_rows", [None, 1, 18])
class TestGraph:
    def test_only_the_loss_is_differentiable(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        found = loss(leaves_of(operands), labels, chunk_rows=chunk_rows, stats=("entropy", "lse", "dropped_mass"))
        assert [name for name, value in found._asdict().items() if value.requires_grad] == ["loss"]
        assert found._fields[-3:] == ("entropy", "lse", "dropped_mass")
        assert found.entropy.shape == (2 * PAIRS, TIME - 1)
        assert not found.dropped_mass.any()

    def test_no_grad(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        leaves = leaves_of(operands)
        wanted = loss(leaves, labels, chunk_rows=chunk_rows)
        with torch.no_grad():
            found = loss(leaves, labels, chunk_rows=chunk_rows)
        for got, value in zip(found, wanted, strict=True):
            assert not got.requires_grad
            torch.testing.assert_close(got, value.detach())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
    def test_retain_graph_gives_the_same_gradient_again(
        self, dtype: torch.dtype, chunk_rows: int | None, loss: Callable[..., Any]
    ) -> None:
        operands, labels = make(dtype=dtype)
        leaves = leaves_of(operands)
        value = loss(leaves, labels, chunk_rows=chunk_rows).loss
        inputs = list(leaves.values())
        first = torch.autograd.grad(3.0 * value, inputs, retain_graph=True)
        second = torch.autograd.grad(3.0 * value, inputs, retain_graph=True)
        single = torch.autograd.grad(value, inputs, retain_graph=True)
        for one, other, alone in zip(first, second, single, strict=True):
            assert torch.equal(one, other)
            close = 2 * torch.finfo(dtype).eps * one.abs().max().item()
            torch.testing.assert_close(one, 3 * alone, rtol=0, atol=max(close, 1e-6))
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()

    @pytest.mark.parametrize(
        "frozen", [("weight", "bias"), ("hidden", "bias"), ("hidden", "weight"), ("weight",)], ids=",".join
    )
    def test_frozen_operands_get_no_gradient(
        self, frozen: tuple[str, ...], chunk_rows: int | None, loss: Callable[..., Any]
    ) -> None:
        operands, labels = make()
        wanted, leaves = leaves_of(operands), leaves_of(operands)
        for name in frozen:
            leaves[name].requires_grad_(False)
        loss(wanted, labels, chunk_rows=chunk_rows).loss.backward()
        loss(leaves, labels, chunk_rows=chunk_rows).loss.backward()
        for name, leaf in leaves.items():
            if name in frozen:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(leaf.grad, wanted[name].grad)

    def test_expanded_incoming_gradient(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        found = []
        for expand in (True, False):
            leaves = leaves_of(operands)
            losses = loss(leaves, labels, chunk_rows=chunk_rows, reduction="none").loss
            upstream = torch.tensor(1.7, dtype=torch.float64).expand(losses.shape)
            losses.backward(upstream if expand else upstream.contiguous())
            found.append(gradients(leaves))
        for name, value in found[0].items():
            assert torch.equal(value, found[1][name])

    def test_gradients_accumulate(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        once, twice = leaves_of(operands), leaves_of(operands)
        loss(once, labels, chunk_rows=chunk_rows).loss.backward()
        for _ in range(2):
            loss(twice, labels, chunk_rows=chunk_rows).loss.backward()
        for name, value in gradients(twice).items():
            torch.testing.assert_close(value, 2 * gradients(once)[name])

    @pytest.mark.usefixtures("unpoisoned")
    def test_two_runs_agree_bit_for_bit(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make(dtype=torch.float32)
        runs = []
        for _ in range(2):
            leaves = leaves_of(operands)
            found = loss(leaves, labels, chunk_rows=chunk_rows)
            found.loss.backward()
            runs.append((*found, *gradients(leaves).values()))
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)

    def test_everything_masked(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        operands["hidden"].fill_(math.nan)
        leaves = leaves_of(operands)
        found = loss(leaves, torch.full_like(labels, -100), chunk_rows=chunk_rows)
        found.loss.backward()
        assert found.loss.isfinite()
        for value in gradients(leaves).values():
            assert (value == 0).all()

    def test_no_sequences(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        operands["hidden"] = operands["hidden"][:0]
        for reduction in ("mean", "sum"):
            leaves = leaves_of(operands)
            found = loss(leaves, labels[:0], chunk_rows=chunk_rows, reduction=reduction)
            found.loss.backward()
            assert found.loss.item() == 0
            assert not any(value.any() for value in gradients(leaves).values())

    def test_nan_in_a_row_that_is_not_scored_has_no_effect(
        self, chunk_rows: int | None, loss: Callable[..., Any]
    ) -> None:
        operands, labels = make()
        runs = []
        for poisoned in (False, True):
            if poisoned:
                operands["hidden"][:, -1] = math.nan
                operands["hidden"][2, :2] = math.nan
            leaves = leaves_of(operands)
            found = loss(leaves, labels, chunk_rows=chunk_rows)
            found.loss.backward()
            runs.append((*found, *gradients(leaves).values()))
        for one, other in zip(*runs, strict=True):
            assert torch.equal(one, other)

    def test_nan_in_a_scored_row_harms_its_group_alone(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        clean = loss(operands, labels, chunk_rows=chunk_rows, reduction="none").loss
        operands["hidden"][1, 4] = math.nan
        found = loss(operands, labels, chunk_rows=chunk_rows, reduction="none").loss
        assert found.isnan().nonzero().flatten().tolist() == [1]
        torch.testing.assert_close(found[~found.isnan()], clean[~found.isnan()])

    def test_label_out_of_range_is_named(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        labels[4, 3] = VOCABULARY
        with pytest.raises(IndexError, match=rf"{VOCABULARY}\b.*\[4, 2\].*\[0, {VOCABULARY}\)"):
            loss(leaves_of(operands), labels, chunk_rows=chunk_rows)

    def test_autocast(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make(dtype=torch.float32)
        leaves = leaves_of(operands)
        rounded = leaves_of({name: value.bfloat16() for name, value in operands.items()}, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(leaves, labels, chunk_rows=chunk_rows)
        found.loss.backward()
        truth = loss(rounded, labels)
        truth.loss.backward()
        for value, wanted in zip(found, truth, strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-4)
        for name, value in gradients(leaves).items():
            assert value.dtype == torch.float32
            wanted = gradients(rounded)[name]
            torch.testing.assert_close(value.double(), wanted, rtol=0, atol=0.02 * wanted.abs().max().item())

    def test_int32_labels_and_strided_operands(self, chunk_rows: int | None, loss: Callable[..., Any]) -> None:
        operands, labels = make()
        wanted = leaves_of(operands)
        loss(wanted, labels, chunk_rows=chunk_rows).loss.backward()
        leaves = leaves_of(operands)
        strided = {
            "hidden": leaves["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
            "weight": leaves["weight"].T.contiguous().T,
            "bias": leaves["bias"].repeat_interleave(2)[::2],
        }
        loss(strided, labels.int().T.contiguous().T, chunk_rows=chunk_rows).loss.backward()
        for name, value in gradients(leaves).items():
            torch.testing.assert_close(value, gradients(wanted)[name])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("unpoisoned", "fresh_compiler")
@pytest.mark.parametrize("stats", [(), ("entropy",)], ids=["plain", "statistics"])
@pytest.mark.parametrize("pairs_of_a_chunk", [1, PAIRS])
def test_dpo_compiles_to_one_graph(stats: tuple[str, ...], pairs_of_a_chunk: int) -> None:
    operands, labels = make(dtype=torch.float32)
    chunk_rows = pairs_of_a_chunk * 2 * labels.shape[1]
    refs = torch.full((PAIRS,), -15.0), torch.full((PAIRS,), -16.0)

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ref: tuple[Tensor, Tensor]) -> Any:
        return fastpref.linear_dpo_loss(hidden, weight, labels, *ref, bias=bias, stats=stats, chunk_rows=chunk_rows)

    runs = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = leaves_of(operands)
        found = function(*leaves.values(), labels, refs)
        found.loss.backward()
        runs.append({**found._asdict(), "margins": found.margins, **gradients(leaves)})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-6, atol=1e-6)


OPERANDS, LABELS = make()
REF = torch.zeros(PAIRS, dtype=torch.float64)
PACKED, PACKED_LABELS, BOUNDS = pack(OPERANDS["hidden"], LABELS)
GIVEN: dict[str, Any] = {"ref_chosen_logps": REF, "ref_rejected_logps": REF}
HIDDEN_REF: dict[str, Any] = {"ref_hidden": OPERANDS["hidden"], "ref_weight": OPERANDS["weight"]}
# What is wrong: the arguments that differ from a good call, the error, and what its text must hold.
REFUSED_DPO: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "no reference": ({}, ValueError, ("ref_chosen_logps", "ref_hidden", "reference_free")),
    "half a reference": ({"ref_chosen_logps": REF}, ValueError, ("ref_rejected_logps", "reference_free")),
    "both references": ({**GIVEN, **HIDDEN_REF}, ValueError, ("not both", "ref_chosen_logps", "ref_hidden")),
    "both references, free": (
        {**GIVEN, **HIDDEN_REF, "reference_free": True}, ValueError, ("not both", "ref_rejected_logps", "ref_weight"),
    ),
    "ref_hidden alone": ({"ref_hidden": OPERANDS["hidden"]}, ValueError, ("ref_weight", "ref_hidden")),
    "ref_weight alone": ({"ref_weight": OPERANDS["weight"]}, ValueError, ("ref_hidden", "ref_weight")),
    "ref_bias alone": ({"ref_bias": OPERANDS["bias"]}, ValueError, ("ref_hidden", "ref_bias")),
    "ref_bias beside log-probs": ({**GIVEN, "ref_bias": OPERANDS["bias"]}, ValueError, ("not both", "ref_bias")),
    "ref_hidden of another shape": (
        {**HIDDEN_REF, "ref_hidden": OPERANDS["hidden"][:, 1:]}, ValueError, ("labels", "ref_hidden", "(6, 6)"),
    ),
    "ref_weight of another width": (
        {**HIDDEN_REF, "ref_weight": OPERANDS["weight"][:, 1:]}, ValueError, ("ref_weight", "ref_hidden", "(23, 4)"),
    ),
    "ref_weight of another dtype": (
        {**HIDDEN_REF, "ref_weight": OPERANDS["weight"].float()}, TypeError, ("ref_weight", "torch.float32"),
    ),
    "an odd number of sequences": (
        {**GIVEN, "hidden": OPERANDS["hidden"][:5], "labels": LABELS[:5]}, ValueError, ("even", "5", "rejected"),
    ),
    "an odd number of packed sequences": (
        {**GIVEN, "hidden": PACKED, "labels": PACKED_LABELS, "cu_seqlens": BOUNDS[[0, 1, 2, 6]]}, ValueError,
        ("even", "3"),
    ),
    "one sequence": (
        {**GIVEN, "hidden": OPERANDS["hidden"][0], "labels": LABELS[0]}, ValueError, ("even", "1", "rejected"),
    ),
    "references of another length": ({**GIVEN, "ref_chosen_logps": REF[:2]}, ValueError, ("ref_chosen_logps", "(2,)")),
    "references of integers": ({**GIVEN, "ref_chosen_logps": REF.long()}, TypeError, ("ref_chosen_logps", "int64")),
    "beta 0": ({**GIVEN, "beta": 0.0}, ValueError, ("beta", "0.0", "above 0")),
    "loss_type unknown": ({**GIVEN, "loss_type": "sigmoidal"}, ValueError, ("loss_type", "'sigmoidal'", "'sigmoid'")),
    "label_smoothing 2": ({**GIVEN, "label_smoothing": 2.0}, ValueError, ("label_smoothing", "2.0")),
    "reduction unknown": ({**GIVEN, "reduction": "max"}, ValueError, ("reduction", "'max'", "'none'")),
    "weight of another width": ({**GIVEN, "weight": OPERANDS["weight"][:, 1:]}, ValueError, ("weight", "(23, 4)")),
    "bias elsewhere": ({**GIVEN, "bias": OPERANDS["bias"].to("meta")}, ValueError, ("bias", "meta", "cpu")),
    "mode unknown": ({**GIVEN, "mode": "fast"}, ValueError, ("mode", "'fast'", "'save'")),
    "chunk_rows 0": ({**GIVEN, "chunk_rows": 0}, ValueError, ("chunk_rows", "0")),
    "a statistic unknown": ({**GIVEN, "stats": ("kl",)}, ValueError, ("stats", "'kl'", "'dropped_mass'")),
    "shared_lengths without ld_alpha": (
        {**GIVEN, "shared_lengths": LABELS[:, 0]}, ValueError, ("shared_lengths", "ld_alpha"),
    ),
}  # fmt: skip
REFUSED_GROUPS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "groups that do not divide": ({"group_size": 4}, ValueError, ("group_size", "4", "6")),
    "group_size 0": ({"group_size": 0}, ValueError, ("group_size", "0", "1 or more")),
    "group_size a float": ({"group_size": 3.0}, TypeError, ("group_size", "3.0", "int")),
    "one loss for all": ({"loss_fn": lambda a: a.sum()}, ValueError, ("loss_fn", "shape ()", "(2,)")),
    "a loss for each member": ({"loss_fn": lambda a: a}, ValueError, ("loss_fn", "shape (2, 3)", "(2,)")),
    "no tensor": ({"loss_fn": lambda a: 1.0}, TypeError, ("loss_fn", "float 1.0", "(2,)")),
    "a tensor of bools": ({"loss_fn": lambda a: a[:, 0] > 0}, TypeError, ("loss_fn", "torch.bool", "(2,)")),
    "halves of three": ({"ld_alpha": 0.5}, ValueError, ("ld_alpha", "shared_lengths", "group_size=3")),
    "reduction unknown": ({"reduction": "max"}, ValueError, ("reduction", "'max'", "'none'")),
    "hidden of one dimension": ({"hidden": OPERANDS["bias"]}, ValueError, ("hidden", "(23,)", "(B, T, H)")),
}


@packages
@pytest.mark.parametrize(("changed", "kind", "words"), REFUSED_DPO.values(), ids=REFUSED_DPO)
def test_dpo_refuses(package: Any, changed: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        package.linear_dpo_loss(**{**OPERANDS, "labels": LABELS, **changed})
    for word in words:
        assert word in str(caught.value)


@packages
@pytest.mark.parametrize(("changed", "kind", "words"), REFUSED_GROUPS.values(), ids=REFUSED_GROUPS)
def test_groups_refuse(package: Any, changed: dict[str, Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    arguments = {**OPERANDS, "labels": LABELS, "loss_fn": plackett_luce, "group_size": 3, **changed}
    with pytest.raises(kind) as caught:
        package.linear_preference_loss(**arguments)
    for word in words:
        assert word in str(caught.value)
