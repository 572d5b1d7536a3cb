"""`scored_rows`, the number of scored labels, changes no answer, and a CPU refuses a number that is too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fastpref
from fastpref._core.runs import _even_runs, _runs
from fastpref_kernels import ops

H, V = 8, 40
COUNTS = [3, 1, 4, 2]


def batch(packed: bool = False) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return four sequences, with as many scored labels as `COUNTS` says."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    labels = torch.randint(V, (4, 6), generator=generator)
    for row, count in enumerate(COUNTS):
        labels[row, : 6 - count] = -100
    if not packed:
        return hidden, weight, labels, {}
    return hidden.reshape(24, H), weight, labels.flatten(), {"cu_seqlens": torch.arange(5) * 6}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "tokens, saved": lambda *given, **options: fastpref.linear_token_logprobs(*given, mode="save", **options),
    "tokens": lambda *given, **options: fastpref.linear_token_logprobs(*given, mode="recompute", **options),
    "sequences": fastpref.linear_sequence_logprobs,
    "DPO": lambda *given, **options: fastpref.linear_dpo_loss(*given, reference_free=True, **options).loss,
    "DPO in chunks": lambda *given, **options: (
        fastpref.linear_dpo_loss(*given, reference_free=True, chunk_rows=7, **options).loss
    ),
    "any loss": lambda *given, **options: (
        fastpref.linear_preference_loss(*given, lambda logps: logps.sum(-1), group_size=4, **options).loss
    ),
}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def results(name: str, packed: bool, **options: Any) -> tuple[Tensor, ...]:
    hidden, weight, labels, packing = batch(packed)
    value = FUNCTIONS[name](hidden, weight, labels, **packing, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), (hidden, weight))


@pytest.mark.parametrize(
    ("name", "packed"), [(name, packed) for name in FUNCTIONS for packed in (False, True)[: 2 - ("tokens" in name)]]
)
@pytest.mark.parametrize("scored_rows", [10, 11, COUNTS, tuple(count + 1 for count in COUNTS)])
def test_changes_no_answer(name: str, packed: bool, scored_rows: Any) -> None:
    for found, wanted in zip(results(name, packed, scored_rows=scored_rows), results(name, packed), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("scored_rows", [None, 0, [0, 0]])
def test_packed_sequences_of_no_tokens(scored_rows: Any) -> None:
    hidden, weight, _, _ = batch()
    packing = {"cu_seqlens": torch.tensor([0, 0, 0]), "scored_rows": scored_rows}
    given = hidden[0, :0], weight, torch.zeros(0, dtype=torch.int64)
    for module in (fastpref, fastpref.reference):
        assert module.linear_sequence_logprobs(*given, **packing).tolist() == [0.0, 0.0]
        module.linear_dpo_loss(*given, reference_free=True, **packing).loss.backward()


@functions
@pytest.mark.parametrize("scored_rows", [9, 0, [3, 1, 4, 1], [0, 9, 9, 9]])
def test_too_few_are_refused(name: str, scored_rows: Any) -> None:
    with pytest.raises(ValueError, match=r"no fewer than .* scored, 10, by sequence \[3, 1, 4, 2\]; got .*\d"):
        results(name, packed=False, scored_rows=scored_rows)


def test_a_tensor_is_refused_because_reading_it_waits() -> None:
    with pytest.raises(TypeError, match=r"the host knows, such as a list; got .*tensor"):
        results("tokens", packed=False, scored_rows=torch.tensor(COUNTS))


def test_another_number_compiles_once_more_and_then_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are told the number, as on a GPU."""
    monkeypatch.setattr(ops, "on_host", lambda tensor: False)
    counter = CompileCounter()
    hidden, weight, labels, _ = batch()

    @torch.compile(backend=counter, fullgraph=True)
    def scored(rows: int) -> Tensor:
        return fastpref.linear_token_logprobs(hidden, weight, labels, mode="save", scored_rows=rows)

    for rows in (12, 13, 14, 15, 16):
        scored(rows)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_a_graph_on_a_host_counts_for_itself(mode: str) -> None:
    """A compiled graph cannot check the number, and needs none."""
    hidden, weight, labels, _ = batch()
    compiled = torch.compile(fastpref.linear_token_logprobs, backend="aot_eager", fullgraph=True)
    found = compiled(hidden, weight, labels, mode=mode, scored_rows=1)
    torch.testing.assert_close(found, fastpref.linear_token_logprobs(hidden, weight, labels))


class TestRuns:
    @pytest.mark.parametrize("seed", range(20))
    def test_are_few_and_even(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 30, (int(torch.randint(1, 40, (), generator=generator)),), generator=generator).tolist()
        limit = max(rows) + int(torch.randint(0, 60, (), generator=generator))
        runs, greedy = _even_runs(rows, limit), _runs(rows, limit)
        assert [group for run in runs for group in range(run.begin, run.end)] == list(range(len(rows)))
        assert [run.rows for run in runs] == [sum(rows[run.begin : run.end]) for run in runs]
        assert len(runs) == len(greedy)
        most = max(run.rows or 0 for run in runs)
        assert most <= max(run.rows or 0 for run in greedy) <= limit
        if most > max(rows):
            assert len(_runs(rows, most - 1)) > len(runs)

    def test_leave_no_remainder(self) -> None:
        assert [run.rows for run in _even_runs([10] * 41, 400)] == [210, 200]
        assert [run.rows for run in _runs([10] * 41, 400)] == [400, 10]

    def test_of_nothing(self) -> None:
        assert _even_runs([], 5) == []
