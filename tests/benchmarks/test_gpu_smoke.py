"""The smoke of every kernel: what its cases reach, what it says of faults, and that none of them stops it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from benchmarks import gpu_smoke, precompile, sass
from benchmarks.smoke import cases
from benchmarks.smoke.worker import Answer, LostError, Worker
from benchmarks.triton_on_cpu import launchers_on_cpu
from fastpref_kernels import ops, triton
from tests.benchmarks import planted_smoke

ROOT = Path(__file__).parents[2]
REPRESENTATIVE = (
    "token_logprobs/less-than-a-block/float16",
    "fold_backward/plain/float32",
    "product_fold/wide-plain/float16",
    "product_fold/wide-plain/bfloat16",
    "dpo_loss:simpo/mean/float32",
    "linear_preference_loss/several-chunks/float32",
)


def test_rehearsal() -> None:
    command = [sys.executable, "benchmarks/gpu_smoke.py", "--device", "cpu", "--only", *REPRESENTATIVE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first.startswith("6 cases on Triton's interpreter")
    assert last.startswith("5 passed, 0 failed, 1 skipped, 0 not reached in ")
    passed = [match[1] for line in lines if (match := re.match(r"PASS (\S+) error=\S+e-\d+ allowed=\S+e-\d+$", line))]
    skipped = [line.split()[1] for line in lines if line.startswith("SKIP") and "cannot multiply bfloat16" in line]
    assert {*passed, *skipped} == set(REPRESENTATIVE)


def test_faults_are_told_and_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    answers: dict[str, str] = {}

    class Impatient(Worker):
        def judge(self, name: str, seconds: float) -> Answer:
            return super().judge(name, 0.1 if "never returns" in planted_smoke.FAULTS[name] else seconds)

    start = functools.partial(Impatient, target=planted_smoke.serve)
    said: list[str] = []
    counts = gpu_smoke.smoke("cpu", 1e6, tuple(planted_smoke.FAULTS), start=start, say=said.append)
    for line in said:
        status, name, text = line.split(" ", 2)
        answers[name] = f"{status} {text}"
    found = [answers[name] for name in planted_smoke.FAULTS]
    wanted = [
        r"FAIL result 0: error 1\.0\d*e-03, which is .* ulp; eager's is .* ulp",
        r"FAIL ∂policy_logps: \d+ values are not finite",
        r"FAIL RuntimeError: planted: no kernel image",
        r"FAIL the process died, with exit code 3",
        r"FAIL no answer in 0 s",
        r"PASS error=\S+ allowed=\S+",
    ]
    for text, pattern in zip(found, wanted, strict=True):
        assert re.fullmatch(pattern, text), text
    assert said[-1].startswith("1 passed, 5 failed, 0 skipped, 0 not reached in ")
    assert counts["FAIL"] == 5


class FakeWorker:
    """Answers as its plan says; a case takes ten seconds of a clock that nobody waits for."""

    description = "a fake"
    target: Any = None

    def __init__(self, plan: dict[str, Answer | LostError], clock: list[float]) -> None:
        self.plan, self.clock, self.names, self.stopped = plan, clock, list(plan), False

    def judge(self, name: str, seconds: float) -> Answer:
        assert not self.stopped
        self.clock[0] += 10
        answer = self.plan[name]
        if isinstance(answer, LostError):
            raise answer
        return answer

    def stop(self) -> None:
        self.stopped = True


def passing(*names: str) -> dict[str, Answer | LostError]:
    return {name: Answer(name, "PASS", "error=0.0e+00 allowed=0.0e+00") for name in names}


def run(
    plan: dict[str, Answer | LostError], seconds: float = 1e6, start: Callable[[str], Any] | None = None
) -> tuple[list[str], list[FakeWorker]]:
    clock, workers, said = [0.0], [], []

    def started(device: str) -> Any:
        workers.append(FakeWorker(plan, clock))
        return workers[-1]

    gpu_smoke.smoke("cuda", seconds, start=start or started, clock=lambda: clock[0], say=said.append)
    return said, workers


def test_no_case_is_begun_after_the_deadline() -> None:
    said, (worker,) = run(passing("a", "b", "c", "d"), seconds=20)
    assert [line.split()[1] for line in said[1:-1]] == ["a", "b"]
    assert said[-1] == "2 passed, 0 failed, 0 skipped, 2 not reached in 20 s"
    assert worker.stopped


@pytest.mark.parametrize(
    "end", [Answer("b", "FAIL", "AcceleratorError: an illegal memory access", broken=True), LostError("it died")]
)
def test_a_lost_process_is_replaced(end: Answer | LostError) -> None:
    """A context that an error has broken fails every later case."""
    said, workers = run({**passing("a"), "b": end, **passing("c")})
    assert [line.split(" ")[0] for line in said[1:-1]] == ["PASS", "FAIL", "its", "PASS"]
    assert said[-1].startswith("2 passed, 1 failed, 0 skipped, 0 not reached")
    assert len(workers) == 2
    assert all(worker.stopped for worker in workers)


def test_a_process_that_cannot_start_is_a_failure() -> None:
    def start(device: str) -> Any:
        raise LostError("the process died, with exit code 1")

    said, _ = run({}, start=start)
    assert said[-2:] == [
        "FAIL start the process died, with exit code 1",
        "0 passed, 1 failed, 0 skipped, 0 not reached in 0 s",
    ]


def test_kernels_are_compiled_ahead_for_as_long_as_cases_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    @contextlib.contextmanager
    def compile_ahead(target: Any, names: list[str]) -> Iterator[None]:
        told.append((target, list(names)))
        yield
        told.append("ended")

    monkeypatch.setattr(gpu_smoke, "compile_ahead", compile_ahead)
    monkeypatch.setattr(FakeWorker, "target", "sm_90")
    _, (worker,) = run(passing("a", "b"))
    assert told == [("sm_90", ["a", "b"]), "ended"]
    assert worker.stopped


def test_a_case_is_compiled_by_its_name_on_a_gpu() -> None:
    of_gpu, of_cpu = ([case.name for case in cases.every_case(device)] for device in ("cuda", "cpu"))
    assert of_gpu == of_cpu
    target = sass.TARGETS["sm_90"]
    assert precompile.compile_kernels(target, gpu_smoke.launch, "sequence_logprobs/sum/bfloat16") == 2
    assert precompile.compile_kernels(target, gpu_smoke.launch, "linear_dpo_loss/one-chunk/float32") >= 2


def kernels() -> set[str]:
    """Every kernel that a launcher starts."""
    modules = [
        importlib.import_module(f"{triton.__name__}.{info.name}") for info in pkgutil.iter_modules(triton.__path__)
    ]
    found = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


def launched(chosen: list[Any]) -> tuple[set[str], set[str]]:
    """The kernels and the operators that cases reach, none of which runs."""
    reached_kernels: set[str] = set()

    def record(kernel: Any, *_: Any, **__: Any) -> None:
        reached_kernels.add(kernel.fn.__name__)

    # A dispatch mode would see the operators too, but losses from hidden states take another way under one.
    with launchers_on_cpu(), mock.patch.object(JITFunction, "run", record), torch.profiler.profile() as profile:
        for case in chosen:
            # What nothing has written may be refused.
            with contextlib.suppress(Exception):
                case.launch("cpu")
    prefix = f"{ops.NAMESPACE}::"
    return reached_kernels, {event.key.removeprefix(prefix) for event in profile.key_averages() if prefix in event.key}


def test_the_first_cases_launch_every_kernel() -> None:
    assert len(kernels()) > 10
    reached, _ = launched([case for case in cases.every_case("cpu") if case.tier == 0])
    assert kernels() - reached == set()


def test_the_cases_of_everyday_use_call_every_operator() -> None:
    every = {schema.partition("(")[0] for schema in ops._SCHEMAS}
    chosen = [case for case in cases.every_case("cpu") if case.tier < 2 and case.name.endswith("/float32")]
    _, reached = launched(chosen)
    assert every - reached == set()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_differ_and_are_words(device: str) -> None:
    names = [case.name for case in cases.every_case(device)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if " " in name]


def test_both_devices_have_the_same_cases() -> None:
    assert [case.name for case in cases.every_case("cpu")] == [case.name for case in cases.every_case("cuda")]
