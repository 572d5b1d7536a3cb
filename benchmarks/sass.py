"""Triton kernels compiled without a GPU and read back: loops, instructions, registers, spills, width of every access.

A launcher is called on CPU tensors as it would be on a GPU's; Triton specialises and compiles what it launches for the
target, and nothing runs. So what is read here is what a launch would use, not a copy of its signature.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import instructions
from benchmarks.instructions import Instruction, Line

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Loop:
    """A stretch of instructions that one iteration issues: a loop's body, or all of a program that has no loop.

    Attributes:
        instructions: what is issued.
        whole: whether that is all of a program.
        begin: how many instructions of the program are before it.
    """

    instructions: tuple[Instruction, ...]
    whole: bool = False
    begin: int = 0

    def count(self, pipe: str) -> int:
        """Instructions of one pipe."""
        return sum(i.pipe == pipe for i in self.instructions)

    def widths(self, kind: str) -> Counter[int]:
        """How many accesses ("load" or "store") there are of each width in bytes.

        Of a whole program, the widest ones: the rest are its row's scalars, one address for all lanes.
        """
        found = Counter(i.access[1] for i in self.instructions if i.access and i.access[0] == kind)
        return Counter(dict([max(found.items())])) if self.whole and found else found

    def bytes(self, kind: str) -> int:
        """Bytes one lane moves."""
        return sum(width * n for width, n in self.widths(kind).items())

    @property
    def barriers(self) -> int:
        """Points where every warp of a program waits for the others."""
        return sum(i.barrier for i in self.instructions)

    @property
    def shuffles(self) -> int:
        """Exchanges between lanes of a warp."""
        return sum(i.shuffle for i in self.instructions)

    @property
    def guarded(self) -> bool:
        """Whether any access is under a predicate. AMD's never is: its masks are in the address or in EXEC."""
        return any(i.guarded for i in self.instructions if i.access)


@dataclass(frozen=True)
class Program:
    """A compiled kernel."""

    name: str
    target: str
    constants: dict[str, Any]
    threads: int
    registers: int
    spills: int  # instructions that move registers to or from memory
    stack: int  # bytes of it
    shared: int  # bytes
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]  # the innermost ones, in the program's order
    epilogue: int  # instructions issued after the loop of matrix products, the shortest way; 0 without such a loop

    @cached_property
    def passes(self) -> tuple[Loop, ...]:
        """The loops over the logits: innermost, reading global memory and taking exponentials. The main one first.

        Masked loops are tails and fallbacks, so those without a predicated access come first; then those that read
        most per iteration, which a compiler that unrolled has made the hot ones; then in the program's order. A program
        without such a loop works on one block, and is its own pass.
        """
        reading = [loop for loop in self.loops if loop.bytes("load")]
        # In float64 an exponential is arithmetic.
        found = [loop for loop in reading if loop.count("special")] or reading
        ordered = sorted(found, key=lambda loop: (loop.guarded, -loop.bytes("load")))
        return tuple(ordered) or (Loop(self.instructions, whole=True),)

    def logits(self, loop: Loop, itemsize: int) -> int:
        """Logits that a thread handles in one iteration: its share of a block, times what the compiler unrolled."""
        block = next(v for name, v in self.constants.items() if name.startswith("BLOCK"))
        share = block // self.threads
        unrolled = 1 if loop.whole else round(loop.bytes("load") / (share * itemsize))
        return share * max(unrolled, 1)


class _Offline:
    """As much of a Triton driver as a compilation asks for. Its device is the target, which keys Triton's caches."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Compiled(list[Any]):
    """The compiled kernel of each launch; `programs` holds the number of programs that each would have started."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: list[int] = []


@contextmanager
def compiling(target: str | GPUTarget) -> Iterator[Compiled]:
    """Compile every kernel launched inside for `target` and launch none; yields the list they are added to.

    Triton keeps what it compiles in its cache, under the key that a launch on such a device will look for.
    """
    compiled = Compiled()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if callable(grid):
            grid = grid({**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        compiled.programs.append(math.prod(grid))
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    # Restored by hand: resetting the driver would look for a GPU.
    with mock.patch.dict(vars(driver)), mock.patch.object(JITFunction, "run", compile_only):
        driver.set_active(cast(Any, _Offline(TARGETS[target] if isinstance(target, str) else target)))
        yield compiled


def read(compiled: Any, target: str) -> Program:
    """Disassemble what Triton compiled."""
    names = compiled.src.fn.arg_names
    describe = _read_amd if "amdgcn" in compiled.asm else _read_nvidia
    lines, resources = describe(compiled)
    code, loops, epilogue = _flow(lines)
    spilled = sum(i.opcode.split(".")[0] in ("LDL", "STL") or i.opcode.startswith("scratch_") for i in code)
    return Program(
        name=compiled.name,
        target=target,
        constants={names[path[0]]: value for path, value in compiled.src.constants.items()},
        threads=compiled.metadata.num_warps * TARGETS[target].warp_size,
        registers=resources["registers"],
        spills=spilled,
        stack=resources["stack"],
        shared=compiled.metadata.shared,
        instructions=code,
        loops=loops,
        epilogue=epilogue,
    )


def _read_nvidia(compiled: Any) -> tuple[list[Line], dict[str, int]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        listing = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return instructions.nvidia(listing), {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def _read_amd(compiled: Any) -> tuple[list[Line], dict[str, int]]:
    listing = compiled.asm["amdgcn"]

    def resource(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", listing)[0])

    found = {"registers": resource("vgpr_count"), "stack": resource("private_segment_fixed_size")}
    return instructions.amd(listing), found


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _flow(lines: list[Line]) -> tuple[tuple[Instruction, ...], tuple[Loop, ...], int]:
    """Every instruction, the innermost stretches from a label to a branch back to it, and `Program.epilogue`."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    branches: dict[int, str] = {}
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(code)
            continue
        instruction, branch = line
        if branch is not None:
            branches[len(code)] = branch
        code.append(instruction)
    spans = [(labels[b], at + 1) for at, b in branches.items() if b in labels and labels[b] <= at]
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]
    loops = tuple(Loop(tuple(code[begin:end]), begin=begin) for begin, end in innermost)
    products = [end for loop, (_, end) in zip(loops, innermost, strict=True) if loop.count("tensor")]
    if not products:
        return tuple(code), loops, 0
    to_end = [math.inf] * len(code) + [0.0]  # from an instruction on
    before: list[float] = []
    while before != to_end:
        before = to_end.copy()
        for at in reversed(range(len(code))):
            name, guarded = code[at].opcode.split(".")[0], code[at].guarded
            ways = [] if name in ("BRA", "s_branch") and not guarded else [to_end[at + 1]]
            if branches.get(at) in labels:
                ways.append(to_end[labels[branches[at]]])
            if name in ("EXIT", "s_endpgm"):
                ways = [0.0]
            to_end[at] = 1 + min(ways, default=math.inf)
    return tuple(code), loops, int(to_end[max(products)])
