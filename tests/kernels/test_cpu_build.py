"""The native CPU operators are built once, on first use. Where they cannot be built, PyTorch's stand in."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastpref_kernels.cpu import build

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the lock is POSIX's")

# Two steps through forward and backward: 2·log(1/3), and a gradient of 1 − 1/3 from each.
USE = """
import torch, fastpref
logits = torch.zeros(1, 3, 3, requires_grad=True)
for _ in range(2):
    logps = fastpref.sequence_logprobs(logits, torch.tensor([[0, 1, 2]]))
    logps.sum().backward()
print(f"{logps.item():.6f} {logits.grad[0, 0, 1].item():.6f}")
"""
RIGHT = "-2.197225 1.333333\n"
HOLD = """
import fcntl, sys
handle = open(sys.argv[1], "w")
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()  # until it is killed
"""
FAKE_COMPILER = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in *-c\\ *) echo "fake: cannot compile" >&2; exit 1;; esac
echo "g++ (fake) 99.0"
"""
TALKATIVE_COMPILER = """#!/bin/sh
case "$*" in *-c\\ *) ;; *) exit 0;; esac
for line in 1 2 3 4 5 6 7 8 9; do echo "In file included from a header" >&2; done
echo "source.cpp:1:10: fatal error: 'omp.h' file not found" >&2
echo "    1 | #include <omp.h>" >&2
exit 1
"""


def use(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTPREF_CACHE_DIR", str(folder))
    return folder


def fake_compiler(folder: Path, name: str) -> Path:
    """A compiler that tells its version, writes down how it is called, and compiles nothing. Returns its log."""
    folder.mkdir()
    log = folder / "log"
    (folder / name).write_text(FAKE_COMPILER.format(log=log))
    (folder / name).chmod(0o755)
    return log


@pytest.mark.slow
def test_processes_that_come_at_once_build_once(cache: Path) -> None:
    folder = cache / build.key()
    folder.mkdir(parents=True)
    (folder / "lock").touch()  # left by a process that was killed
    processes = [use() for _ in range(3)]
    results = [process.communicate(timeout=600) for process in processes]
    assert [out for out, _ in results] == [RIGHT] * 3
    said = [line for _, err in results for line in err.splitlines()]
    assert len(said) == 1
    assert said[0].startswith("fastpref: building")
    assert sorted(path.name for path in folder.iterdir()) == [f"{build.NAME}.so", "lock"]
    # And one that comes later finds it, says nothing, and needs no compiler.
    (cache / "bin").mkdir()
    assert use(PATH=str(cache / "bin"), CXX="").communicate(timeout=600) == (RIGHT, "")


def test_threads_that_come_at_once_build_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, meet = [], threading.Barrier(4)

    def slow_build(target: Path) -> None:
        built.append(target)
        threading.Event().wait(0.2)
        target.write_bytes(b"a library")

    def come(_: int) -> Path:
        meet.wait()
        return build.library()

    monkeypatch.setattr(build, "_build", slow_build)
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(come, range(4)))
    assert built == list(paths)
    assert paths == {cache / build.key() / f"{build.NAME}.so"}


def test_a_build_that_dies_lets_the_next_one_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache / build.key()
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    monkeypatch.setattr(build, "_build", lambda target: target.write_bytes(b"a library"))
    waiting = threading.Thread(target=build.library, daemon=True)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waiting.start()
        waiting.join(0.3)  # the time in which a thread that ignores the lock would build
        assert waiting.is_alive()
        holder.kill()
    waiting.join(600)
    assert not waiting.is_alive()


def test_a_build_removes_what_a_killed_one_has_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = cache / build.key() / "build-killed"
    left.mkdir(parents=True)
    (left / "logprobs.o").write_bytes(b"half an object")
    monkeypatch.setattr(build, "_build", lambda target: target.write_bytes(b"a library"))
    assert build.library().exists()
    assert sorted(path.name for path in left.parent.iterdir()) == [f"{build.NAME}.so", "lock"]


def test_a_built_library_needs_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = cache / build.key() / f"{build.NAME}.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"a library")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(build.BuildError, match="no C"):
        build.compiler()
    assert build.library() == library


def test_a_failed_build_leaves_nothing_behind_and_is_tried_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(target: Path) -> None:
        raise build.BuildError("no space")

    monkeypatch.setattr(build, "_build", fail)
    with pytest.raises(build.BuildError):
        build.library()
    monkeypatch.setattr(build, "_build", lambda target: target.write_bytes(b"a library"))
    assert build.library().read_bytes() == b"a library"


