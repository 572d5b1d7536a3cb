"""Build the native CPU operators on first use, and load them.

The library is compiled for the machine it runs on, so its folder in the cache is named by a hash of the source, torch
and the processor. If two machines share a home folder, it then holds two libraries, and neither machine runs the
other's instructions. The hash does not include the compiler: a library that another compiler built from the same
source, for the same processor and torch, computes the same. So a machine without a compiler, such as a slim container,
can use it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastpref_kernels import contract
from fastpref_kernels.cpu.sizes import ROWS, SUMMED

NAME = "fastpref_cpu"
_FOLDER = Path(__file__).parent
SOURCES, HEADERS = (tuple(sorted(_FOLDER.glob(pattern))) for pattern in ("*.cpp", "*.h"))
# The lines of a compiler's or linker's output that say what is wrong, and how many of them a warning shows.
_ERROR, _SHOWN = re.compile(r"\berror\b|cannot|not found|undefined", re.IGNORECASE), 5


class BuildError(RuntimeError):
    """The native operators could not be built. The message says why, and what to install."""


_lock = threading.Lock()


def native() -> Any:
    """Return the namespace of the native operators, or None, after one warning, where they cannot be built."""
    with _lock:
        return _load()


def loaded() -> Any:
    """Return the native operators if they have been loaded, or None; this does not build them."""
    return _load() if _load.cache_info().currsize else None


@functools.cache
def _load() -> Any:
    if os.environ.get("FASTPREF_NATIVE", "1") == "0":
        return None
    try:
        torch.ops.load_library(library())
    except (BuildError, ImportError, OSError) as error:
        warnings.warn(f"fastpref runs its slower PyTorch operators on this CPU: {error}", RuntimeWarning, stacklevel=3)
        return None
    return getattr(torch.ops, NAME)


def cache_root() -> Path:
    """Return the folder of built libraries: FASTPREF_CACHE_DIR, or else `fastpref` in the user's cache folder."""
    root = os.environ.get("FASTPREF_CACHE_DIR")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastpref")
    return Path(root)


def compiler() -> str:
    """Return the command of the C++ compiler: CXX, or one of the usual names.

    Raises:
        BuildError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name.split()[0]):
            return name
    raise BuildError(
        f"no C++ compiler ({', '.join(names)} not found); install one, such as Debian's g++ or conda's gxx, and "
        "start again"
    )


def flags() -> list[str]:
    """Return the compiler's flags for this machine."""
    result = ["-O3", "-fopenmp", "-DAT_PER_OPERATOR_HEADERS"]
    if platform.machine() in ("x86_64", "AMD64"):
        result.append("-march=native")
    # at::vec picks its instructions by macros that torch's own build sets for each of its files.
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        result += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    else:
        result.append("-DCPU_CAPABILITY=DEFAULT")
    return result


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _constant(name: str) -> str:
    return "k" + name.title().replace("_", "")


def _enum(name: str, members: Mapping[str, int]) -> str:
    values = "".join(f"  {_constant(member)} = {value},\n" for member, value in members.items())
    return f"enum {name} : int64_t {{\n{values}}};"


def _list(name: str, statistics: Mapping[str, contract.Statistic]) -> str:
    members = ", ".join(_constant(member) for member in statistics)
    return f"inline constexpr std::array<Statistic, {len(statistics)}> {name}{{{members}}};"


def contract_header() -> str:
    """Return the text of contract.h, which states in C++ what `contract.py` states in Python."""
    lines = [
        "// Generated from fastpref_kernels/contract.py and cpu/sizes.py.",
        "#pragma once",
        "#include <array>",
        "#include <cstdint>",
        "namespace fastpref {",
        _enum("Statistic", {str(member.name): member.value for member in contract.Statistic}),
        "// In the order of the operators' results, from logits and from hidden states.",
        _list("kStatistics", contract.STATISTICS),
        _list("kLinearStatistics", contract.LINEAR_STATISTICS),
        f"constexpr int64_t kBoolean = {contract.BOOLEAN.value};",
        "// The planes of a row's sums.",
        _enum("RowSum", contract.ROW_SUM),
        f"constexpr int64_t kRowSums = {len(contract.ROW_SUM)};",
        f"constexpr int64_t kColumns = {contract.COLUMNS}, kRows = {ROWS}, kSummed = {SUMMED};",
        f"constexpr double kLimit = {contract.LIMIT.hex()}, kEntropyLimit = {contract.ENTROPY_LIMIT.hex()};",
        "}  // namespace fastpref",
    ]
    return "\n".join(lines) + "\n"


def key() -> str:
    """Return a hash of everything that the library's code depends on."""
    digest = hashlib.sha256()
    for part in (torch.__version__, sysconfig.get_platform(), _processor(), *flags(), contract_header()):
        digest.update(part.encode() + b"\0")
    for path in (*SOURCES, *HEADERS):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock. The kernel releases it when its holder dies, unlike a file that marks a lock."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise BuildError(
            f"the cache folder cannot be written ({error}); set FASTPREF_CACHE_DIR to a folder that can be"
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def library() -> Path:
    """Return the path of the library, which is built first if needed. Several processes may call this at once.

    Raises:
        BuildError: the cache folder cannot be written, there is no compiler, or the compiler failed.
    """
    folder = cache_root() / key()
    built = folder / f"{NAME}.so"
    if not built.exists():
        compiler()  # raises where there is none, before anything is written
        with _locked(folder):
            if not built.exists():
                for killed in folder.glob("build-*"):  # left by a build that was killed
                    shutil.rmtree(killed, ignore_errors=True)
                _build(built)
    return built


def _ninja_file() -> str:
    """Return the text of build.ninja, which builds the library in its own folder, next to contract.h."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # torch.utils.cpp_extension would name these, but cannot be imported where setuptools is not installed.
    root = Path(torch.__file__).parent
    includes = [
        "-I.",
        *(f"-isystem {shlex.quote(str(root / path))}" for path in ("include", "include/torch/csrc/api/include")),
    ]
    libraries = [f"-L{shlex.quote(str(root / 'lib'))}"]
    compile_flags = " ".join(["-std=c++20", "-fPIC", abi, *flags(), *includes])
    link_flags = " ".join(["-shared", "-fopenmp", *libraries, "-lc10", "-ltorch_cpu"])
    objects = {f"{source.stem}.o": source for source in SOURCES}
    lines = [
        "rule compile",
        f"  command = {compiler()} {compile_flags} -c $in -o $out",
        "rule link",
        f"  command = {compiler()} $in {link_flags} -o $out",
        *(f"build {name}: compile {str(source).replace(' ', '$ ')}" for name, source in objects.items()),
        f"build {NAME}.so: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def _errors(output: str) -> str:
    """Return the lines of ninja's output that report an error, or its last lines if none does."""
    # Skip ninja's own lines and the commands that it repeats, because their paths may contain any word.
    told = ("ninja: ", "[", "FAILED: ", f"{compiler()} ")
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith(told)]
    errors = [line for line in lines if _ERROR.search(line)]
    return "\n".join(errors[:_SHOWN] or lines[-_SHOWN:])


def _build(target: Path) -> None:
    import ninja

    print(f"fastpref: building its CPU operators for this machine, once, into {target.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        Path(scratch, "build.ninja").write_text(_ninja_file())
        Path(scratch, "contract.h").write_text(contract_header())
        # The package's own ninja: an environment that was not activated does not put it on PATH.
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", scratch]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"{compiler()} failed:\n{_errors(result.stdout + result.stderr)}")
        os.replace(Path(scratch) / f"{NAME}.so", target)
