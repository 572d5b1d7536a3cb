"""Tests that `fastpref check` reaches every operator and every loss, and refuses wrong results."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

import torch
from rich.live import Live
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from fastpref import cli, losses
from fastpref.cli.check import workers
from fastpref.cli.check.run import Result, run
from fastpref.cli.doctor.devices import operators
from fastpref.testing.case import DTYPES
from fastpref.testing.examples import EXAMPLES
from fastpref.testing.linear_cases import linear_cases
from fastpref.testing.loss_cases import loss_cases
from fastpref.testing.product_cases import product_cases
from fastpref_kernels import cpu
from fastpref_kernels.cpu import linear as cpu_linear

DTYPE_NAMES = {"float16", "bfloat16", "float32", "float64"}
CPU = torch.device("cpu")


def check(*arguments: str) -> Any:
    return CliRunner().invoke(cli._app(), ["check", "--device", "cpu", *arguments])


class Called(TorchDispatchMode):
    """Records the names of the fastpref operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastpref":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Assert that a check leaves no process group behind, and restores the number of threads."""
    threads = torch.get_num_threads()
    yield
    assert not torch.distributed.is_initialized()
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Any], set[str]]:
    """Run the whole check once; return what it printed and the operators that were called."""
    with Called() as called:
        result = check("--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), called.names


@pytest.mark.slow
class TestEverything:
    def test_all_is_right_on_this_machine(self, whole: Any) -> None:
        found, _ = whole
        assert found["ok"]
        assert all(case["ok"] and case["fault"] is None for case in found["cases"])
        assert found["versions"]["torch"] == torch.__version__
        assert list(found["devices"]) == ["cpu"]
        assert found["seconds"] > 0

    def test_reaches_every_operator_that_has_a_kernel_on_a_cpu(self, whole: Any) -> None:
        _, called = whole

        def has_kernel(name: str) -> bool:
            keys = ("CPU", "CompositeExplicitAutograd")
            return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpref::{name}", key) for key in keys)

        assert called == {name for name in operators() if has_kernel(name)}
        # The others are losses of TABLE, which run as one launch on a GPU and as the reference formula on a CPU.
        assert set(operators()) - called == {loss.operator for loss in losses.TABLE}

    def test_judges_every_loss_in_every_dtype_with_value_and_gradients(self, whole: Any) -> None:
        found, _ = whole
        for entry in losses.TABLE:
            for reduction in ("mean", "none"):
                of_case = [case for case in found["cases"] if case["case"] == f"{entry.name}/{reduction}"]
                assert {case["dtype"] for case in of_case} == DTYPE_NAMES
                tensors, _ = entry.example(torch.Generator().manual_seed(0), 2)
                outputs = [case["output"] for case in of_case if case["dtype"] == "float32"]
                assert sum(name.startswith("∂") for name in outputs) == sum(t.is_floating_point() for t in tensors)
                assert {"loss"} <= set(outputs) or {"result"} <= set(outputs)
        for entry in losses.RLHF:
            assert {case["dtype"] for case in found["cases"] if case["case"].split("/")[0] == entry.name} == DTYPE_NAMES

    def test_judges_every_route_of_a_product_that_runs_here(self, whole: Any) -> None:
        found, _ = whole
        judged = {(case["case"], case["dtype"]) for case in found["cases"]}
        for case in product_cases():
            for dtype in case.dtypes:
                assert ((case.name, str(dtype).removeprefix("torch.")) in judged) is case.runs_on(CPU)

    def test_numbers_are_within_the_allowance(self, whole: Any) -> None:
        found, _ = whole
        numbers = [case for case in found["cases"] if case["error"] is not None]
        assert len(numbers) > 1500
        assert all(0 <= case["error"] <= case["allowance"] for case in numbers)
        assert any(case["error"] > 0 for case in numbers)


def planted(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], name: str = "dpo_loss:planted") -> None:
    """Add a row to the table that differs from the first row in its name and its function."""
    row = replace(losses.TABLE[0], name=name, function=function)
    monkeypatch.setattr(losses, "TABLE", (*losses.TABLE[:2], row))
    monkeypatch.setitem(EXAMPLES, name, losses.TABLE[0].example)


