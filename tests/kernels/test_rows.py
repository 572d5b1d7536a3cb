"""The scored rows of a batch, where the host is told how many there are and where it is not."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref_kernels import linear
from fastpref_kernels.contract import UNSCORED
from fastpref_kernels.eager import linear as rows
from fastpref_kernels.linear import Rows, Tile
from fastpref_kernels.linear.backend import row_chunks
from tests.gpu_stand_in import on_gpu
from tests.host_waits import host_trace
from tests.tolerance import EVERY_STATISTIC

IGNORED = -100
PLAIN = (1.0, 1.0, None)


def a_batch() -> tuple[Tensor, Tensor]:
    """Labels (2, 6), of which five are scored where they are shifted, and the positions (2, 5) of those."""
    labels = torch.tensor([[7, -100, 3, 4, -100, 1], [5, -100, -100, -100, 2, 0]])
    return labels, labels[:, 1:] != IGNORED


class TestRows:
    @pytest.mark.parametrize("count", [None, 5, 9, 40])
    def test_are_in_the_order_of_their_positions(self, count: int | None) -> None:
        labels, scored = a_batch()
        found = Rows.of(labels, None, IGNORED, True, count)
        assert len(found) == min(count or 5, scored.numel())
        assert found.place[:5].tolist() == [1, 2, 4, 8, 9]
        assert found.source[:5].tolist() == [1, 2, 4, 9, 10]
        assert found.label[:5].tolist() == [3, 4, 1, 2, 0]
        assert (found.place[5:] >= scored.numel()).all()
        assert (found.source[5:] == labels.numel()).all()
        assert (found.label[5:] == UNSCORED).all()
        assert not found.invalid(None, 6, 8).any()

    @pytest.mark.parametrize("count", [None, 8])
    def test_values_go_to_their_positions_and_back(self, count: int | None) -> None:
        labels, scored = a_batch()
        found = Rows.of(labels, None, IGNORED, True, count)
        values = torch.arange(1.0, len(found) + 1).expand(3, -1) * torch.tensor([[1.0], [10.0], [100.0]])
        spread = found.spread(values, torch.float64)
        assert spread.dtype == torch.float64
        assert torch.equal(spread[1][scored], 10.0 * torch.arange(1.0, 6.0).double())
        assert not spread[:, ~scored].any()
        back = found.take(spread, slice(None), left_over=-1.0)
        assert torch.equal(back[:, :5], values[:, :5].double())
        assert (back[:, 5:] == -1.0).all()
        assert torch.equal(found.take(spread, slice(1, 4)), values[:, 1:4].double())

    def test_a_boolean_is_false_where_nothing_is_scored(self) -> None:
        labels, scored = a_batch()
        found = Rows.of(labels, None, IGNORED, True, None)
        assert torch.equal(found.spread(torch.ones(5), torch.bool), scored)

    @pytest.mark.parametrize("count", [0, 3])
    def test_more_than_there_is_room_for_are_invalid(self, count: int) -> None:
        labels, _ = a_batch()
        found = Rows.of(labels, None, IGNORED, True, count)
        assert len(found) == count
        assert found.invalid(None, 6, 8).all()

    @pytest.mark.parametrize("wrong", [-1, 8])
    def test_a_label_outside_of_the_vocabulary_is_invalid(self, wrong: int) -> None:
        labels, _ = a_batch()
        labels[0, 3] = wrong
        found = Rows.of(labels, None, IGNORED, True, 6)
        assert found.invalid(None, 6, 8).tolist() == [False, True, False, False, False, False]

    @pytest.mark.parametrize("bounds", [[0, 3, 9], [1, 5], [0, 3], [0, 4, 2, 5], [-9, 5]])
    def test_boundaries_that_do_not_rise_from_0_to_the_end_make_every_row_invalid(self, bounds: list[int]) -> None:
        """And raise nothing: on a GPU, an index out of range ends the process."""
        found = Rows.of(torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor(bounds), IGNORED, True, 4)
        assert found.invalid(torch.tensor(bounds), 5, 8).all()
        right = torch.tensor([0, 2, 2, 5])
        assert not Rows.of(torch.tensor([[1, 2, 3, 4, 5]]), right, IGNORED, True, 4).invalid(right, 5, 8).any()

    def test_packed_sequences_do_not_score_the_next_ones_first_token(self) -> None:
        labels, bounds = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
        assert Rows.of(labels, bounds, IGNORED, True, None).place.tolist() == [0, 2, 3]

    @pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1)])
    def test_of_no_positions(self, shape: tuple[int, int]) -> None:
        for count in (None, 3):
            found = Rows.of(torch.zeros(shape, dtype=torch.int64), None, IGNORED, True, count)
            assert len(found) == 0
            assert found.spread(torch.zeros(2, 0), torch.float32).shape == (2, shape[0], max(shape[1] - 1, 0))


class TestDefinitions:
    """What PyTorch's operators do where a device has no kernel of ours."""

    SOURCE = torch.tensor([3, 0, 5, 5])  # of five rows, so the last two are left over

    def test_gather(self) -> None:
        x = torch.randn(5, 4)
        x[4] = torch.nan
        for scale in (None, torch.tensor([2.0, -1.0, torch.nan, 3.0])):
            found = rows.gather(x, self.SOURCE, scale)
            assert torch.equal(found[:2], x[[3, 0]] if scale is None else x[[3, 0]] * scale[:2, None])
            assert not found[3].any()

    def test_scatter(self) -> None:
        values = torch.randn(4, 4)
        values[2:] = torch.nan
        for scale in (None, torch.tensor([2.0, -1.0, 1.0, 3.0])):
            out = torch.ones(5, 4)
            rows.scatter(out, self.SOURCE, values, scale)
            wanted = torch.ones(5, 4)
            wanted[[3, 0]] += values[:2] if scale is None else values[:2] * scale[:2, None]
            torch.testing.assert_close(out, wanted)

    def test_dot_is_float32_for_narrow_operands(self) -> None:
        x, weight = torch.ones(2, 300).bfloat16(), torch.ones(3, 300).bfloat16()
        weight[1, 0] = 1 + 2**-7
        assert rows.dot(x, weight, torch.tensor([1, 2])).tolist() == [300 + 2**-7, 300.0]


