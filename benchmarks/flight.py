"""How many programs of a kernel a multiprocessor holds, and what each keeps outstanding and waits for.

A program's warps issue the instructions of a loop in order and at an even rate. An instruction that names a register
waits until what fills that register has answered; a wait for a group of asynchronous copies, or for a counter of AMD's,
lasts until no more than the stated number of them is outstanding; a barrier and an answer from shared memory or another
lane take `SHORT` cycles.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.instructions import Instruction
from benchmarks.sass import TARGETS, Loop, Program

# Cycles of a barrier whose warps all arrive at once, of a read of shared memory, and of a shuffle. Microbenchmarks of
# NVIDIA's GPUs from sm_70 on give 20 to 33 for each; for AMD this is an assumption.
SHORT = 30
# Laps until a loop is in its steady state, and laps over which that is averaged: a multiple of 1 to 6 stages.
WARM_UP, LAPS = 12, 60


@dataclass(frozen=True)
class Limits:
    """The resources that the programs on one multiprocessor, or AMD's compute unit, share.

    Attributes:
        warps: the most that are resident.
        programs: the most that are resident.
        shared: bytes of shared memory.
        reserved: bytes of it that every program takes beside its own.
    """

    warps: int
    programs: int
    shared: int
    reserved: int


# From the CUDA programming guide's table of compute capabilities, and the ISA document of CDNA 3. Each of the four
# schedulers of a multiprocessor holds 512 registers a lane, given out by 8, on either vendor's.
LIMITS = {
    "sm_80": Limits(warps=64, programs=32, shared=164 << 10, reserved=1 << 10),
    "sm_90": Limits(warps=64, programs=32, shared=228 << 10, reserved=1 << 10),
    "sm_100": Limits(warps=64, programs=32, shared=228 << 10, reserved=1 << 10),
    "gfx942": Limits(warps=32, programs=32, shared=64 << 10, reserved=0),
}
SCHEDULERS, _REGISTERS, _REGISTER_UNIT, _SHARED_UNIT = 4, 512, 8, 128


def resident_programs(program: Program) -> int:
    """Return how many programs one multiprocessor holds at a time."""
    limits = LIMITS[program.target]
    warps = SCHEDULERS * (_REGISTERS // _rounded_up(program.registers, _REGISTER_UNIT))
    found = min(limits.programs, min(limits.warps, warps) // warps_of(program))
    if program.shared:
        found = min(found, limits.shared // _rounded_up(program.shared + limits.reserved, _SHARED_UNIT))
    return found


def warps_of(program: Program) -> int:
    """Return the warps of one program."""
    return program.threads // TARGETS[program.target].warp_size


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Walk:
    """A program that runs a loop alone on its multiprocessor.

    Attributes:
        start: cycles until the loop begins.
        cycles: cycles of an iteration.
        bytes: the most that a lane has outstanding at a time in the loop.
    """

    start: float
    cycles: float
    bytes: int


def walk(loop: Loop, issue: float, latency: float, before: Sequence[Instruction] = ()) -> Walk:
    """Follow a program into the steady state of a loop.

    Args:
        loop: the loop, or a whole program, which is followed as if it began anew.
        issue: cycles from one instruction to the next where nothing has to be waited for.
        latency: cycles in which memory answers.
        before: the program's instructions before the loop; each is taken once.
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
        loop: one of its loops; the main loop over the logits where None.
    """
    if any(i.bulk_copy for i in program.instructions):
        # Their size is in a descriptor; the buffers that they fill are what shared memory is for.
        return resident_programs(program) * program.shared
    # Memory that hardly ever answers shows what code asks for before it waits.
    alone = walk(loop or program.passes[0], issue=1.0, latency=1e9)
    return resident_programs(program) * program.threads * alone.bytes
