"""Test `benchmarks/gpu.sh` on parts that stand in for its own: kills, deadlines and the summary."""

from __future__ import annotations

import itertools
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytest

from benchmarks import gpu_run, gpu_summary
from benchmarks.gpu_parts import LOG, PARTS, Part, Settings
from tests.benchmarks import gpu_stand_ins
from tests.benchmarks.conftest import ROOT
from tests.benchmarks.gpu_stand_ins import FILES, NAMES, PRINTED, WRITTEN

HUNG = 120  # seconds after which something that should come will not
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PYTHON": sys.executable}

# Tells that it has started, and is interrupted after that.
SAVES = """
import sys, time
with open(sys.argv[1], "w") as pipe:
    try:
        print("reached", file=pipe, flush=True)
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        print("saved")
"""


def start(out: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, gpu_stand_ins.__file__, "--out", str(out), "--device", "cpu", *options]
    return subprocess.Popen(
        command, env={**ENVIRONMENT, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def read(pipe: TextIO) -> str:
    """What comes through a FIFO, "" at its end; fails where nothing does."""
    ready, _, _ = select.select([pipe], [], [], HUNG)
    assert ready
    return pipe.readline()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def complete(text: str) -> str:
    return text[: text.rfind("\n") + 1]


class TestKilled:
    @pytest.mark.parametrize(
        ("name", "number"),
        [*itertools.product(NAMES, [signal.SIGKILL, signal.SIGINT]), (NAMES[-1], signal.SIGTERM)],
    )
    def test_in_a_part_loses_nothing_that_was_printed(
        self, name: str, number: signal.Signals, fifo: Path, out: Path
    ) -> None:
        process = start(out, BLOCKS=name, FIFO=str(fifo), DEAF="1" if number == signal.SIGTERM else "")
        with fifo.open() as pipe:
            assert read(pipe) == "reached\n"
            process.send_signal(number)
            assert read(pipe) == "", "no process of the part is left"
        said, _ = process.communicate(timeout=HUNG)
        killed = number == signal.SIGKILL
        assert process.returncode == (-number if killed else gpu_run.INTERRUPTED), said
        at = NAMES.index(name)
        for part in PARTS[: at + 1]:
            assert complete(PRINTED[part.name]) in (out / part.prints).read_text()
            if part.name in WRITTEN:
                assert (out / FILES[part.name]).read_text() == WRITTEN[part.name]
        found = gpu_summary.states(out)
        ended = {part: state.state for part, state in found.items()}
        assert ended == {
            **dict.fromkeys(NAMES, "not reached"),
            **dict.fromkeys(NAMES[:at], "passed"),
            name: "killed" if killed else "interrupted",
        }
        page = gpu_summary.page(out)
        assert "- **smoke**: logprobs/in-place: error=2.0 allowed=3.4e-7" in page
        assert ("- **tests**: t.py::test_b: AssertionError: it is" in page) is (at >= NAMES.index("tests"))
        if not killed:
            assert (out / "summary.md").read_text() == page
            assert said.endswith(page)
        elif at:
            assert f"| {NAMES[at - 1]} | passed |" in (out / "summary.md").read_text(), "that of the parts before"

    def test_the_summary_is_made_anew_by_a_command(self, fifo: Path, out: Path) -> None:
        process = start(out, BLOCKS="check", FIFO=str(fifo))
        with fifo.open() as pipe:
            assert read(pipe) == "reached\n"
            process.kill()
        process.communicate(timeout=HUNG)
        command = [sys.executable, "-m", "benchmarks.gpu_summary", str(out)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        assert done.stdout == gpu_summary.page(out) == (out / "summary.md").read_text()
        assert "| check | killed |" in done.stdout


class TestDeadlines:
    def test_a_part_that_never_ends_is_ended_and_the_next_one_runs(self, out: Path, capfd: Any) -> None:
        deaf = "trap '' INT; echo deaf; while :; do sleep 1000; done"
        parts = [
            Part("smoke", 1, lambda settings: ["sh", "-c", deaf]),
            Part("sweep", 1000, lambda settings: ["echo", f"has {settings.seconds}"]),
        ]
        # A thousandth of the time is the first part's, and all that is left the second's.
        assert drive(out, parts, seconds=900) == 1
        states = gpu_summary.states(out)
        assert states["smoke"].state == "out of time"
        assert states["sweep"].state == "passed"
        assert (out / "summary.md").read_text() in capfd.readouterr().out

    def test_a_part_has_its_seconds_then_a_few_to_save_what_it_has(
        self, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done: list[Any] = []

        class Endless:
            group = 1

            def __init__(self, command: list[str], prints: Path) -> None:
                done.append(command)

            def ended(self, seconds: float) -> bool:
                done.append(pytest.approx(seconds, abs=0.2))
                return False

            def signal(self, number: signal.Signals) -> None:
                done.append(number)

            def kill(self) -> int:
                done.append("kill")
                return -signal.SIGKILL

        monkeypatch.setattr(gpu_run, "Process", Endless)
        out.mkdir()
        part = Part("smoke", 1, lambda settings: [str(settings.seconds)])
        watched: list[str] = []
        gpu_run.run_part(part, Settings(out, "cpu", ""), 40.0, gpu_run.Log(out / LOG), watched.append)
        assert done == [["30"], 35, signal.SIGINT, 5, "kill"]
        assert watched == ["1", ""]

    def test_a_part_that_is_interrupted_may_still_write(self, fifo: Path, out: Path) -> None:
        out.mkdir()
        prints = out / "a.txt"
        prints.touch()
        process = gpu_run.Process([sys.executable, "-c", SAVES, str(fifo)], prints)
        with fifo.open() as pipe:
            assert read(pipe) == "reached\n"
        process.signal(signal.SIGINT)
        assert process.ended(HUNG)
        assert process.kill() == 0
        assert prints.read_text() == "saved\n"

    def test_a_part_that_leaves_processes_behind(self, fifo: Path, out: Path) -> None:
        parts = [Part("smoke", 1, lambda settings: ["sh", "-c", f"exec 3>{fifo}; sleep 1000000 & exit 0"])]
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        assert drive(out, parts) == 0
        with os.fdopen(reader) as pipe:
            assert read(pipe) == ""

    @pytest.mark.parametrize(
        ("command", "state"),
        [
            (["sh", "-c", "exit 3"], "failed (status 3)"),
            (["sh", "-c", "kill -SEGV $$"], "failed (SIGSEGV)"),
            (["sh", "-c", "echo no ncu; exit 77"], "not here"),
            (["/no/such/program"], "failed (not started: [Errno 2] No such file or directory: '/no/such/program')"),
        ],
    )
    def test_a_part_that_fails_stops_no_other(self, command: list[str], state: str, out: Path) -> None:
        parts = [Part("smoke", 1, lambda settings: command), Part("sweep", 1, lambda settings: ["echo", "there"])]
        assert drive(out, parts) == int(state != "not here")
        states = gpu_summary.states(out)
        assert [states[name].state for name in ("smoke", "sweep")] == [state, "passed"]
        assert "there\n" in (out / LOG).read_text()


def drive(out: Path, parts: list[Part], seconds: float = 600) -> int:
    """Run parts in this process."""
    before = {number: signal.getsignal(number) for number in gpu_run.ENDING}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_run, "MACHINE", ["echo", "== machine:"])
        try:
            return gpu_run.main(["--out", str(out), "--device", "cpu", "--seconds", str(seconds)], parts)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class TestMachine:
    def test_one_that_hangs_is_not_waited_for(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out.mkdir()
        monkeypatch.setattr(gpu_run, "MACHINE", ["sh", "-c", "while :; do sleep 1000; done", "a probe"])
        log = gpu_run.Log(out / LOG)
        assert gpu_run.probe(Settings(out, "cuda", ""), log, 0.2)
        assert "a probe was ended after 0 s" in gpu_summary.machine(out)

    def test_no_gpu_is_said_at_once(self, out: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
        out.mkdir()
        monkeypatch.setattr(gpu_run, "MACHINE", ["sh", "-c", "echo == machine: 2 cores; exit 3"])
        settings = Settings(out, "cuda", "")
        parts = [Part("smoke", 1, lambda settings: ["echo", "ran"])]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", lambda *_: None)
            assert gpu_run.run(settings, 60, parts, gpu_run.Log(out / LOG)) == 1
        assert "--device cpu rehearses" in capfd.readouterr().out
        assert gpu_summary.states(out)["smoke"].state == "not reached"

    def test_this_one(self) -> None:
        command = [*gpu_run.MACHINE, "cpu"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        assert re.match(r"== machine: \d+ cores, Python 3[.\d]+, torch 2", done.stdout)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class TestBudget:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def budget(self, clock: Clock) -> gpu_run.Budget:
        return gpu_run.Budget(100, {"a": 1, "b": 2, "c": 1}, clock)

    def test_a_share_each(self, budget: gpu_run.Budget, clock: Clock) -> None:
        for name, share in {"a": 25, "b": 50, "c": 25}.items():
            assert budget.allowed(name) == share
            clock.now += share
        assert budget.allowed("c") == 0

    def test_what_is_left_is_handed_on(self, budget: gpu_run.Budget, clock: Clock) -> None:
        clock.now += 5
        assert budget.allowed("b") == 70
        clock.now += 10
        assert budget.allowed("c") == 85

    def test_who_takes_longer_takes_nothing_of_the_later_ones_but_what_is_gone(
        self, budget: gpu_run.Budget, clock: Clock
    ) -> None:
        clock.now += 40
        assert budget.allowed("b") == 35
        clock.now += 70
        assert budget.allowed("c") == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The folder, the exit status and what was said of a run of all parts."""
    out = tmp_path_factory.mktemp("whole")
    process = start(out)
    said, _ = process.communicate(timeout=HUNG)
    return out, process.returncode, said


class TestWhole:
    def test_at_most_eight_files_that_can_be_copied(self, whole: tuple[Path, int, str]) -> None:
        names = sorted(path.name for path in whole[0].iterdir())
        assert names == [
            "a-gpu.csv",
            "check.jsonl",
            "log.txt",
            "profile.txt",
            "smoke.txt",
            "summary.md",
            "sweep.csv",
            "tests.txt",
        ]
        assert len(names) <= 8
        assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)

    def test_failures_come_first_then_parts_then_figures(self, whole: tuple[Path, int, str]) -> None:
        out, status, said = whole
        assert status == 0, "what the parts found wrong is theirs to return"
        page = (out / "summary.md").read_text()
        assert said.endswith(page)
        assert said.startswith(f"== parts: {' '.join(NAMES)}\n== machine: A GPU, torch 2.11\n== smoke: started")
        assert page.index("## Failures") < page.index("## Parts") < page.index("## Figures")
        for line in (
            "A GPU, torch 2.11",
            "- **smoke**: logprobs/in-place: error=2.0 allowed=3.4e-7",
            "- **sweep**: fold V=64 c: OutOfMemory",
            "- **tests**: t.py::test_b: AssertionError: it is",
            "- **bench**: logprobs bf16 V=7 another: RuntimeError no kernel image",
            "- **check**: gae float32 result: error 2, which is too much",
            "- **sanitizer**: memcheck: Invalid __global__ read",
            "- sweep fold V=4096: a 5 µs, 50% of copy; in use b 75000",
            "- bench logprobs bf16 V=7: fastpref 1.25 ms; a peer 2.5",
            "- check: the largest error is 2.00 of the allowance, gae float32 result",
            "- profile fold_kernel: time_duration 1500",
        ):
            assert f"\n{line}\n" in page
        for row in (
            r"smoke \| passed \| [\d.]+ \| 1 PASS, 1 FAIL",
            r"sweep \| passed \| [\d.]+ \| 2 ok, 1 not ok",
            r"tests \| passed \| [\d.]+ \| 1 passed, 1 failed",
            r"bench \| passed \| [\d.]+ \| 1 shapes, 2 timed, 1 failed",
            r"check \| passed \| [\d.]+ \| 1 right, 1 wrong, 1 calls",
            r"profile \| passed \| [\d.]+ \| 1 launches",
            r"sanitizer \| passed \| [\d.]+ \| 1 errors of memcheck",
        ):
            assert re.search(rf"\n\| {row} \|\n", page), (row, page)

    def test_a_torn_last_line_of_any_file_is_left_out(self, whole: tuple[Path, int, str], tmp_path: Path) -> None:
        """A summary is made from any file cut short."""
        for path in whole[0].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        for path in tmp_path.iterdir():
            text = path.read_bytes()
            for size in range(0, len(text), max(1, len(text) // 20)):
                path.write_bytes(text[:size])
                assert "## Parts" in gpu_summary.page(tmp_path)
            path.write_bytes(text)

    def test_parts_in_the_order_asked_for(self, out: Path) -> None:
        said, _ = start(out, "--only", "check,smoke").communicate(timeout=HUNG)
        assert list(gpu_summary.states(out)) == ["check", "smoke"]
        assert said.index("== check: passed") < said.index("== smoke: started")
        again, _ = start(out, "--only", "sweep").communicate(timeout=HUNG)
        assert list(gpu_summary.states(out)) == ["check", "smoke", "sweep"], "a second run adds to the first"
        assert "| check | passed |" in again


def test_the_summary_is_at_most_60_lines(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text(
        f"== parts: {' '.join(NAMES)}\n"
        + "".join(f"== {name}: started\n== {name}: failed (status 1) in 1.0 s\n" for name in NAMES)
        + "== sanitizer: started\n"
        + "".join(f"========= Error {'x' * i}\n" for i in range(99))
        + "== sanitizer: failed (status 1) in 1.0 s\n"
    )
    (tmp_path / "smoke.txt").write_text("".join(f"FAIL case {'x' * i}\n" for i in range(99)))
    (tmp_path / "tests.txt").write_text("".join(f"FAILED case 0.1 s: {'x' * i}\n" for i in range(999)))
    rows = [f"fold,{i},a,1.0,1,ok\nfold,{i},a,1.0,,{'x' * i}\n" for i in range(99)]
    (tmp_path / "sweep.csv").write_text("kernel,V,config,us,current,status\n" + "".join(rows))
    page = gpu_summary.page(tmp_path)
    assert page.count("\n") <= 60
    assert "- **tests**: 995 more of 995 other kinds" in page
    assert "| sanitizer | failed (status 1) |" in page
    assert "## Figures" in page


def test_failures_that_differ_in_numbers_only_are_one_line(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text("== parts: tests\n== tests: started\n")
    lines = [f"FAILED t.py::test[{i}] 0.1 s: off by {i}.5e-07\n" for i in range(50)]
    (tmp_path / "tests.txt").write_text("FAILED t.py::other 0.1 s: raises\n" + "".join(lines))
    found = gpu_summary.failures(tmp_path, gpu_summary.states(tmp_path))
    assert found == [
        "- **tests**: 50 × t.py::test[0]: off by 0.5e-07",
        "- **tests**: t.py::other: raises",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required: --out"]),
        (["--out", "x", "--minutes", "9"], ["unrecognized arguments: --minutes 9"]),
        (["--out", "x", "--only", "smoke,sweeep"], ["'sweeep'", "the parts are smoke, sweep, tests, bench, check"]),
        (["--out", "x", "--device", "tpu"], ["'tpu'", "cuda", "cpu"]),
        (["--out", "x", "--seconds", "3"], ["--seconds is 3", "need 12 at least"]),
        (["--out", "x", "--seconds", "nan"], ["--seconds is nan", "need 12 at least"]),
    ],
)
def test_mistakes_say_what_was_given_and_what_is_wanted(arguments: list[str], words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_run.main(arguments)
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert all(word in said for word in words), said


def test_the_script_runs_it_from_any_folder(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--out", "here", "--device", "cpu", "--only", "nothing"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'nothing'" in done.stderr


def test_the_parts_are_those_that_are_documented() -> None:
    assert NAMES == ["smoke", "sweep", "tests", "bench", "check", "profile", "sanitizer"]
    settings = Settings(Path("out"), "cpu", "default", 9)
    commands: dict[str, Callable[[Settings], list[str]]] = {part.name: part.command for part in PARTS}
    assert commands["smoke"](settings)[1:] == ["-m", "benchmarks.gpu_smoke", "--device", "cpu", "--seconds", "9"]
    assert commands["sweep"](settings)[3:] == ["--seconds", "9", "--out", "out", "--device", "cpu"]
