"""Filters, modes, memory and scratch of the functions from hidden states."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpref
from fastpref import linear_logprobs as module
from fastpref._core import group_loss
from fastpref_kernels import linear
from fastpref_kernels.contract import COLUMNS
from fastpref_kernels.cpu import linear as cpu_linear
from fastpref_kernels.eager import linear as linear_rows

V = 3 * COLUMNS + 5


def peaked() -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose mass lies in the first tile of columns, and labels there but for one row."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 6, 8, generator=generator)
    weight = torch.randn(V, 8, generator=generator)
    hidden[..., 0], weight[:, 0] = 1.0, 0.0
    weight[:COLUMNS, 0] = 12.0
    labels = torch.randint(COLUMNS, (2, 6), generator=generator)
    labels[1, 2] = V - 1
    return hidden, weight, labels


def gradients(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    result = fastpref.linear_token_logprobs(x, w, labels, shift=False, stats=("dropped_mass",), **options)
    result.logprobs.sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return x.grad, w.grad, result.dropped_mass


class TestFilter:
    @pytest.mark.parametrize("mode", ["save", "recompute"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_drops_what_it_says(self, implementation: str, mode: str, dtype: torch.dtype) -> None:
        hidden, weight, labels = peaked()
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        exact_x, exact_w, none = gradients(hidden, weight, labels, mode=mode)
        assert (none == 0).all()
        x, w, dropped = gradients(hidden, weight, labels, mode=mode, filter_eps=1e-3)
        assert (dropped > 0).all()
        assert (dropped < 3e-3).all()
        # The mass of columns COLUMNS and on, but for the row whose label is among the last of them.
        p = (hidden.double() @ weight.double().T).softmax(-1)
        tail = p[..., COLUMNS:].sum(-1)
        tail[1, 2] -= p[1, 2, 3 * COLUMNS :].sum()
        torch.testing.assert_close(dropped.double(), tail, rtol=1e-2, atol=1e-7)
        # Two tiles of columns hold no label and no mass: nothing of them was written but zeros.
        assert (w[COLUMNS : 3 * COLUMNS] == 0).all()
        assert (exact_w[COLUMNS : 3 * COLUMNS] != 0).any()
        rounding = 4 * torch.finfo(dtype).eps * exact_x.abs().max()
        assert ((x - exact_x).abs().amax(-1) <= dropped * weight.abs().max() + rounding).all()

    def test_skips_the_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[int] = []

        def counted(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
            made.append(a.shape[0] * a.shape[1] * b.shape[1])
            cpu_linear.product(out, a, b, add)

        backend = cpu_linear.BACKEND._replace(product=counted)
        hidden, weight, labels = peaked()
        labels[1, 2] = 0
        scoring = (-100, False, 1.0, 1.0, None)

        def work(filter_eps: float | None) -> int:
            logps, norm, shares, *_ = linear.linear_logprobs(
                backend, hidden, weight, None, labels, None, None, *scoring, 0, None, None, filter_eps
            )
            made.clear()
            totals = torch.empty_like(hidden), torch.empty_like(weight), None
            linear.linear_logprobs_backward_(
                backend,
                torch.ones_like(logps),
                None,
                hidden,
                weight,
                None,
                labels,
                None,
                norm,
                None,
                shares,
                *totals,
                True,
                *scoring,
                None,
                None,
                filter_eps,
            )
            return sum(made)

        assert work(1e-3) * V == work(None) * COLUMNS

    def test_reaches_the_loss(self) -> None:
        hidden, weight, labels = peaked()
        x = hidden.requires_grad_()
        loss = fastpref.linear_dpo_loss(
            x, weight, labels, shift=False, reference_free=True, filter_eps=1e-3, stats=("dropped_mass",)
        )
        assert (loss.dropped_mass > 0).all()


def recorded(monkeypatch: pytest.MonkeyPatch, where: Any) -> list[int]:
    """Record the numbers of rows that a module makes room for."""
    rows: list[int] = []
    make = where.exponentials

    def recording(like: Tensor, number: int, *rest: Any) -> Tensor:
        rows.append(number)
        return make(like, number, *rest)

    monkeypatch.setattr(where, "exponentials", recording)
    return rows


class TestMode:
    @pytest.mark.parametrize(
        ("budget", "dtype", "mode"),
        [(10**9, torch.float32, "save"), (10, torch.float32, "recompute"), (10**9, torch.float16, "recompute")],
    )
    def test_auto_says_what_it_chose(
        self,
        budget: int,
        dtype: torch.dtype,
        mode: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(module, "SAVE_BUDGET", budget)
        hidden = torch.randn(2, 3, 4, dtype=dtype, requires_grad=True)
        with caplog.at_level(logging.DEBUG, logger="fastpref"):
            fastpref.linear_token_logprobs(hidden, torch.randn(7, 4, dtype=dtype), torch.zeros(2, 3, dtype=torch.long))
        assert f'"{mode}"' in caplog.text

    def test_nothing_is_kept_without_a_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without gradients no exponentials are stored, and three products fewer are made."""
        kept = recorded(monkeypatch, module)
        hidden, weight, labels = peaked()
        fastpref.linear_token_logprobs(hidden, weight, labels)
        with torch.no_grad():
            fastpref.linear_token_logprobs(hidden.requires_grad_(), weight, labels)
        fastpref.linear_token_logprobs(hidden, weight, labels, mode="save")
        assert kept == [0, 0, 10]

    def test_a_loss_holds_whole_groups_of_at_most_chunk_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stores = recorded(monkeypatch, group_loss)
        kept = recorded(monkeypatch, module)
        hidden, weight, labels = torch.randn(8, 5, 4, requires_grad=True), torch.randn(11, 4), torch.zeros(8, 5).long()
        for chunk_rows in (100, 23, 8, 7):
            fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True, chunk_rows=chunk_rows).loss.backward()
        # Pairs of 8 scored rows: four in a chunk, which waits for the backward; two; one; and at last none, which takes
        # the log-probs first.
        assert stores == [16, 8]
        assert kept == [32, 0]


