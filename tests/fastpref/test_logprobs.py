"""Log-probs from logits: values, statistics and gradients against the definition, and what the kernels promise."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import reference, sequence_logprobs, token_logprobs
from tests.helpers.marks import both, dtypes, narrow
from tests.tolerance import ALL_STATS, DTYPES, assert_accurate, assert_matches_reference, run

VOCABULARIES = (1, 2, 3, 7, 16, 31, 61, 127, 257, 1023, 1025, 4099, 50257)
TRANSFORMS = {
    "temperature": {"temperature": 0.7},
    "logit_scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 5.0},
    "all": {"temperature": 1.3, "logit_scale": 0.6, "softcap": 4.0},
}


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return logits of `shape`, and labels with the first and last vocabulary entries and three tenths ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    labels[..., -2], labels[..., -1] = 0, shape[-1] - 1
    return logits, labels


def gradient(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    return run(token_logprobs, logits, labels, lambda z: z, options)["gradient"]


class TestAgainstTheDefinition:
    @dtypes
    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    def test_vocabulary(self, vocabulary: int, dtype: torch.dtype) -> None:
        # Rows enough that eager's error, the largest of them all, is not a matter of luck.
        logits, labels = make((2, 4, vocabulary) if vocabulary > 5000 else (4, 9, vocabulary), dtype)
        assert_matches_reference("token_logprobs", logits, labels, stats=ALL_STATS)

    @both
    @dtypes
    @pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
    @pytest.mark.parametrize("vocabulary", [37, 2053])
    def test_transform(self, vocabulary: int, options: dict[str, float], dtype: torch.dtype) -> None:
        logits, labels = make((4, 9, vocabulary), dtype)
        assert_matches_reference("token_logprobs", logits, labels, stats=ALL_STATS, **options)

    @both
    @dtypes
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("shift", [True, False])
    def test_sequences(self, shift: bool, reduction: str, dtype: torch.dtype) -> None:
        logits, labels = make((3, 9, 53), dtype)
        labels[1] = -100
        assert_matches_reference("sequence_logprobs", logits, labels, shift=shift, reduction=reduction, stats=ALL_STATS)

    @pytest.mark.parametrize("stat", ALL_STATS)
    def test_one_statistic_alone(self, stat: str) -> None:
        logits, labels = make((2, 4, 131))
        result = assert_matches_reference("token_logprobs", logits, labels, stats=(stat,))
        assert list(result) == ["logprobs", stat, "gradient"]

    def test_statistics_come_in_the_order_asked_for(self) -> None:
        logits, labels = make((2, 4, 131))
        result = token_logprobs(logits, labels, stats=("is_top1", "lse", "entropy"))
        assert result._fields == ("logprobs", "is_top1", "lse", "entropy")
        torch.testing.assert_close(result.lse, reference.token_logprobs(logits, labels, stats=("lse",)).lse)
        assert result.is_top1.dtype == torch.bool

    def test_statistics_carry_no_gradient_but_entropy(self) -> None:
        logits, labels = make((2, 4, 31))
        result = token_logprobs(logits.requires_grad_(), labels, stats=ALL_STATS)
        assert {name for name, value in result._asdict().items() if value.requires_grad} == {"logprobs", "entropy"}

    def test_entropy_alone_has_its_gradient(self) -> None:
        logits, labels = make((2, 4, 131))

        def grad(package: Any, dtype: torch.dtype) -> Tensor:
            leaf = logits.to(dtype, copy=True).requires_grad_()
            entropy = package.token_logprobs(leaf, labels, stats=("entropy",)).entropy
            return torch.autograd.grad(entropy.sum(), leaf)[0]

        eager, truth = grad(reference, torch.float32), grad(reference, torch.float64)
        assert_accurate(grad(fastpref, torch.float32), eager, truth)

    def test_top1_of_equal_logits_is_the_first(self) -> None:
        logits = torch.zeros(1, 3, 1000)
        logits[..., [400, 41, 977]] = 2.0
        labels = torch.tensor([[41, 400, 977]])
        assert token_logprobs(logits, labels, shift=False, stats=("is_top1",)).is_top1.tolist() == [
            [True, False, False]
        ]

    @pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5])
    def test_ignore_index(self, ignore_index: int) -> None:
        logits, labels = make((2, 6, 17))
        labels[labels == -100] = ignore_index
        result = assert_matches_reference("token_logprobs", logits, labels, ignore_index=ignore_index, stats=ALL_STATS)
        ignored = labels[:, 1:] == ignore_index
        assert ignored.any()
        for name in ("logprobs", *ALL_STATS):
            assert not result[name][ignored].any(), name

    def test_int32_and_strided_labels(self) -> None:
        logits, labels = make((3, 6, 17))
        wanted = token_logprobs(logits, labels)
        assert torch.equal(token_logprobs(logits, labels.int()), wanted)
        assert torch.equal(token_logprobs(logits, labels.T.contiguous().T), wanted)
        assert torch.equal(token_logprobs(logits, labels.repeat_interleave(2, 1)[:, ::2]), wanted)

    def test_two_dimensional_logits_are_one_sequence(self) -> None:
        logits, labels = make((6, 17))
        assert assert_matches_reference("token_logprobs", logits, labels, stats=ALL_STATS)["logprobs"].shape == (5,)
        assert assert_matches_reference("sequence_logprobs", logits, labels)["logprobs"].shape == (1,)

    def test_float64_keeps_more_than_float32(self) -> None:
        logits, labels = make((1, 3, 100), torch.float64)
        close = torch.testing.assert_close
        close(token_logprobs(logits, labels), reference.token_logprobs(logits, labels), rtol=1e-14, atol=1e-14)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    # name: the base's shape, and the view of it that has shape (3, 5, 37)
    "transposed batch and time": ((5, 3, 37), lambda base: base.transpose(0, 1)),
    "transposed vocabulary": ((3, 37, 5), lambda base: base.transpose(1, 2)),
    "padded head": ((3, 5, 40), lambda base: base[..., :37]),
    "padded head, not from its start": ((3, 5, 40), lambda base: base[..., 3:]),
    "sliced time": ((3, 9, 37), lambda base: base[:, 3:-1]),
    "every second time": ((3, 10, 37), lambda base: base[:, ::2]),
    "every second vocabulary entry": ((3, 5, 74), lambda base: base[..., ::2]),
    "expanded batch": ((1, 5, 37), lambda base: base.expand(3, 5, 37)),
    "expanded time": ((3, 1, 37), lambda base: base.expand(3, 5, 37)),
    "expanded vocabulary": ((3, 5, 1), lambda base: base.expand(3, 5, 37)),
    "windows that overlap": ((400,), lambda base: base.as_strided((3, 5, 37), (90, 11, 1))),
}


@both
class TestStrides:
    @narrow
    @pytest.mark.parametrize(("shape", "layout"), LAYOUTS.values(), ids=LAYOUTS)
    def test_logits(self, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        base = (3 * torch.randn(shape)).to(dtype)
        _, labels = make((3, 5, 37))
        assert layout(base).shape == (3, 5, 37)
        assert_matches_reference("token_logprobs", base, labels, layout, stats=ALL_STATS)
        assert_matches_reference("sequence_logprobs", base, labels, layout)

    @pytest.mark.parametrize("kind", ["expanded scalar", "expanded row", "transposed", "every second"])
    def test_incoming_gradient(self, kind: str) -> None:
        logits, labels = make((3, 5, 37))
        incoming = {
            "expanded scalar": torch.tensor(1.7).expand(3, 4),
            "expanded row": torch.randn(4).expand(3, 4),
            "transposed": torch.randn(4, 3).T,
            "every second": torch.randn(3, 8)[:, ::2],
        }[kind]
        both = []
        for grad in (incoming, incoming.contiguous()):
            leaf = logits.clone().requires_grad_()
            result = token_logprobs(leaf, labels, stats=("entropy",))
            torch.autograd.backward([result.logprobs, result.entropy], [grad, grad])
            both.append(leaf.grad)
        assert torch.equal(*both)

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_incoming_gradient_of_sequences(self, reduction: str) -> None:
        logits, labels = make((3, 5, 37))
        both = []
        for grad in (torch.tensor(1.7).expand(3), torch.full((3,), 1.7)):
            leaf = logits.clone().requires_grad_()
            sequence_logprobs(leaf, labels, reduction=reduction).backward(grad)
            both.append(leaf.grad)
        assert torch.equal(*both)


@both
class TestPacked:
    bounds = torch.tensor([0, 0, 4, 5, 5, 11, 13, 13])

    @narrow
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("shift", [True, False])
    def test_against_the_definition(self, shift: bool, reduction: str, dtype: torch.dtype) -> None:
        logits, labels = make((13, 29), dtype)
        result = assert_matches_reference(
            "sequence_logprobs",
            logits,
            labels,
            cu_seqlens=self.bounds,
            shift=shift,
            reduction=reduction,
            stats=ALL_STATS,
        )
        assert result["logprobs"].shape == (7,)
        assert result["entropy"].shape == (13 - shift,)

    def test_equals_every_sequence_on_its_own(self) -> None:
        logits, labels = make((13, 29))
        packed = sequence_logprobs(logits, labels, cu_seqlens=self.bounds)
        alone = [sequence_logprobs(logits[a:b], labels[a:b]) for a, b in pairwise(self.bounds.tolist())]
        assert torch.equal(packed, torch.cat(alone))

    def test_shift_never_crosses_a_boundary(self) -> None:
        logits, labels = make((13, 29))
        labels[labels == -100] = 3
        grad = run(sequence_logprobs, logits, labels, lambda z: z, {"cu_seqlens": self.bounds})["gradient"]
        last = self.bounds[1:][self.bounds[1:] > self.bounds[:-1]] - 1
        unscored = torch.zeros(13, dtype=torch.bool).index_fill(0, last, True)
        assert torch.equal((grad == 0).all(-1), unscored)

    def test_accepted_shapes_agree(self) -> None:
        logits, labels = make((13, 29))
        wanted = sequence_logprobs(logits, labels, cu_seqlens=self.bounds, stats=("lse",))
        for z, y in ((logits[None], labels), (logits[None], labels[None])):
            got = sequence_logprobs(z, y, cu_seqlens=self.bounds.int(), stats=("lse",))
            assert torch.equal(got.logprobs, wanted.logprobs)
            assert got.lse.shape == (*y.shape[:-1], 12)
            assert torch.equal(got.lse.reshape(-1), wanted.lse)

    @pytest.mark.parametrize("layout", [lambda z: z.T.contiguous().T, lambda z: torch.cat((z, z), 1)[:, :29]])
    def test_strides(self, layout: Callable[[Tensor], Tensor]) -> None:
        logits, labels = make((13, 29))
        assert_matches_reference("sequence_logprobs", logits, labels, layout, cu_seqlens=self.bounds)

    @pytest.mark.parametrize("bounds", [[0, 5, 4, 13], [1, 13], [0, 12], [0, 14], [0, -1, 13], [13], [0]])
    def test_bad_boundaries_are_refused(self, bounds: list[int]) -> None:
        logits, labels = make((13, 29))
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 .*13"):
            sequence_logprobs(logits, labels, cu_seqlens=torch.tensor(bounds))


@both
class TestLengthDesensitised:
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_halves_share_the_shorter_length(self, packed: bool, reduction: str) -> None:
        logits, labels = make((4, 9, 29))
        labels[0, 2:] = labels[3, 4:] = -100
        bounds = None
        if packed:
            bounds = torch.tensor([0, 9, 18, 27, 36])
            logits, labels = logits.reshape(36, 29), labels.reshape(36)
        options = {"cu_seqlens": bounds, "ld_alpha": 0.25, "reduction": reduction}
        assert_matches_reference("sequence_logprobs", logits, labels, **options)

    def test_given_lengths(self) -> None:
        logits, labels = make((3, 9, 29))
        lengths = torch.tensor([0, 2, 100])
        got = assert_matches_reference("sequence_logprobs", logits, labels, ld_alpha=0.5, shared_lengths=lengths)
        full = sequence_logprobs(logits, labels)
        torch.testing.assert_close(got["logprobs"][0], full[0] / 2)
        torch.testing.assert_close(got["logprobs"][2], full[2])

    def test_alpha_one_changes_nothing_and_alpha_zero_ends_the_gradient(self) -> None:
        logits, labels = make((2, 9, 29))
        labels[:] = 3
        labels[1, 4:] = -100  # 8 scored tokens against 3
        assert torch.equal(sequence_logprobs(logits, labels, ld_alpha=1.0), sequence_logprobs(logits, labels))
        grad = run(sequence_logprobs, logits, labels, lambda z: z, {"ld_alpha": 0.0})["gradient"]
        assert (grad[0] == 0).all(-1).tolist() == [False] * 3 + [True] * 6

    def test_odd_number_of_sequences_is_refused(self) -> None:
        logits, labels = make((3, 4, 5))
        with pytest.raises(ValueError, match=r"ld_alpha.*even.*3"):
            sequence_logprobs(logits, labels, ld_alpha=0.5)


class TestDigits:
    """Log-probs where a float32 log-softmax loses digits, or a kernel anchored at the label would overflow."""

    @both
    @pytest.mark.parametrize("vocabulary", [2, 3, 1000, 50257])
    @pytest.mark.parametrize("rest", [1e-5, 1e-7, 1e-9])
    def test_logp_near_zero_keeps_its_digits(self, rest: float, vocabulary: int) -> None:
        # float32 log_softmax answers 1.19e-7 or 0 for 1 - p = 1e-7.
        logits = torch.full((1, vocabulary), math.log(rest / (vocabulary - 1)))
        logits[0, vocabulary // 2] = 0
        logits += torch.tensor([[8.0]])
        gaps = logits[0].double() - 8.0
        gaps[vocabulary // 2] = -math.inf
        truth = -math.log1p(math.fsum(gaps.exp().tolist()))
        assert abs(truth / -rest - 1) < 1e-4
        ours = token_logprobs(logits, torch.tensor([vocabulary // 2]), shift=False)
        assert abs(ours.item() / truth - 1) < 4e-6

    @both
    @dtypes
    @pytest.mark.parametrize("gap", [30, 60, 88, 89, 104, 115, 130, 60000])
    def test_gap_between_the_top_logit_and_the_label(self, gap: int, dtype: torch.dtype) -> None:
        logits, labels = make((1, 6, 331), dtype, scale=1.0)
        labels = labels.clamp(min=0)
        top = (labels + torch.tensor([1, 7, 100, 200, 330, 0])) % 331
        rows = torch.arange(5)  # the sixth stays ordinary: it sets the scale of the entropy's ulp
        logits[0, rows, labels[0, :5]] = 0
        logits[0, rows, top[0, :5]] = gap
        got = assert_matches_reference("token_logprobs", logits, labels, shift=False, stats=ALL_STATS)
        assert (got["logprobs"][0, :5] <= -0.99 * gap).all()

    @both
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_common_offset(self, offset: float, dtype: torch.dtype) -> None:
        logits, labels = make((2, 4, 1025), dtype)
        logits += offset
        got = assert_matches_reference("token_logprobs", logits, labels, stats=ALL_STATS)
        # All but lse and mean_logits are those of the logits without it, to full precision.
        centred = reference.token_logprobs(logits.double() - offset, labels, stats=ALL_STATS)
        for name in ("logprobs", "entropy", "log_sum_sq_probs"):
            torch.testing.assert_close(got[name], getattr(centred, name).to(dtype), rtol=2e-6, atol=2e-6)

    @both
    @dtypes
    @pytest.mark.parametrize("vocabulary", [1, 2, 5, 300, 4097])
    def test_logp_is_never_above_zero(self, vocabulary: int, dtype: torch.dtype) -> None:
        # The label is far above every other entry, level with it, or anywhere between.
        for seed, lead in enumerate((0.0, 1e-3, 1.0, 9.0, 16.7, 17.5, 40.0, 200.0)):
            logits, _ = make((4, 16, vocabulary), dtype, scale=1e-3, seed=seed)
            labels = torch.randint(vocabulary, (4, 16))
            logits.scatter_add_(-1, labels[..., None], torch.full((4, 16, 1), lead, dtype=dtype))
            logp = token_logprobs(logits, labels, shift=False)
            assert (logp <= 0).all()
            assert (sequence_logprobs(logits, labels, shift=False) <= 0).all()

    def test_outputs_are_never_narrower_than_float32(self) -> None:
        for dtype in DTYPES:
            logits, labels = make((2, 4, 31), dtype)
            result = token_logprobs(logits, labels, stats=ALL_STATS)
            wanted = torch.float64 if dtype == torch.float64 else torch.float32
            assert {value.dtype for name, value in result._asdict().items() if name != "is_top1"} == {wanted}


@both
class TestGradient:
    @dtypes
    @pytest.mark.parametrize("shift", [True, False])
    def test_is_full_shaped_with_exact_zeros_where_not_scored(self, shift: bool, dtype: torch.dtype) -> None:
        logits, labels = make((3, 6, 41), dtype)
        scored = torch.zeros(3, 6, dtype=torch.bool)
        if shift:
            scored[:, :-1] = labels[:, 1:] != -100
        else:
            scored = labels != -100
        logits[~scored] = math.nan  # nor is a row that is not scored ever read
        grad = gradient(logits, labels, shift=shift, stats=("entropy",))
        assert grad.shape == logits.shape
        assert grad.dtype == dtype
        assert (grad[~scored] == 0).all()
        assert (grad[scored] != 0).any(-1).all()

    def test_incoming_gradient_of_an_ignored_token_goes_nowhere(self) -> None:
        logits, labels = make((2, 5, 17))
        leaf = logits.requires_grad_()
        incoming = torch.ones(2, 4).masked_fill(labels[:, 1:] == -100, math.nan)
        token_logprobs(leaf, labels).backward(incoming)
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()

    def test_rows_sum_to_zero(self) -> None:
        logits, labels = make((2, 5, 1000), torch.float64)
        assert gradient(logits, labels, stats=("entropy",)).sum(-1).abs().max() < 1e-13

    def test_gradient_accumulates_over_two_uses(self) -> None:
        logits, labels = make((2, 5, 17), torch.float64)
        leaf = logits.clone().requires_grad_()
        (token_logprobs(leaf, labels).sum() + token_logprobs(leaf, labels, temperature=2.0).sum()).backward()
        other = logits.clone().requires_grad_()
        define = reference.token_logprobs
        (define(other, labels).sum() + define(other, labels, temperature=2.0).sum()).backward()
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-14, atol=1e-14)


INPLACE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda base: base.clone(),
    "transposed": lambda base: base.transpose(0, 1).contiguous().transpose(0, 1),
    "padded head": lambda base: torch.cat((base, base), -1)[..., :37],
    "sliced time": lambda base: torch.cat((base, base), 1)[:, :5],
    "every second vocabulary entry": lambda base: base.repeat_interleave(2, -1)[..., ::2],
}


@both
class TestInplaceBackward:
    @dtypes
    @pytest.mark.parametrize("layout", INPLACE_LAYOUTS.values(), ids=INPLACE_LAYOUTS)
    @pytest.mark.parametrize("name", ["token_logprobs", "sequence_logprobs"])
    def test_gives_the_same_gradient(self, name: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        logits, labels = make((3, 5, 37), dtype)
        function, options = getattr(fastpref, name), {"stats": ("entropy",), "softcap": 6.0}
        fresh = run(function, logits, labels, layout, options)["gradient"]
        assert torch.equal(
            run(function, logits, labels, layout, {**options, "inplace_backward": True})["gradient"], fresh
        )

    def test_packed(self) -> None:
        logits, labels = make((13, 29))
        options = {"cu_seqlens": TestPacked.bounds, "reduction": "mean"}
        fresh = run(sequence_logprobs, logits, labels, torch.clone, options)["gradient"]
        inplace = run(sequence_logprobs, logits, labels, torch.clone, {**options, "inplace_backward": True})["gradient"]
        assert torch.equal(inplace, fresh)

    def test_the_logits_storage_holds_the_gradient(self) -> None:
        values, labels = make((3, 5, 37))
        values[:, -1] = math.nan
        wanted = gradient(values, labels)
        logits = values.clone().requires_grad_().clone()
        received = []
        logits.register_hook(received.append)
        result = token_logprobs(logits, labels, inplace_backward=True)
        assert torch.equal(logits[:, :-1], values[:, :-1])  # until the backward they are untouched
        generator = torch.Generator().manual_seed(7)
        result.backward(torch.randn(result.shape, generator=generator))
        assert received[0].data_ptr() == logits.data_ptr()
        assert torch.equal(logits.detach(), wanted)

    def test_a_later_use_in_another_backward_raises(self) -> None:
        values, labels = make((2, 4, 7))
        logits = values.requires_grad_().clone()
        other = logits.square().sum()
        token_logprobs(logits, labels, inplace_backward=True).sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()

    def test_a_second_backward_raises(self) -> None:
        values, labels = make((2, 4, 7))
        result = token_logprobs(values.requires_grad_().clone(), labels, inplace_backward=True).sum()
        result.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()

    @pytest.mark.parametrize(
        "view",
        [
            lambda base: base[:1].expand(3, 5, 37),
            lambda base: base[:, :1].expand(3, 5, 37),
            lambda base: base[..., :1].expand(3, 5, 37),
            lambda base: base.as_strided((3, 5, 37), (90, 18, 1)),
        ],
        ids=["expanded batch", "expanded time", "expanded vocabulary", "overlapping"],
    )
    def test_shared_memory_is_refused(self, view: Callable[[Tensor], Tensor]) -> None:
        logits, labels = make((3, 5, 37))
        with pytest.raises(ValueError, match="inplace_backward"):
            token_logprobs(view(logits.requires_grad_().clone()), labels, inplace_backward=True)

    @pytest.mark.parametrize("view", [lambda leaf: leaf, lambda leaf: leaf[:, :-1], lambda leaf: leaf.view(3, 5, 37)])
    def test_a_leaf_or_a_view_of_one_is_refused(self, view: Callable[[Tensor], Tensor]) -> None:
        logits, _ = make((3, 5, 37))
        leaf = view(logits.requires_grad_())
        with pytest.raises(ValueError, match=r"inplace_backward.*leaf"):
            token_logprobs(leaf, torch.zeros(leaf.shape[:2], dtype=torch.long), inplace_backward=True)

    def test_logits_without_gradient_stay_as_they_are(self) -> None:
        logits, labels = make((3, 5, 37))
        before = logits.clone()
        assert torch.equal(token_logprobs(logits, labels, inplace_backward=True), token_logprobs(before, labels))
        assert torch.equal(logits, before)


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("stats", [(), ALL_STATS], ids=["plain", "statistics"])
class TestBits:
    @narrow
    @pytest.mark.parametrize("name", ["token_logprobs", "sequence_logprobs"])
    def test_two_runs_agree(self, name: str, dtype: torch.dtype, stats: tuple[str, ...]) -> None:
        logits, labels = make((4, 16, 5003), dtype)
        first, second = (run(getattr(fastpref, name), logits, labels, lambda z: z, {"stats": stats}) for _ in range(2))
        assert all(torch.equal(first[field], second[field]) for field in first)

    @pytest.mark.usefixtures("threads")
    @pytest.mark.parametrize("shape", [(4, 17, 5003), (1, 2, 50257)])
    def test_number_of_threads_does_not_matter(self, shape: tuple[int, ...], stats: tuple[str, ...]) -> None:
        logits, labels = make(shape)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(sequence_logprobs, logits, labels, lambda z: z, {"stats": stats}))
        for other in results[1:]:
            assert all(torch.equal(other[field], results[0][field]) for field in other)

    @both
    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_the_rest_of_the_batch_does_not_matter(self, reduction: str, stats: tuple[str, ...]) -> None:
        logits, labels = make((1, 33, 1031))
        weight = torch.randn(32)

        def results(logits: Tensor, labels: Tensor, at: int) -> list[Tensor]:
            """Return all results and gradients of the first 33 tokens of sequence `at`."""
            leaf = logits.clone().requires_grad_()
            result = sequence_logprobs(leaf, labels, reduction=reduction, stats=stats)
            logps, *statistics = result if stats else (result,)
            loss = 0.7 * logps[at]
            if stats:
                loss = loss + (weight * result.entropy[at, :32]).sum()
            gradient = torch.autograd.grad(loss, leaf)[0]
            return [logps[at], gradient[at, :33], *(values[at, :32] for values in statistics)]

        alone = results(logits, labels, 0)
        for batch, position, padding in ((2, 1, 0), (5, 0, 0), (5, 3, 0), (1, 0, 31), (7, 6, 95)):
            others, their_labels = make((batch, 33 + padding, 1031), seed=batch)
            their_labels[position] = -100
            others[position, :33], their_labels[position, :33] = logits[0], labels[0]
            together = results(others, their_labels, position)
            assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


MEMORY = """
import sys
import torch
from fastpref import sequence_logprobs