def of_dpo(change: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    def function(policy_chosen_logps: Tensor, *args: Any, **options: Any) -> Any:
        return change(losses.dpo_loss(policy_chosen_logps, *args, **options), policy_chosen_logps)

    return function


def wrong_gradient(result: Any, chosen: Tensor) -> Any:
    """Return the same value with a gradient that is 1% off."""
    extra = 0.01 * chosen.float().mean()
    return result._replace(loss=result.loss + (extra - extra.detach()).to(result.loss.dtype))


def wrong_value(result: Any, chosen: Tensor) -> Any:
    return result._replace(loss=result.loss + 1e-3 * torch.ones_like(result.loss))


def wrong_report(result: Any, chosen: Tensor) -> Any:
    return result._replace(rejected_rewards=result.chosen_rewards)


def wrong_dtype(result: Any, chosen: Tensor) -> Any:
    return result._replace(loss=result.loss.double())


def not_a_number(result: Any, chosen: Tensor) -> Any:
    return result._replace(chosen_rewards=result.chosen_rewards * torch.nan)


def raises(result: Any, chosen: Tensor) -> Any:
    raise RuntimeError("planted here")


class TestWhatIsWrong:
    def test_a_new_row_of_the_table_is_checked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        planted(monkeypatch, of_dpo(lambda result, chosen: result))
        result = check("--only", "planted")
        assert result.exit_code == 0, result.output
        assert "dpo_loss:planted" in result.stdout

    @pytest.mark.parametrize(
        ("change", "output", "words"),
        [
            (wrong_gradient, "∂policy_chosen_logps", "eager's is"),
            (wrong_value, "loss", "eager's is"),
            (wrong_report, "rejected_rewards", "eager's is"),
            (wrong_dtype, "loss", "torch.float64, wanted torch.float32"),
            (not_a_number, "chosen_rewards", "37 values are not finite"),
            (raises, None, "RuntimeError: planted here"),
        ],
    )
    def test_is_named_and_makes_the_status_1(
        self, change: Callable[..., Any], output: str | None, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        planted(monkeypatch, of_dpo(change))
        result = check("--json", "--dtype", "float32", "--only", "dpo_loss:")
        assert result.exit_code == 1, result.output
        found = json.loads(result.stdout)
        assert not found["ok"]
        wrong = [case for case in found["cases"] if not case["ok"]]
        assert {case["case"] for case in wrong} == {"dpo_loss:planted/mean", "dpo_loss:planted/none"}
        assert {case["output"] for case in wrong} == {output}
        assert all(words in case["fault"] for case in wrong)

    def test_is_in_the_table_and_below_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        planted(monkeypatch, of_dpo(wrong_value))
        result = check("--only", "*planted/none")
        assert result.exit_code == 1
        (row,) = [line for line in result.stdout.splitlines() if line.startswith("│ dpo_loss:planted")]
        assert float(row.split("│")[3].split()[0]) > 1
        text = " ".join(result.stdout.split())
        assert "wrong dpo_loss:planted/none, cpu, float32: loss: 1.0e-03 of" in text
        assert "4 are wrong" in text  # one for each dtype

    def test_that_it_raises_is_in_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        planted(monkeypatch, of_dpo(raises))
        result = check("--only", "planted")
        (row,) = [line for line in result.stdout.splitlines() if line.startswith("│ dpo_loss:planted")]
        assert "RuntimeError: planted here" in row

    def test_two_runs_that_differ_within_the_allowance_are_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def unsteady(result: Any, chosen: Tensor) -> Any:
            calls.append(1)
            step = torch.finfo(result.loss.dtype).eps if len(calls) % 2 else 0.0
            return result._replace(loss=result.loss * (1 + step))

        planted(monkeypatch, of_dpo(unsteady))
        result = check("--only", "planted/mean", "--dtype", "float32", "--json")
        assert result.exit_code == 1
        faults = {case["output"]: case["fault"] for case in json.loads(result.stdout)["cases"]}
        assert faults["loss"] == "two runs differ"
        assert faults["chosen_rewards"] is None

    def test_a_result_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        planted(monkeypatch, of_dpo(lambda result, chosen: result.loss))
        result = check("--only", "planted/mean", "--json")
        assert result.exit_code == 1
        assert "wanted loss, chosen_rewards" in json.loads(result.stdout)["cases"][0]["fault"]

    @pytest.mark.parametrize(
        ("operator", "only", "spoil"),
        [
            ("logprobs", "token_logprobs/plain", lambda out: (out[0] * (1 + 1e-3), *out[1:])),
            ("logprobs_backward", "token_logprobs/plain", lambda out: out * 1.06),
            ("linear_logprobs", "linear_token_logprobs/save, no bias", lambda out: (out[0] * (1 + 1e-3), *out[1:])),
            (
                "linear_logprobs_backward",
                "linear_token_logprobs/recompute, no bias",
                lambda out: (out[0], out[1] * 1.06, out[2]),
            ),
            ("scaled_gradient", "linear_dpo_loss/several chunks", lambda out: out * 1.06),
            ("gae", "gae", lambda out: (out[0], out[1] + 1e-3)),
        ],
    )
    def test_an_operator_that_is_off(
        self, operator: str, only: str, spoil: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = getattr(torch.ops.fastpref, operator)
        monkeypatch.setattr(torch.ops.fastpref, operator, lambda *args: spoil(own(*args)))
        result = check("--only", only, "--json")
        assert result.exit_code == 1
        wrong = {case["dtype"] for case in json.loads(result.stdout)["cases"] if not case["ok"]}
        assert wrong >= {"bfloat16", "float32", "float64"}


class TestProducts:
    """Matrix products, in layouts that a library may silently refuse."""

    def test_a_product_that_is_refused_in_silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        product = cpu_linear.product

        def refuses(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
            if a.stride() != (1, 1):
                product(out, a, b, add)

        monkeypatch.setattr(cpu_linear, "product", refuses)
        result = check("--only", "product/*", "--dtype", "bfloat16", "--json")
        assert result.exit_code == 1
        wrong = {case["case"] for case in json.loads(result.stdout)["cases"] if not case["ok"]}
        assert "product/9 x 1 contiguous, 1 x 100 contiguous" in wrong
        assert "product/33 x 129 contiguous, 129 x 65 contiguous" not in wrong

    def test_a_route_that_is_not_here_is_not_judged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu, "native", lambda: None)
        result = check("--only", "product*/2 x 2 *", "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        rows = {case["case"].partition("/")[0] for case in found["cases"]}
        assert rows <= {"product", "product:oneDNN"}
        assert found["devices"]["cpu"].endswith(
            "PyTorch operators, bfloat16 products by float32 products of widened operands"
        )

    def test_the_route_is_told(self) -> None:
        text = " ".join(check("--only", "product*/2 x 2 contiguous, *").stdout.split())
        route = {"MKL": "MKL, with AMX_BF16", "oneDNN": "oneDNN on packed blocks"}.get(
            cpu_linear.bf16_route(), "float32"
        )
        assert f"bfloat16 products by {route}" in text
        assert "│ product " in text


class TestOtherMachines:
    def test_a_cpu_needs_no_nccl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A CUDA build of torch has NCCL, and on a machine without a GPU it cannot start."""
        asked, init = [], torch.distributed.init_process_group

        def counted(backend: str, **options: Any) -> None:
            asked.append(backend)
            init("gloo", **options)

        monkeypatch.setattr(torch.distributed, "init_process_group", counted)
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        (ranked, *_) = (case for case in linear_cases() if "rank" in case.name)
        with ranked.within(CPU):
            pass
        with ranked.within(torch.device("cuda", 0)):
            pass
        assert asked == ["cpu:gloo", "cpu:gloo,cuda:nccl"]

    def test_without_numpy(self) -> None:
        command = (
            "import sys; sys.modules['numpy'] = None; from fastpref.cli import main; "
            "sys.argv[1:] = ['check', '--device', 'cpu', '--dtype', 'float32', '--only', 'linear_*rank*', '--json']; "
            "main()"
        )
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout)["ok"]

    def test_json_is_all_that_stdout_holds(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Output of a library goes to stderr: from Python, from C's buffer, or straight to the descriptor."""

        def chatty(*args: Any, **options: Any) -> Any:
            print("from Python")
            ctypes.CDLL(None).puts(b"from C")
            os.write(1, b"from a descriptor\n")
            return losses.dpo_loss(*args, **options)

        monkeypatch.setattr(losses, "TABLE", (replace(losses.TABLE[0], function=chatty),))
        result = check("--json", "--only", f"{losses.TABLE[0].name}/mean", "--dtype", "float32")
        assert json.loads(result.stdout)["cases"]
        print("after", flush=True)
        ctypes.CDLL(None).fflush(None)
        out, err = capfd.readouterr()
        assert out == "after\n"
        assert "from C\n" in err
        assert "from a descriptor\n" in err


class TestOptions:
    def test_only_is_a_part_or_a_glob(self) -> None:
        def names(pattern: str) -> set[str]:
            result = check("--only", pattern, "--dtype", "float64", "--json")
            assert result.exit_code == 0, result.output
            return {case["case"] for case in json.loads(result.stdout)["cases"]}

        assert names("ppo_value") == {"ppo_value_loss/token", "ppo_value_loss/sequence"}
        assert names("dpo_loss:*/mean") == {f"dpo_loss:{kind}/mean" for kind in losses.LOSS_TYPES}
        assert names("gae") == {"gae"}

    def test_dtypes(self) -> None:
        result = check(
            "--only", "kto_loss", "--dtype", "bfloat16", "--dtype", "float32", "--dtype", "float32", "--json"
        )
        cases = json.loads(result.stdout)["cases"]
        assert {case["dtype"] for case in cases} == {"bfloat16", "float32"}
        assert len({tuple(case.items()) for case in cases}) == len(cases)

    def test_verbose_has_a_line_for_every_tensor(self) -> None:
        result = check("--only", "kto_loss/mean", "--verbose")
        text = " ".join(result.stdout.split())
        for dtype in DTYPE_NAMES:
            for output in ("loss", "rewards", "∂policy_logps", "∂ref_logps"):
                assert f"kto_loss/mean, cpu, {dtype}: {output}: " in text
        assert "16 tensors of 4 calls" in text

    def test_a_terminal_sees_the_table_fill_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shown: list[int] = []
        update = Live.update
        monkeypatch.setattr(Live, "update", lambda live, table: (shown.append(1), update(live, table)))
        result = CliRunner(env={"FORCE_COLOR": "1"}).invoke(cli._app(), ["check", "--device", "cpu", "--only", "gae"])
        assert result.exit_code == 0, result.output
        assert len(shown) == len(DTYPES)
        assert "all are within" in result.stdout
        shown.clear()
        assert check("--only", "gae").stdout.count("│ gae ") == 1
        assert not shown

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--only", "no such case"), "no case is called 'no such case'"),
            (("--dtype", "int8"), "'int8' is none of float16, bfloat16, float32, float64"),
            (("--device", "abacus"), "'abacus' is no device"),
        ],
    )
    def test_mistakes_are_usage_errors(self, arguments: tuple[str, ...], words: str) -> None:
        result = check(*arguments)
        assert result.exit_code == 2
        # Typer draws a box around the message.
        assert words in " ".join(result.stderr.replace("│", " ").split())

    def test_a_device_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        result = check("--device", "cuda")
        assert result.exit_code == 2
        assert "torch finds no cuda here" in " ".join(result.stderr.replace("│", " ").split())

    def test_the_accelerator_is_checked_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastpref.cli.check import command

        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
        assert command._devices(None) == [CPU, torch.device("xpu")]
        assert command._devices(["xpu:1", "cpu", "cpu"]) == [torch.device("xpu:1"), CPU]

    def test_what_runs_on_another_device_is_brought_back(self) -> None:
        """Nothing can be moved from the meta device; the error is a result, not a traceback."""
        (case, *_) = loss_cases()
        (result,) = run(case, torch.device("meta"), torch.float32)
        assert result.device == "meta"
        assert "NotImplementedError" in (result.fault or "")


def serve_and_end(pipe: Any, threads: int) -> None:
    """Serve as a worker does, except that one case ends the process and another breaks the device."""

    def spoiled(case: Any, device: torch.device, dtype: torch.dtype) -> list[Result]:
        if case.name == "kto_loss/none" and dtype == torch.float32:
            os.kill(os.getpid(), signal.SIGKILL)
        results = run(case, device, dtype)
        if case.name == "kto_loss/none" and dtype == torch.float16:
            workers.works = lambda device: False
            return [replace(result, fault="an illegal memory access") for result in results]
        return results

    workers.run = spoiled
    workers._serve(pipe, threads)


class TestProcesses:
    def test_give_the_same_results(self, tmp_path: Path) -> None:
        def of(*arguments: str) -> list[tuple[Any, ...]]:
            result = check("--only", "kto_loss", "--json", *arguments)
            assert result.exit_code == 0, result.output
            return sorted(tuple(map(str, case.values())) for case in json.loads(result.stdout)["cases"])

        lines = tmp_path / "lines.jsonl"
        assert of() == of("--processes", "2", "--jsonl", str(lines))
        assert len(lines.read_text().splitlines()) == 4 * len(DTYPES) * 2

    def test_a_case_that_ends_its_process_is_a_result_and_the_others_go_on(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(workers, "_serve", serve_and_end)
        jobs = [(case, CPU, dtype) for case in loss_cases() if case.row == "kto_loss" for dtype in DTYPES]
        found = list(workers.in_processes(jobs, 1))
        faults = {(x[0].case.name, x[0].dtype): x[0].fault for x in found}
        assert faults == {
            **{(case.name, name): None for case, *_ in jobs for name in DTYPE_NAMES},
            ("kto_loss/none", "float32"): "it ended its process (signal SIGKILL)",
            ("kto_loss/none", "float16"): "an illegal memory access",
        }
        assert not multiprocessing.active_children()

    def test_a_line_is_there_as_soon_as_its_case_is_judged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = tmp_path / "lines.jsonl"
        seen: list[int] = []

        def looks(result: Any, chosen: Tensor) -> Any:
            seen.append(len(lines.read_text().splitlines()))
            return result

        planted(monkeypatch, of_dpo(looks))
        result = check("--only", "planted", "--jsonl", str(lines), "--json", "--dtype", "float32")
        records = [json.loads(line) for line in lines.read_text().splitlines()]
        assert records == json.loads(result.stdout)["cases"]
        of_case = len([record for record in records if record["case"] == "dpo_loss:planted/mean"])
        assert seen == [0, 0, of_case, of_case], "two runs of each case"