class LargestMade(TorchDispatchMode):
    """Records the bytes of the largest tensor that is made and is not a view of `held`."""

    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held, self.nbytes = held.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != self.held:
                self.nbytes = max(self.nbytes, made.nbytes)
        return result


class TestAnchors:
    """Stored exponentials are scaled where a later tile moves the anchor of their row."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_moving_one_holds_a_tile_and_no_more(self, dtype: torch.dtype) -> None:
        rows, vocabulary = 6, 64 * COLUMNS
        hidden, weight = torch.randn(1, rows, 2).to(dtype), torch.randn(vocabulary, 2).to(dtype)
        store = torch.empty(rows, vocabulary, dtype=dtype)
        labels = torch.zeros(1, rows, dtype=torch.long)
        given = (hidden, weight, None, labels, None, store, -100, False, 1.0, 1.0, None)
        with LargestMade(store) as made:
            _, norm, *_ = linear.linear_logprobs(cpu_linear.BACKEND, *given, 2, None, None, None)
        assert made.nbytes <= rows * COLUMNS * 8
        z = hidden[0].double() @ weight.double().T - norm[0, 0, :, None]
        torch.testing.assert_close(store[:, 1:].double(), z[:, 1:].exp(), rtol=1e-2, atol=1e-5)

    @pytest.mark.parametrize("columns", [COLUMNS, COLUMNS // 4])
    @pytest.mark.parametrize("rows", [3, 40])  # one of them moves, or nearly all
    def test_every_piece_is_brought_to_its_rows(self, rows: int, columns: int) -> None:
        pieces = V // columns + 1
        anchor = torch.zeros(rows, dtype=torch.float64)
        anchors = torch.zeros(pieces, rows, dtype=torch.float64)
        anchors[0, 1 if rows == 40 else slice(1, 3)], anchors[-2, 0] = -2.5, -torch.inf
        kept = torch.rand(rows, V).bfloat16()
        wanted = (kept.double() * anchors.exp().repeat_interleave(columns, 0)[:V].T).bfloat16()
        linear_rows.rescale(kept, (anchors - anchor).exp(), columns)
        torch.testing.assert_close(kept, wanted, rtol=2**-7, atol=0.0)
        assert not kept[0, (pieces - 2) * columns : (pieces - 1) * columns].any()


class TestScratch:
    def test_kept_between_calls_and_released(self) -> None:
        cpu_linear.release_memory(None)
        first = cpu_linear.scratch("logits", (4, 8), torch.float32, torch.device("cpu"))
        again = cpu_linear.scratch("logits", (2, 8), torch.float64, torch.device("cpu"))
        assert again.data_ptr() == first.data_ptr()
        assert cpu_linear.scratch("other", (4,), torch.float32, torch.device("cpu")).data_ptr() != first.data_ptr()
        cpu_linear.release_memory(None)
        assert not cpu_linear._scratch.__dict__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype) -> None:
    """The operators pass `opcheck`: schemas, fakes and mutations."""
    hidden, weight = torch.randn(2, 4, 6).to(dtype), torch.randn(9, 6).to(dtype)
    bias, labels = torch.randn(9).to(dtype), torch.randint(9, (2, 4))
    store = torch.empty(6, 32, dtype=dtype)[:, :9]
    scoring = (-100, True, 1.0, 1.0, None)
    operators = torch.ops.fastpref
    checks = ("test_schema", "test_faketensor")
    for stats, filter_eps in ((0, None), (63, 0.1)):
        forward = (hidden, weight, bias, labels, None, store, *scoring, stats, None, None, filter_eps)
        torch.library.opcheck(operators.linear_logprobs.default, forward, test_utils=checks)
        logps, norm, shares, *_ = operators.linear_logprobs(*forward)
        grad_entropy = torch.randn_like(logps) if stats else None
        given = (torch.randn_like(logps), grad_entropy, hidden, weight, bias, labels, None, norm, store, shares)
        dtypes = (dtype, dtype, torch.float32)
        backward = (*given, [True, False, True], *dtypes, *scoring, None, 2, filter_eps)
        torch.library.opcheck(operators.linear_logprobs_backward.default, backward, test_utils=checks)
        totals = [torch.zeros(t.shape) for t in (hidden, weight, bias)]
        adding = (*given, *totals, False, *scoring, None, None, filter_eps)
        torch.library.opcheck(operators.linear_logprobs_backward_.default, adding, test_utils=checks)
        shard = torch.tensor([4, 20])
        sharded = (labels, None, shard, 9, -100, True, True)
        torch.library.opcheck(operators.shard_labels.default, sharded, test_utils=checks)
        of_shard = operators.shard_labels(*sharded)
        scoring_here = (-2, *scoring[1:])
        fold = (hidden, weight, bias, of_shard, None, store, *scoring_here, stats, None, None, filter_eps)
        torch.library.opcheck(operators.linear_fold.default, fold, test_utils=checks)
        sums, masses = operators.linear_fold(*fold)
        finalize = (hidden, of_shard, None, shard, sums, sums, masses, store, *scoring_here, stats, None, filter_eps)
        torch.library.opcheck(operators.linear_finalize.default, finalize, test_utils=checks)
    total = torch.randn(5, 6)
    for upstream in (None, torch.tensor(2.0)):
        torch.library.opcheck(operators.scaled_gradient.default, (total, upstream, dtype), test_utils=checks)
        wanted = total if upstream is None else total * upstream
        torch.testing.assert_close(operators.scaled_gradient(total, upstream, dtype), wanted.to(dtype))
