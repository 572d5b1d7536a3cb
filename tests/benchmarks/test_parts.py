"""Test the suite's parts on rows made here: the store, the accuracy gate, the shapes and the report."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_logprobs, harness, machine, peers, store, suite
from benchmarks.report import data, documents, plots, tables
from benchmarks.worker import PointError, Worker
from fastpref import reference
from fastpref.cli.bench import command, watch

BASE = {"subject": "logprobs", "name": "fastpref", "package": "fastpref", "device": "cpu", "allocator": "default"}


class TestStore:
    def test_rows_survive_their_file(self, tmp_path: Path) -> None:
        rows = [{**BASE, "dtype": "fp32", "V": 5, "masked": 0.0, "ms": 1.25, "state": "a", "problem": 'a, "b"\nc'}]
        store.write(tmp_path / "a.csv", rows)
        assert store.read(tmp_path / "a.csv") == rows
        assert store.key(store.read(tmp_path / "a.csv")[0]) == store.key(rows[0])

    def test_a_column_that_is_not_known_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="milliseconds"):
            store.write(tmp_path / "a.csv", [{**BASE, "milliseconds": 1.0}])
        assert not (tmp_path / "a.csv").exists()

    def test_a_point_takes_the_place_of_itself(self, tmp_path: Path) -> None:
        results = store.Results(tmp_path / "a.csv")
        for V in (1, 2, 3):
            results.replace(store.key({**BASE, "V": V}), [{**BASE, "V": V, "ms": float(V), "state": "old"}])
        results.replace(store.key({**BASE, "V": 2}), [{**BASE, "V": 2, "ms": 9.0, "state": "new"}])
        assert [row["ms"] for row in store.Results(tmp_path / "a.csv").rows] == [1.0, 9.0, 3.0]

    def test_what_is_held(self, tmp_path: Path) -> None:
        results = store.Results(tmp_path / "a.csv")
        point = store.key(BASE)
        results.replace(point, [{**BASE, "name": name, "state": "s"} for name in ("fastpref", "eager")])
        assert results.holds(point, "s", ["eager"])
        assert not results.holds(point, "other", ["eager"])
        assert not results.holds(point, "s", ["eager", "TRL"])
        assert not results.holds(store.key({**BASE, "V": 1}), "s", ["eager"])


class TestState:
    @pytest.fixture(autouse=True)
    def forgetful(self) -> Any:
        for function in (machine._code, machine.state):
            function.cache_clear()
        yield
        for function in (machine._code, machine.state):
            function.cache_clear()

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("kernels/fastpref_kernels/cpu/rows.h", True),
            ("fastpref/logprobs.py", True),
            ("benchmarks/peers.py", True),
            ("fastpref/cli/check/run.py", False),
            ("benchmarks/report/tables.py", False),
            ("benchmarks/gpu_summary.py", False),
            ("docs/index.md", False),
        ],
    )
    def test_is_of_what_a_measurement_runs(
        self, name: str, changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine, "ROOT", tmp_path)
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("1")
        before = machine.state("cpu")
        machine._code.cache_clear()
        machine.state.cache_clear()
        path.write_text("2")
        assert (machine.state("cpu") != before) is changes

    def test_is_of_the_versions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = machine.state("cpu")
        machine.state.cache_clear()
        monkeypatch.setattr(machine, "version", lambda package: "0.0.1")
        assert machine.state("cpu") != before


class TestGate:
    OURS = peers.Entry("fastpref", lambda: None, "fastpref")  # type: ignore[arg-type,return-value]
    PEER = peers.Entry("peer", lambda: None)  # type: ignore[arg-type,return-value]

    def test_within(self) -> None:
        assert harness.judged(self.OURS, [(0.9, 1.0), (0.0, 1.0)]) == "within"

    def test_a_peer_beyond_is_marked(self) -> None:
        assert harness.judged(self.PEER, [(0.1, 1.0), (9.0, 1.0)]) == "beyond"

    @pytest.mark.parametrize(
        ("entry", "off"), [(OURS, 1.1), (PEER, 11.0), (PEER, float("nan")), (OURS, float("nan")), (PEER, float("inf"))]
    )
    def test_wrong_is_an_error_with_both_figures(self, entry: peers.Entry, off: float) -> None:
        with pytest.raises(ValueError, match=r"off by .* \(allowed 1.0e\+00\)"):
            harness.judged(entry, [(off, 1.0)])

    def test_ours_that_is_wrong_fails_the_point(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By what float32 statistics lose and not by what bf16 eager does, which would let it pass."""
        axes = {**bench_logprobs.BASE, "dtype": "bf16", "B": 2, "T": 4, "V": 129}
        rounded = peers.Entry("fastpref", lambda: lambda z, y: peers.eager(z, y).bfloat16(), "fastpref")
        monkeypatch.setattr(bench_logprobs, "OURS", (rounded,))
        rows = bench_logprobs.measure(axes, "cpu", harness.Options(rounds=2, peers=()), lambda *_: None)
        assert [row["gate"] for row in rows if row["package"] == "fastpref"] == ["failed"]