def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(rows, vocabulary, dtype, inplace, sliced):
    logits = torch.randn(2, rows, vocabulary, dtype=dtype).requires_grad_()
    held = logits * 1 if inplace else logits  # it is not a leaf that is written over
    if sliced:
        held = held[:, :-1, :-1]
    labels = torch.randint(vocabulary - 1, held.shape[:2])
    open("/proc/self/clear_refs", "w").write("5")  # the peak is now what is held
    before = peak()
    logps = sequence_logprobs(held, labels, inplace_backward=inplace)
    gradient, = torch.autograd.grad(logps.sum(), held)
    return peak() - before - (0 if inplace else gradient.numel() * gradient.element_size() / 2**20)

for name in sys.argv[1:]:
    dtype, *modes = name.split("-")
    case = getattr(torch, dtype), "inplace" in modes, "sliced" in modes
    step(2, 50304, *case)  # libraries, threads, and the scratch that is kept
    print(name, step(256, 50304, *case))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("native", "limit", "cases"),
    [
        ("1", 16, [f"{dtype}{mode}" for dtype in ("float32", "bfloat16") for mode in ("", "-sliced", "-inplace")]),
        ("0", 80, ["bfloat16"]),
    ],
    ids=["native", "eager"],
)
def test_no_copy_of_the_logits(native: str, limit: float, cases: list[str]) -> None:
    """Forward and backward of 49 or 98 MiB of logits hold little memory beyond the logits and their gradient."""
    # The threshold makes malloc give the logits' blocks back at once, so that none is there to be used unseen.
    environment = {**os.environ, "FASTPREF_NATIVE": native, "MALLOC_MMAP_THRESHOLD_": str(2**23)}
    command = [sys.executable, "-c", MEMORY, *cases]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    measured = dict(line.split() for line in done.stdout.splitlines())
    assert list(measured) == cases
    assert all(float(mebibytes) < limit for mebibytes in measured.values()), measured