@pytest.mark.parametrize(
    ("count", "limit", "sizes"),
    [
        (0, 4096, []),
        (5, 4096, [5]),
        (4096, 4096, [4096]),
        (4186, 4096, [2112, 2074]),
        (8192, 4096, [4096, 4096]),
        (9000, 4096, [3008, 3008, 2984]),
        (7, 3, [3, 3, 1]),
        (8, 5, [5, 3]),
    ],
)
def test_chunks_of_rows_are_even(count: int, limit: int, sizes: list[int]) -> None:
    parts = row_chunks(count, limit)
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))


class Step(NamedTuple):
    logps: Tensor
    statistics: tuple[Tensor, ...]
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor


def step(
    count: int | None, mode: str, labels: Tensor, *, with_entropy: bool = False, room: int = 0, offset: float = 0.0
) -> Step:
    """Score and differentiate as a device does that is told how many rows there are."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 6, 16), (5000, 16), (5000,)))
    bias += offset
    hidden[:, -1] = torch.nan  # no row is scored there, and a row that is left over must not be taken from there
    backend = linear.library_backend(linear.fold, linear.fold_backward, lambda: Tile(3, 4096))
    kept = torch.full((max(room, len(labels.flatten())), 5000), torch.nan) if mode == "save" else None
    scoring = (IGNORED, True, *PLAIN)
    given = (hidden, weight, bias, labels, None)
    logps, norm, shares, *statistics = linear.linear_logprobs(
        backend, *given, kept, *scoring, EVERY_STATISTIC, count, None, None
    )
    upstream = torch.randn(logps.shape, generator=generator), torch.randn(logps.shape, generator=generator)
    grads = linear.linear_logprobs_backward(
        backend, upstream[0], upstream[1] if with_entropy else None, *given, norm, kept, shares, [True] * 3,
        *[torch.float32] * 3, *scoring, count, None, None,
    )  # fmt: skip
    return Step(logps, tuple(statistics), *grads)


class TestSteps:
    @pytest.mark.parametrize("with_entropy", [False, True])
    @pytest.mark.parametrize("mode", ["save", "recompute"])
    @pytest.mark.parametrize("count", [5, 6, 10])
    def test_rows_that_are_left_over_change_nothing(self, count: int, mode: str, with_entropy: bool) -> None:
        labels, _ = a_batch()
        wanted, found = (step(n, mode, labels, with_entropy=with_entropy) for n in (None, count))
        assert all(value.isfinite().all() for value in wanted.statistics)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("with_entropy", [False, True])
    @pytest.mark.parametrize("mode", ["save", "recompute"])
    def test_rows_that_are_left_over_do_not_overflow(self, mode: str, with_entropy: bool) -> None:
        """Their logits are the bias, whose exponentials are no float32 numbers here."""
        labels, _ = a_batch()
        wanted, found = (step(n, mode, labels, with_entropy=with_entropy, offset=200.0) for n in (None, 7))
        assert found.d_weight.isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mode", ["save", "recompute"])
    @pytest.mark.parametrize("count", [0, 1, 4])
    def test_too_little_room_is_never_a_number(self, count: int, mode: str) -> None:
        labels, scored = a_batch()
        found = step(count, mode, labels)
        assert found.logps[scored].isnan().all()
        assert (found.logps[~scored] == 0).all()
        if count:
            assert found.d_weight.isnan().any()

    @pytest.mark.parametrize("mode", ["save", "recompute"])
    def test_a_label_outside_of_the_vocabulary_is_its_row_alone(self, mode: str) -> None:
        labels, scored = a_batch()
        wanted = step(None, mode, labels).logps
        labels[0, 3] = 5000
        found = step(5, mode, labels).logps
        assert found[0, 2].isnan()
        scored[0, 2] = False
        assert torch.equal(found[scored], wanted[scored])

    def test_a_label_outside_of_the_vocabulary_raises_where_nobody_told(self) -> None:
        labels, _ = a_batch()
        labels[0, 3] = 5000
        with pytest.raises(IndexError, match=r"label 5000 at scored position \[0, 2\]"):
            step(None, "recompute", labels)


class TestGradients:
    def run(self, dtype: torch.dtype, positions: int, **options: Any) -> tuple[list[tuple[Any, ...]], Tensor, Tensor]:
        """Return every product's result, dtype and whether it was added, and the gradients of the head and hidden."""
        made: list[tuple[Any, ...]] = []

        def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
            made.append((tuple(out.shape), out.dtype, add))
            linear.library_product(out, a, b, add)

        backend = linear.library_backend(linear.fold, linear.fold_backward, lambda: Tile(4, 4096))
        backend = backend._replace(product=product)
        hidden, weight = torch.randn(1, positions, 8).to(dtype), torch.randn(300, 8).to(dtype)
        labels = torch.randint(300, (1, positions))
        scoring, chunking = (IGNORED, False, *PLAIN), (positions, None, options.get("filter_eps"))
        kept = torch.empty(positions, 300, dtype=dtype)
        given = (hidden, weight, None, labels, None)
        logps, norm, shares, *_ = linear.linear_logprobs(backend, *given, kept, *scoring, 0, *chunking)
        made.clear()
        kinds = [options.get("parameters", dtype)] * 3
        d_hidden, d_weight, _ = linear.linear_logprobs_backward(
            backend, torch.ones_like(logps), None, *given, norm, kept, shares, [True, True, False], *kinds,
            *scoring, *chunking,
        )  # fmt: skip
        z = hidden[0].double() @ weight.double().T
        by_z = -z.softmax(-1).scatter_add(-1, labels[0, :, None], -torch.ones(positions, 1).double())
        assert (d_weight - by_z.T @ hidden[0].double()).abs().max() < 0.05
        assert (d_hidden[0] - by_z @ weight.double()).abs().max() < 0.05
        return made, d_hidden, d_weight

    def test_of_one_chunk_are_written_in_the_parameters_dtype(self) -> None:
        made, d_hidden, d_weight = self.run(torch.bfloat16, 4)
        assert ((300, 8), torch.bfloat16, False) in made
        assert d_hidden.dtype == d_weight.dtype == torch.bfloat16

    def test_of_several_chunks_meet_in_float32(self) -> None:
        made, d_hidden, d_weight = self.run(torch.bfloat16, 7)
        assert [product for product in made if product[0] == (300, 8)] == [
            ((300, 8), torch.float32, False), ((300, 8), torch.float32, True)
        ]  # fmt: skip
        assert d_hidden.dtype == d_weight.dtype == torch.bfloat16

    def test_of_a_parameter_in_a_third_dtype_meet_in_float32(self) -> None:
        """Autocast multiplies in bfloat16 what is kept in float16, and no product writes that."""
        made, d_hidden, d_weight = self.run(torch.bfloat16, 4, parameters=torch.float16)
        assert ((300, 8), torch.float32, False) in made
        assert d_hidden.dtype == d_weight.dtype == torch.float16

    def test_filtered_ones_meet_in_float32_too(self) -> None:
        made, _, _ = self.run(torch.bfloat16, 4, filter_eps=1e-12)
        assert all(dtype == torch.float32 for _, dtype, _ in made)


@pytest.mark.parametrize("scored_rows", [None, 20, 24, 12, [5, 5, 5, 5], [6, 5, 6, 5]])
def test_a_sharded_loss_in_chunks_sums_every_row_of_hidden(scored_rows: Any, group: Any) -> None:
    """Also where the number given is too small, and the rows are counted after all, to begin the chunks."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(4, 6, 8, generator=generator), torch.randn(40, 8, generator=generator)]
    labels = torch.randint(40, (4, 6), generator=generator)

    def gradients(**options: Any) -> list[Tensor]:
        given = [on_gpu(leaf.clone().requires_grad_()) for leaf in leaves]
        made = fastpref.linear_preference_loss(
            *given, on_gpu(labels), lambda logps: logps[:, 0] - logps[:, 1], group_size=2, chunk_rows=10, **options
        )
        return [gradient.numbers for gradient in torch.autograd.grad(made.loss, given)]

    with host_trace():
        found, wanted = gradients(scored_rows=scored_rows, process_group=group), gradients()
    torch.testing.assert_close(found, wanted)
