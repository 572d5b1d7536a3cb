"""Count the programs that a multiprocessor holds, and model the loads and waits of each.

The warps of a program issue the instructions of a loop in order and at an even rate. An instruction that names a
register waits until the register is filled. A wait for a group of asynchronous copies, or for a counter on AMD, lasts
until at most the stated number of them is outstanding. A barrier, and an answer from shared memory or another lane,
take `SHORT` cycles.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.instructions import Instruction
from benchmarks.sass import TARGETS, Loop, Program

# Cycles of a barrier at which all warps arrive together, of a read of shared memory, and of a shuffle. Microbenchmarks
# of NVIDIA GPUs from sm_70 on give 20 to 33 for each; for AMD this is an assumption.
SHORT = 30
# Laps until a loop is in its steady state, and laps to average over: a multiple of every number of stages from 1 to 6.
WARM_UP, LAPS = 12, 60


@dataclass(frozen=True)
class Limits:
    """The resources that the programs on one multiprocessor, or AMD's compute unit, share.

    Attributes:
        warps: the most resident warps.
        programs: the most resident programs.
        shared: the bytes of shared memory.
        reserved: the bytes of shared memory that each program takes in addition to its own.
    """

    warps: int
    programs: int
    shared: int
    reserved: int


# From the table of compute capabilities in the CUDA programming guide, and the ISA document of CDNA 3. On the GPUs of
# both vendors, each of the four schedulers of a multiprocessor holds 512 registers per lane, allocated 8 at a time.
LIMITS = {
    "sm_80": Limits(warps=64, programs=32, shared=164 << 10, reserved=1 << 10),
    "sm_90": Limits(warps=64, programs=32, shared=228 << 10, reserved=1 << 10),
    "sm_100": Limits(warps=64, programs=32, shared=228 << 10, reserved=1 << 10),
    "gfx942": Limits(warps=32, programs=32, shared=64 << 10, reserved=0),
}
SCHEDULERS, _REGISTERS, _REGISTER_UNIT, _SHARED_UNIT = 4, 512, 8, 128


def resident_programs(program: Program) -> int:
    """Return the number of programs that one multiprocessor holds at a time."""
    limits = LIMITS[program.target]
    warps = SCHEDULERS * (_REGISTERS // _rounded_up(program.registers, _REGISTER_UNIT))
    found = min(limits.programs, min(limits.warps, warps) // warps_of(program))
    if program.shared:
        found = min(found, limits.shared // _rounded_up(program.shared + limits.reserved, _SHARED_UNIT))
    return found


def warps_of(program: Program) -> int:
    """Return the number of warps of a program."""
    return program.threads // TARGETS[program.target].warp_size


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Walk:
    """A program that runs a loop alone on its multiprocessor.

    Attributes:
        start: the cycles until the loop begins.
        cycles: the cycles of an iteration.
        bytes: the most bytes that a lane has outstanding at a time in the loop.
    """

    start: float
    cycles: float
    bytes: int


def walk(loop: Loop, issue: float, latency: float, before: Sequence[Instruction] = ()) -> Walk:
    """Follow a program into the steady state of a loop.

    Args:
        loop: the loop, or a whole program, which is repeated like a loop.
        issue: the cycles from one instruction to the next without waits.
        latency: the cycles until memory answers.
        before: the instructions of the program before the loop, taken once each.
    """
    now = start = 0.0
    ready: dict[str, float] = {}  # when a register is filled
    queues: dict[str, deque[float]] = defaultdict(deque)  # when its entries complete
    outstanding: deque[tuple[float, int]] = deque()  # (when it arrives, bytes) of each load
    counted = loop.widths("load")
    begin, most = 0.0, 0
    for lap, instructions in enumerate([before] + [loop.instructions] * (WARM_UP + LAPS)):
        if lap == 1:
            start = now
        if lap == 1 + WARM_UP:
            begin, most = now, 0
        for instruction in instructions:
            for register in instruction.registers:
                now = max(now, ready.pop(register, now))
            for name, entries in instruction.waits:
                while len(queues[name]) > entries:
                    now = max(now, queues[name].popleft())
            now += issue + SHORT * instruction.barrier
            done = now + (latency if instruction.access else SHORT)
            ready.update(dict.fromkeys(instruction.late, done))
            if instruction.queue == "groups":
                queues["groups"].append(max(queues.pop("open", [now])))
            elif instruction.queue:
                queues[instruction.queue].append(done)
            kind, size = instruction.access or ("", 0)
            if kind == "load" and size in counted:
                while outstanding and outstanding[0][0] <= now:
                    outstanding.popleft()
                outstanding.append((done, size))
                most = max(most, sum(waiting for _, waiting in outstanding))
    return Walk(start, (now - begin) / LAPS, most)


def bytes_in_flight(program: Program, loop: Loop | None = None) -> int:
    """Return the bytes of loads that a multiprocessor full of a kernel's programs can have outstanding at a time.

    Args:
        program: the kernel.
        loop: one of its loops; None takes the main loop over the logits.
    """
    if any(i.bulk_copy for i in program.instructions):
        # The size of a bulk copy is in a descriptor, but shared memory holds only the buffers that they fill.
        return resident_programs(program) * program.shared
    # With a very long latency, the loads outstanding are all those issued before the code waits.
    alone = walk(loop or program.passes[0], issue=1.0, latency=1e9)
    return resident_programs(program) * program.threads * alone.bytes
