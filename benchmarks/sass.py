"""Compile Triton kernels without a GPU and read their machine code: loops, instructions, registers, spills, accesses.

A launcher is called on CPU tensors as it would be on those of a GPU. Triton specialises and compiles the kernels that
it launches for the target, and runs none. The code read here is therefore what a launch on the target would use.
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
    """The instructions of one iteration: the body of a loop, or all of a program that has no loop.

    Attributes:
        instructions: the instructions in order.
        whole: whether these are all of a program.
        begin: the number of instructions of the program before them.
    """

    instructions: tuple[Instruction, ...]
    whole: bool = False
    begin: int = 0

    def count(self, pipe: str) -> int:
        """Return the number of instructions of one pipe."""
        return sum(i.pipe == pipe for i in self.instructions)

    def widths(self, kind: str) -> Counter[int]:
        """Return the number of accesses ("load" or "store") of each width in bytes.

        Of a whole program only the widest count, because the others read scalars, at one address for all lanes.
        """
        found = Counter(i.access[1] for i in self.instructions if i.access and i.access[0] == kind)
        return Counter(dict([max(found.items())])) if self.whole and found else found

    def bytes(self, kind: str) -> int:
        """Return the bytes that one lane moves."""
        return sum(width * n for width, n in self.widths(kind).items())

    @property
    def barriers(self) -> int:
        """The number of barriers among all warps of a program."""
        return sum(i.barrier for i in self.instructions)

    @property
    def shuffles(self) -> int:
        """The number of exchanges between lanes of a warp."""
        return sum(i.shuffle for i in self.instructions)

    @property
    def guarded(self) -> bool:
        """Whether a predicate guards any access; on AMD none does, because masks are in the address or in EXEC."""
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
    stack: int  # bytes
    shared: int  # bytes of shared memory
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]  # the innermost loops, in the order of the program
    epilogue: int  # the fewest instructions from the loop of matrix products to the end; 0 without such a loop

    @cached_property
    def passes(self) -> tuple[Loop, ...]:
        """The loops over the logits, the main loop first: innermost, read global memory and take exponentials.

        Masked loops are tails and fallbacks, so loops without a predicated access come first. Among these, loops that
        read most per iteration come first, because the compiler unrolls the hot ones; then the order of the program
        decides. A program without such a loop works on one block and counts as one pass.
        """
        reading = [loop for loop in self.loops if loop.bytes("load")]
        # A float64 exponential uses no special function.
        found = [loop for loop in reading if loop.count("special")] or reading
        ordered = sorted(found, key=lambda loop: (loop.guarded, -loop.bytes("load")))
        return tuple(ordered) or (Loop(self.instructions, whole=True),)

    def logits(self, loop: Loop, itemsize: int) -> int:
        """Return the logits that a thread reads in one iteration: its share of a block, times the unrolling."""
        block = next(v for name, v in self.constants.items() if name.startswith("BLOCK"))
        share = block // self.threads
        unrolled = 1 if loop.whole else round(loop.bytes("load") / (share * itemsize))
        return share * max(unrolled, 1)


class _Offline:
    """A Triton driver that only compiles; its device is the target, so that Triton caches kernels by target."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> GPUTarget:
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Compiled(list[Any]):
    """The compiled kernel of each launch; `programs` holds the number of programs of each launch."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: list[int] = []


@contextmanager
def compiling(target: str | GPUTarget) -> Iterator[Compiled]:
    """Compile the kernels that are launched inside for `target`, run none, and yield the list that receives them.

    Triton caches them under the key that a launch on such a device looks for.
    """
    compiled = Compiled()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if callable(grid):
            grid = grid({**dict(zip(self.arg_names, args, strict=False)), **kwargs})
        compiled.programs.append(math.prod(grid))
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    # Patched, because `driver.reset_active` would look for a GPU.
    with mock.patch.dict(vars(driver)), mock.patch.object(JITFunction, "run", compile_only):
        driver.set_active(cast(Any, _Offline(TARGETS[target] if isinstance(target, str) else target)))
        yield compiled


def read(compiled: Any, target: str) -> Program:
    """Disassemble a compiled kernel."""
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
    """Return all instructions, the innermost loops (from a label to a branch back to it), and `Program.epilogue`."""
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
    to_end = [math.inf] * len(code) + [0.0]  # the fewest instructions from each one to the end
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