def test_what_decides_the_code_decides_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {build.key()}
    assert keys == {build.key()}
    source = tmp_path / "logprobs.cpp"
    source.write_text(build.SOURCES[0].read_text() + "\n")
    changes = (
        (build, "SOURCES", (source,)),
        (build, "HEADERS", ()),
        (torch, "__version__", "0.0.0"),
        (build, "flags", lambda: ["-O0"]),
        (build, "_processor", lambda: "flags: none"),
        (build, "contract_header", lambda: "// another contract"),
    )
    for i, (where, name, value) in enumerate(changes, 2):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            keys.add(build.key())
        assert len(keys) == i, name
    assert build.key() in keys


def test_cache_root(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTPREF_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert build.cache_root() == Path("/home/someone/.cache/fastpref")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert build.cache_root() == Path("/caches/fastpref")
    monkeypatch.setenv("FASTPREF_CACHE_DIR", "/here")
    assert build.cache_root() == Path("/here")
    monkeypatch.setenv("FASTPREF_CACHE_DIR", "")  # as if it were not set, and not the current folder
    assert build.cache_root() == Path("/caches/fastpref")


class TestFallback:
    """Where the library cannot be had: one warning that says why, and the same answers."""

    def test_without_a_compiler(self, cache: Path, tmp_path: Path) -> None:
        empty = tmp_path / "bin"
        empty.mkdir()
        out, err = use(PATH=str(empty), CXX="").communicate(timeout=600)
        assert out == RIGHT
        assert err.count("RuntimeWarning") == 1
        assert "no C++ compiler" in err
        assert "g++" in err
        assert not cache.exists()

    @pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
    def test_the_compiler_that_was_found_is_the_one_that_is_called(
        self, name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = fake_compiler(tmp_path / "bin", name)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(log.parent))
        with pytest.warns(RuntimeWarning, match=r"fastpref.*slower(?s:.*)fake: cannot compile"):
            assert build._load.__wrapped__() is None
        assert ".cpp -o " in log.read_text()
        assert os.environ["PATH"] == str(log.parent)
        assert "CXX" not in os.environ
        assert [path.name for path in (cache / build.key()).iterdir()] == ["lock"]

    def test_cxx_with_a_launcher(self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log = fake_compiler(tmp_path / "bin", "made-to-measure++")
        monkeypatch.setenv("CXX", f"env {log.with_name('made-to-measure++')}")
        with pytest.warns(RuntimeWarning, match="fastpref"):
            assert build._load.__wrapped__() is None
        assert ".cpp -o " in log.read_text()

    def test_a_compiler_that_does_not_even_start(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "false")
        with pytest.warns(RuntimeWarning, match=r"fastpref.*slower.*false"):
            assert build._load.__wrapped__() is None

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("FASTPREF_CACHE_DIR", str(tmp_path / "file"))
        with pytest.warns(RuntimeWarning, match=r"fastpref.*slower.*file.*set FASTPREF_CACHE_DIR to"):
            assert build._load.__wrapped__() is None

    def test_of_a_long_output_the_errors_are_told(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = fake_compiler(tmp_path / "bin", "talkative++")
        monkeypatch.setenv("CXX", str(log.with_name("talkative++")))
        log.with_name("talkative++").write_text(TALKATIVE_COMPILER)
        with pytest.warns(RuntimeWarning, match="slower") as warned:
            assert build._load.__wrapped__() is None
        told = str(warned[0].message)
        assert "fatal error: 'omp.h' file not found" in told
        assert len(told.splitlines()) <= 1 + len(build.SOURCES)
        assert "-fopenmp" not in told
        assert "In file included" not in told

    def test_a_library_that_cannot_be_loaded(self, cache: Path) -> None:
        folder = cache / build.key()
        folder.mkdir(parents=True)
        (folder / f"{build.NAME}.so").write_bytes(b"no library")
        with pytest.warns(RuntimeWarning, match=r"fastpref.*slower"):
            assert build._load.__wrapped__() is None

    def test_switched_off(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FASTPREF_NATIVE", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert build._load.__wrapped__() is None
        assert not cache.exists()


def test_the_header_states_the_contract() -> None:
    header = build.contract_header()
    for statement in ("kLse = 1,", "kLogSumSqProbs = 16,", "kTop2Margin = 32,", "kSecond = 8,", "kRowSums = 9;"):
        assert statement in header
