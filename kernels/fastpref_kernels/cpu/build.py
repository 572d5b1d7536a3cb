"""Builds the native CPU operators on first use, and loads them.

The library is made for the machine it runs on, so it is cached under what decides its code: the source, torch and the
processor. A home folder shared by two machines then holds two libraries, not one that runs the wrong instructions on
one of them. The compiler is no part of this. A library that another compiler built from the same source, for the same
processor and torch, computes the same, and a machine without a compiler, such as a slim container, can use it.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAME = "fastpref_cpu"
SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp") for name in ("logprobs", "linear", "hidden", "product", "memory")
)
# The lines of a compiler's or linker's output that say what is wrong, and how many of them a warning shows.
_ERROR, _SHOWN = re.compile(r"\berror\b|cannot|not found|undefined", re.IGNORECASE), 5
HEADERS = tuple(Path(__file__).with_name(name) for name in ("lanes.h", "rows.h", "linear.h", "memory.h", "product.h"))


class BuildError(RuntimeError):
    """The native operators could not be built; says why and what to install."""


_lock = threading.Lock()


def native() -> Any:
    """The namespace of the native operators, or None, after one warning, where they cannot be built."""
    with _lock:
        return _load()


def loaded() -> Any:
    """The native operators if they have been asked for, and are there: None builds nothing."""
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
    """Return where built libraries are kept: FASTPREF_CACHE_DIR, else the user's cache folder."""
    root = os.environ.get("FASTPREF_CACHE_DIR")
    if not root:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastpref")
    return Path(root)


def compiler() -> str:
    """The C++ compiler, by CXX or the usual names. Raises `BuildError` where there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name.split()[0]):
            return name
    raise BuildError(
        f"no C++ compiler ({', '.join(names)} not found); install one, such as Debian's g++ or conda's gxx, and "
        "start again"
    )


def flags() -> list[str]:
    """Compiler flags for this machine."""
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


def key() -> str:
    """Return a hash of all that decides the library's code."""
    digest = hashlib.sha256()
    for part in (torch.__version__, sysconfig.get_platform(), _processor(), *flags()):
        digest.update(part.encode() + b"\0")
    for path in (*SOURCES, *HEADERS):
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold its lock, which the kernel lets go of when its holder dies, unlike a mere file."""
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
    """Return the path of the built library, built first if need be. Safe when many processes come at once.

    Raises:
        BuildError: the cache folder cannot be written, there is no compiler, or it failed.
    """
    folder = cache_root() / key()
    built = folder / f"{NAME}.so"
    if not built.exists():
        compiler()  # raises where there is none, before anything is written
        with _locked(folder):
            if not built.exists():
                for killed in folder.glob("build-*"):  # what a build that was killed has left
                    shutil.rmtree(killed, ignore_errors=True)
                _build(built)
    return built


def _ninja_file() -> str:
    """What to build and how, for a folder that will hold nothing else."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # torch.utils.cpp_extension would name these, but cannot be imported where setuptools is not installed.
    root = Path(torch.__file__).parent
    includes = [f"-isystem {shlex.quote(str(root / path))}" for path in ("include", "include/torch/csrc/api/include")]
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
    """Return the lines of ninja's output that say what is wrong, or its last lines where none is known to."""
    # Not its own lines, nor the commands it repeats, whose paths may say anything.
    told = ("ninja: ", "[", "FAILED: ", f"{compiler()} ")
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith(told)]
    errors = [line for line in lines if _ERROR.search(line)]
    return "\n".join(errors[:_SHOWN] or lines[-_SHOWN:])


def _build(target: Path) -> None:
    import ninja

    print(f"fastpref: building its CPU operators for this machine, once, into {target.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        Path(scratch, "build.ninja").write_text(_ninja_file())
        # The package's own ninja: an environment that was not activated does not put it on PATH.
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", scratch]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildError(f"{compiler()} failed:\n{_errors(result.stdout + result.stderr)}")
        os.replace(Path(scratch) / f"{NAME}.so", target)
