"""The sweep: what it varies, what it keeps, and what a case that fails does to the others."""

from __future__ import annotations

import csv
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_sweep, precompile, sass
from benchmarks.gpu_sweep import all_cases, compile_case, sweep
from benchmarks.sweep import rows, steps, timing
from benchmarks.sweep.case import Case, Trial, furthest_ratio
from fastpref.cli import device
from fastpref_kernels.triton import launches

ROOT = Path(__file__).resolve().parents[2]


def trial(error: float = 0.0) -> Trial:
    return Trial(lambda: None, lambda: error, 0.5, gbytes=1.0)


def raises() -> Trial:
    raise RuntimeError("no kernel image\nmore of it")


def made(make: Callable[[], Trial], device: str, R: int) -> Trial:
    return make()


def case(name: str, make: Callable[[], Trial]) -> Case:
    return Case("logits", name, "float32", 4, 9, 0, "2x1 s1", functools.partial(made, make))


GOOD = case("good", trial)
BROKEN = (
    case("raises", raises),
    case("wrong", functools.partial(trial, 0.6)),
    case("unwritten", functools.partial(trial, float("nan"))),
)


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class TestCases:
    @pytest.mark.parametrize("small", [False, True])
    def test_each_is_named_once(self, small: bool) -> None:
        keys = [case.key for case in all_cases(small)]
        assert len(set(keys)) == len(keys)
        assert {case.group for case in all_cases(small)} == set(gpu_sweep.GROUPS)

    def test_each_shape_has_one_current_setting(self) -> None:
        shapes: dict[tuple[str, ...], int] = {}
        for found in all_cases(False):
            if found.group not in ("ceilings", "few rows", "product_fold"):
                shapes[found.key[:-1]] = shapes.get(found.key[:-1], 0) + found.current
        assert set(shapes.values()) == {1}

    def test_no_setting_of_the_table_is_left_out(self) -> None:
        varied = {found.kernel.partition(",")[0] for found in all_cases(False)}
        assert {kernel for kernel, _ in launches.ROWS} <= varied

    @pytest.mark.parametrize("kernel", ["logprobs_forward", "logprobs_backward", "logprobs_statistics", "fold"])
    def test_a_variant_is_launched_as_it_says(self, kernel: str) -> None:
        found = next(c for c in all_cases(False) if c.kernel == kernel and not c.current)
        with sass.compiling("sm_90") as compiled:
            compile_case(found)
        launched = [kernel for kernel in compiled if f"{kernel.name}".startswith(("logprobs", "fold"))][-1]
        names = launched.src.fn.arg_names
        constants = {names[path[0]]: value for path, value in launched.src.constants.items()}
        warps = launched.metadata.num_warps
        assert f"{constants['BLOCK']}x{warps} s{constants['STAGES']}" == found.config

    def test_what_is_compiled_ahead_is_what_is_measured(self) -> None:
        """A kernel of another dtype would be compiled in vain, and that of the GPU in the middle of the sweep."""
        found = next(c for c in all_cases(False) if c.kernel == "product_fold" and "64x256" in c.config)
        with sass.compiling("sm_90") as compiled:
            compile_case(found)
        (signature,) = (kernel.src.signature for kernel in compiled if kernel.name == "product_fold_kernel")
        assert found.dtype == "bfloat16"
        assert all(signature[operand].startswith("tensordesc<bf16[") for operand in ("x", "weight"))

    def test_graphs_come_last(self) -> None:
        graphs = [found.graph for found in all_cases(False)]
        assert graphs == sorted(graphs)
        assert any(graphs)

    @pytest.mark.parametrize("name", steps.STEPS)
    def test_a_step_is_judged_by_its_value_and_its_gradient(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        right = steps._step(name, 512, 16, "cpu", 8)
        assert right.error() <= right.allowed
        backward = Tensor.backward
        monkeypatch.setattr(Tensor, "backward", lambda value: backward(value, 1.1 * torch.ones_like(value)))
        with pytest.raises(ValueError, match="hidden's gradient is off"):
            steps._step(name, 512, 16, "cpu", 8).error()


def test_a_gradient_that_is_right_at_its_largest_alone_is_far_off() -> None:
    truth = torch.tensor([0.9, -1e-5, -1e-30], dtype=torch.float64)
    assert furthest_ratio(truth.bfloat16(), truth) < 2**-8
    assert furthest_ratio(torch.tensor([0.9, 0.0, 0.0]), truth) == 1.0
    assert furthest_ratio(torch.tensor([0.9, -1e-5, 0.0]), truth) < 1e-6


class TestRows:
    def test_a_case_that_fails_is_a_row(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert sweep([*BROKEN, GOOD], "cpu", tmp_path, 60.0) == 0
        assert [row["status"] for row in read(tmp_path)] == [
            "RuntimeError: no kernel image",
            "ValueError: off by 6.0e-01, where 5.0e-01 is allowed",
            "ValueError: an output is NaN or was not written",
            "ok",
        ]
        assert float(read(tmp_path)[-1]["us"]) >= 0
        said = capsys.readouterr().out
        assert "no kernel image" in said
        summary = rows.summary(rows.Table(tmp_path / "sweep.csv", "cpu").rows)
        assert "FAILED logits raises float32 4x9 2x1 s1: RuntimeError: no kernel image" in summary

    def test_what_was_measured_is_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sweep([GOOD, *BROKEN], "cpu", tmp_path, 60.0)
        before = read(tmp_path)
        sweep([GOOD, *BROKEN[:1]], "cpu", tmp_path, 60.0)
        assert read(tmp_path)[:4] == before
        assert [row["kernel"] for row in read(tmp_path)[4:]] == ["raises"], "what failed is tried again"
        monkeypatch.setattr(rows.machine, "package_version", lambda package: "other code")
        sweep([GOOD], "cpu", tmp_path, 60.0)
        assert [row["kernel"] for row in read(tmp_path)[5:]] == ["good"]

    def test_a_line_cut_short_is_measured_again(self, tmp_path: Path) -> None:
        other = case("other", trial)
        sweep([GOOD, other], "cpu", tmp_path, 60.0)
        path = tmp_path / "sweep.csv"
        path.write_text(path.read_text()[:-20])
        sweep([GOOD, other], "cpu", tmp_path, 60.0)
        assert [(row["kernel"], row["status"]) for row in read(tmp_path)] == [("good", "ok"), ("other", "ok")]

    def test_nothing_begins_after_the_deadline(self, tmp_path: Path) -> None:
        assert sweep([GOOD, *BROKEN], "cpu", tmp_path, -1.0) == 4
        assert read(tmp_path) == []

    def test_a_kernel_that_cannot_be_compiled_ahead_is_still_measured(self, tmp_path: Path) -> None:
        failed: Future[int] = Future()
        failed.set_exception(RuntimeError("the pool is gone"))
        sweep([GOOD], "cpu", tmp_path, 60.0, {GOOD: failed})
        assert [row["status"] for row in read(tmp_path)] == ["ok"]

    def test_a_case_that_breaks_the_device_is_left_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(device, "works", lambda device: False)
        cases = [GOOD, BROKEN[0], case("other", trial)]
        with pytest.raises(gpu_sweep.DeviceLostError) as met:
            sweep(cases, "cpu", tmp_path, 60.0)
        assert 0 < met.value.seconds <= 60
        assert sweep(cases, "cpu", tmp_path, met.value.seconds, after=met.value.number) == 0
        assert [row["kernel"] for row in read(tmp_path)] == ["good", "raises", "other"]

    def test_the_summary_has_the_best_beside_the_current_setting(self) -> None:
        def row(config: str, us: float, current: bool) -> rows.Row:
            return {
                **dict.fromkeys(rows.COLUMNS, ""),
                "kernel": "fold",
                "status": "ok",
                "config": config,
                "us": str(us),
                "current": str(int(current)),
            }

        found = [row("a", 9.0, True), *(row(f"v{us}", us, False) for us in (8.0, 3.0, 5.0, 4.0))]
        (line,) = rows.summary(found).splitlines()
        assert line == "fold: v3.0 3.0 us | v4.0 4.0 us | v5.0 5.0 us | a (now) 9.0 us"


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [(32, 4, 0, 16), (255, 8, 0, 1), (64, 4, 75 * 1024, 3), (16, 1, 0, 32), (40, 8, 0, 6)],
)
def test_programs_a_multiprocessor(registers: int, warps: int, shared: int, programs: int) -> None:
    metadata = SimpleNamespace(num_warps=warps, shared=shared)
    kernel = SimpleNamespace(n_regs=registers, n_spills=0, metadata=metadata)
    assert timing.resources(kernel)["programs"] == programs


def test_rehearsal(tmp_path: Path) -> None:
    """The command itself, on the smallest shapes, under the interpreter; then again, with nothing left to do."""
    command = [sys.executable, "benchmarks/gpu_sweep.py", "--device", "cpu", "--out", str(tmp_path)]
    command += ["--only", "ceilings,logits,fold,few rows,product_fold,products,tile loop,losses"]
    command += ["--seconds", "900"]  # on a busy machine, the default ends the sweep early
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read(tmp_path)
    assert {row["status"] for row in found} == {"ok"}, done.stdout
    assert {row["group"] for row in found} == set(gpu_sweep.GROUPS) - {"step"}
    assert rows.summary(rows.Table(tmp_path / "sweep.csv", "cpu").rows) in done.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert again.returncode == 0
    assert read(tmp_path) == found


def test_what_is_compiled_ahead_is_found_by_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = next(c for c in all_cases(False) if c.kernel == "logprobs_backward" and not c.current)
    target = sass.TARGETS["sm_90"]
    with precompile.compiling_ahead(target, [(compile_case, (found,)), (raises, ())], processes=1) as futures:
        assert [future.result() for future in futures] == [2, 0]

    def kept() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}

    before = kept()
    assert len(before) == 2
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    launch = (
        "from benchmarks import gpu_sweep, precompile, sass\n"
        "found = next(c for c in gpu_sweep.all_cases(False) if c.kernel == 'logprobs_backward' and not c.current)\n"
        "precompile.compile_kernels(sass.TARGETS['sm_90'], gpu_sweep.compile_case, found)\n"
    )
    subprocess.run([sys.executable, "-c", launch], cwd=ROOT, env=environment, check=True, timeout=300)
    assert kept() == before


def test_the_pool_opens_no_device() -> None:
    target = sass.TARGETS["sm_90"]
    with precompile.compiling_ahead(target, [(_fails_if_it_sees_a_device, ())], processes=1) as futures:
        assert futures[0].result() == 0
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "", "only the pool is kept from the device"


def _fails_if_it_sees_a_device() -> None:
    if os.environ["CUDA_VISIBLE_DEVICES"] != "" or torch.cuda.is_initialized():
        os._exit(1)