@pytest.mark.parametrize("subject", ["logprobs", "linear"])
def test_the_example_of_a_peer_is_right(subject: str) -> None:
    file = machine.ROOT / "examples" / "benchmark_peer.py"
    (entry,) = [e for e in peers.joined(file)[subject] if e.name not in {e.name for e in peers.joined(None)[subject]}]
    options = harness.Options(rounds=2, peers=(entry.name,), peer_file=file)
    ((_, axes),) = suite.MODULES[subject].points("smoke", "cpu")
    rows = suite.MODULES[subject].measure(axes, "cpu", options, lambda *_: None)
    assert [row["gate"] for row in rows if row["name"] == entry.name] == ["within"]


def test_a_nan_is_furthest_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PART", 3)
    truth = torch.zeros(2, 5, dtype=torch.float64)
    assert harness.furthest(truth.float() + 0.5, truth) == 0.5
    for place in range(10):
        found = truth.float()
        found.view(-1)[place] = torch.nan
        assert math.isnan(harness.furthest(found, truth))


def test_what_a_peer_gives_for_an_ignored_label_does_not_count() -> None:
    axes = {**bench_logprobs.BASE, "B": 2, "T": 4, "V": 129, "masked": 0.5}
    entry = peers.Entry("peer", lambda: lambda z, y: torch.where(y == -100, torch.nan, peers.eager(z, y)))
    _, limits = bench_logprobs.Problem(axes, "cpu").check(entry, entry.load())
    assert harness.judged(entry, limits) == "within"


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("answers", ["logps", "sum"])
def test_float64_answers_of_a_few_rows_after_another_are_those_of_the_whole(
    kept: bool, answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = {**bench_logprobs.BASE, "B": 2, "T": 5, "V": 129, "masked": 0.4}
    monkeypatch.setattr(bench_logprobs, "PART", 3 * 129)  # rows of both sequences share a part, and the last is less
    monkeypatch.setattr(bench_logprobs, "KEPT", 2**20 if kept else 0)
    problem = bench_logprobs.Problem(axes, "cpu")
    leaf = problem.logits.double().requires_grad_()
    logps = reference.token_logprobs(leaf, problem.labels, shift=False)
    (gradient,) = torch.autograd.grad(logps.sum(), leaf)
    torch.testing.assert_close(torch.cat([part for part, _ in problem.truth()]), logps.detach().flatten())
    parts = [part for _, part in problem.truth()]
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    torch.testing.assert_close(torch.cat(parts), gradient.flatten(0, 1))

    def off(logits: Tensor, labels: Tensor) -> Tensor:
        found = reference.token_logprobs(logits, labels, shift=False)
        moved = (found - logits[..., 0].detach() * 2 + logits[..., 0] * 2) * (labels != peers.IGNORED)
        return moved.sum() if answers == "sum" else moved

    entry = peers.Entry("peer", lambda: off, answers=answers)
    row, _ = problem.check(entry, off)
    assert row["error"] < 1e-5
    assert row["error_gradient"] == pytest.approx(2, abs=1e-5), "the largest error of a gradient, of all parts"


def test_the_command_names_the_subjects() -> None:
    assert tuple(suite.MODULES) == command.SUBJECTS


def test_a_problem_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    screen = watch.Screen(1)
    (point, *_) = suite.points("logprobs", "cpu", "smoke")
    screen.rows(point, [{"name": "peer", "package": "torch", "gate": "failed", "problem": "OSError [/no] such [file]"}])
    assert screen.summarise(Path("x.csv")) == 0
    assert capsys.readouterr().out.count("peer: OSError [/no] such [file]") == 2


class TestShapes:
    def test_axes_are_multiplied(self) -> None:
        found = suite.points("logprobs", "cpu", "V=3,5 dtype=bf16 masked=0,0.5 allocator=THP")
        assert [(dict(p.axes)["V"], dict(p.axes)["masked"]) for p in found] == [(3, 0.0), (3, 0.5), (5, 0.0), (5, 0.5)]
        assert {(p.allocator, dict(p.axes)["dtype"], dict(p.axes)["B"]) for p in found} == {("THP", "bf16", 8)}

    @pytest.mark.parametrize("text", ["fast", "V", "V=", "W=3"])
    def test_what_is_no_shape(self, text: str) -> None:
        with pytest.raises(ValueError, match="smoke, default, full, or axes"):
            suite.points("logprobs", "cpu", text)

    def test_an_axis_of_another_subject(self) -> None:
        with pytest.raises(ValueError, match=r"logprobs has the axes .*, not H"):
            suite.points("logprobs", "cpu", "H=3")
        assert suite.having("H=3 V=5") == ["linear", "trainers", "scaling"]

    @pytest.mark.parametrize("preset", suite.PRESETS)
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("subject", suite.MODULES)
    def test_presets_name_each_point_once(self, subject: str, device: str, preset: str) -> None:
        found = [store.key(point.row) for point in suite.points(subject, device, preset)]
        assert len(set(found)) == len(found)

    def test_default_holds_the_vocabularies_and_the_masks(self) -> None:
        axes = [dict(point.axes) for point in suite.points("logprobs", "cpu", "default")]
        assert {32000, 50304, 128256, 151936, 262144} <= {a["V"] for a in axes}
        assert {0.0, 0.5} == {a["masked"] for a in axes}
        assert {"flat", "peaked"} == {a["logits"] for a in axes}

    @pytest.mark.parametrize("subject", ["logprobs", "linear"])
    def test_sweeps_span_two_decades(self, subject: str) -> None:
        for sweep, size in (("V", lambda a: a["V"]), ("N", lambda a: a["B"] * a["T"])):
            sizes = [
                size(dict(p.axes))
                for p in suite.points(subject, "cpu", "default")
                if dict(p.axes).get("sweep") == sweep
            ]
            assert max(sizes) >= 97 * min(sizes)


def _measure_that_fails(*_: Any) -> Any:
    raise ZeroDivisionError("planted")


def _measure_that_ends(*_: Any) -> Any:
    import os

    os._exit(5)


class TestWorker:
    @pytest.mark.parametrize(
        ("measure", "why"), [(_measure_that_fails, "planted"), (_measure_that_ends, "ended its process")]
    )
    def test_what_fails_outside_of_an_entry_is_said(self, measure: Any, why: str) -> None:
        with Worker({}) as worker, pytest.raises(PointError, match=why):
            worker.rows(measure, {}, "cpu", harness.Options(), lambda *_: None)


def _machine(folder: Path, rows: store.Rows) -> data.Machine:
    store.write(folder / "m.csv", [{**BASE, "machine": "m", "pass": "forward + backward", **row} for row in rows])
    return data.Machine(folder / "m.csv")


class TestReport:
    def test_the_headline_holds_ours_and_peers_but_no_floor(self, tmp_path: Path) -> None:
        axes = {**bench_logprobs.BASE, "dtype": "bf16", "gate": "within", "error": 2e-6}
        rows = [
            {**axes, "ms": 10.0, "peak_mib": 1.0},
            {**axes, "name": "a peer", "package": "torch", "ms": 45.0, "peak_mib": 300.0},
            {**axes, "name": "a copy", "package": "floor", "ms": 5.0},
            {**axes, "name": "a forward", "package": "torch", "ms": 2.0, "pass": "forward"},
        ]
        assert tables.headline(_machine(tmp_path, rows)).splitlines()[2:] == [
            "| from logits | **fastpref** | 10 | 1 | 2e-06 |",
            "|  | a peer | 45 | 300 | 2e-06 |",
        ]

    def test_columns_without_news_are_left_out(self, tmp_path: Path) -> None:
        axes = {**bench_logprobs.BASE, "gate": "within", "ms": 10.0}
        shown = tables.shapes(_machine(tmp_path, [axes, {**axes, "name": "a peer", "package": "torch"}]), "logprobs")
        assert "| ms |" in shown
        assert "accuracy" not in shown
        assert "pass" not in shown
        beyond = {**axes, "name": "a peer", "package": "torch", "gate": "beyond"}
        assert "accuracy" in tables.shapes(_machine(tmp_path, [axes, beyond]), "logprobs")

    def test_the_cpu_with_most_rows_comes_first(self, tmp_path: Path) -> None:
        for name, device, rows in (("a", "cuda", 3), ("b", "cpu", 1), ("c", "cpu", 2)):
            found = [{**BASE, "V": V, "device": device, "machine": name} for V in range(rows)]
            store.write(tmp_path / f"{name}.csv", found)
        assert [machine.name for machine in data.machines(tmp_path)] == ["c", "b", "a"]

    def test_other_machines_have_all_of_their_shapes(self, tmp_path: Path) -> None:
        rows = [{**bench_logprobs.BASE, "dtype": "bf16", "V": V, "ms": 1.0 + V} for V in (7, 8)]
        shown = tables.others([_machine(tmp_path, rows)])
        assert "### m" in shown
        assert "V=7" in shown
        assert "V=8" in shown
        assert tables.others([]) == "No other machine and no GPU has been measured.\n"

    def test_styles_differ_without_colour(self) -> None:
        names = [*((letter, True) for letter in "abcde"), *((str(i), False) for i in range(9))]
        marks = [(style["marker"], str(style["linestyle"])) for style in plots.styles(names).values()]
        assert len(set(marks)) == len(marks)
        assert all(one != other for (one, _), (other, _) in itertools.pairwise(marks))

    def test_the_page_shows_every_picture(self) -> None:
        shown = re.findall(r"\(assets/benchmarks/(.*)\.png\)", (documents.DOCS / "benchmarks.md").read_text())
        assert set(shown) == {path.stem for path in documents.PICTURES.iterdir()} == set(plots.figures(suite.RESULTS))
