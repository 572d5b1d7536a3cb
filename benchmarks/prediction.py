"""How fast a kernel is, predicted from its machine code.

A program alone takes the time in which its instructions issue, each wait for memory included (`flight.walk`). The
programs that are resident together take as long as one of them alone, or as the busiest of memory, issue and the
slower pipes needs for the work of all of them, whichever is longer. Programs come in waves of as many as the device
holds, the last of which may be smaller.

The time alone takes every wait at the latency of a busy memory, which is too long where memory is idle; that memory is
as fast as one's copy with just enough bytes in flight is too fast. What a program does after its main loop, launches,
and what L1 and L2 caches hold are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from benchmarks import flight
from benchmarks.sass import Loop, Program


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        name: the product.
        multiprocessors: how many there are; compute units of AMD.
        clock: cycles a second.
        issue: lanes that a multiprocessor issues an instruction for in a cycle.
        alu: lanes that this pipe of it executes in a cycle.
        fma: the same.
        special: the same.
        bandwidth: bytes a second of a copy in its memory.
        latency: seconds in which memory answers while it is busy.
    """

    name: str
    multiprocessors: int
    clock: float
    issue: int
    alu: int
    fma: int
    special: int
    bandwidth: float
    latency: float

    @property
    def needed(self) -> float:
        """Bytes in flight a multiprocessor with which memory can be busy all the time, by Little's law."""
        return self.bandwidth / self.multiprocessors * self.latency


# Rates from the vendors' programming guides and data sheets. The H200's bandwidth is a measured device copy, and its
# latency is the one with which that copy needs 30 KB in flight a multiprocessor. Of the others, the bandwidth is the
# data sheet's less a tenth, and the latency an assumption. AMD's vector instructions issue on one pipe, which scalar
# ones do not share.
MACHINES = {
    "sm_80": Machine("A100", 108, 1.41e9, 128, 64, 64, 16, 0.9 * 2.04e12, 0.7e-6),
    "sm_90": Machine("H200", 132, 1.98e9, 128, 64, 128, 16, 4.3e12, 0.9e-6),
    "sm_100": Machine("B200", 148, 1.96e9, 128, 64, 128, 16, 0.9 * 8.0e12, 1.0e-6),
    "gfx942": Machine("MI300X", 304, 2.1e9, 64, 64, 64, 16, 0.9 * 5.3e12, 1.2e-6),
}


@dataclass(frozen=True)
class Pass:
    """One of a kernel's passes over the logits.

    Attributes:
        program: the kernel.
        loop: the pass's main loop.
        itemsize: bytes of a logit.
    """

    program: Program
    loop: Loop
    itemsize: int

    @property
    def machine(self) -> Machine:
        """The GPU that the kernel was compiled for."""
        return MACHINES[self.program.target]

    @cached_property
    def logits(self) -> int:
        """Logits of one iteration of a program."""
        return self.program.logits(self.loop, self.itemsize) * self.program.threads

    @cached_property
    def bytes(self) -> int:
        """Bytes that one iteration of a program moves."""
        return (self.loop.bytes("load") + self.loop.bytes("store")) * self.program.threads

    @cached_property
    def pipes(self) -> dict[str, float]:
        """Cycles of each pipe of one multiprocessor for one iteration of one program."""
        machine, threads = self.machine, self.program.threads
        alu, fma, special = (self.loop.count(pipe) * threads for pipe in ("alu", "fma", "special"))
        if self.program.target.startswith("gfx"):
            # A special function holds the vector pipe four times as long, and nothing scalar takes its turn.
            issued = alu + special * machine.issue / machine.special
            return {"issue": issued / machine.issue, "special": special / machine.special}
        return {
            "issue": len(self.loop.instructions) * threads / machine.issue,
            "ALU": alu / machine.alu,
            "FMA": fma / machine.fma,
            "special": special / machine.special,
        }

    @cached_property
    def alone(self) -> flight.Walk:
        """One program that nothing else shares its multiprocessor with."""
        # A warp has one scheduler, so fewer warps than schedulers do not fill a multiprocessor's pipes.
        idle = max(1.0, flight.SCHEDULERS / flight.warps_of(self.program))
        issue = max(self.pipes.values()) * idle / len(self.loop.instructions)
        before = self.program.instructions[: self.loop.begin]
        return flight.walk(self.loop, issue, self.machine.latency * self.machine.clock, before)

    def seconds(self, programs: int, iterations: float) -> dict[str, float]:
        """Return the time that each resource needs for `programs` programs, spread over the device, run at once."""
        machine = self.machine
        share = math.ceil(programs / machine.multiprocessors)
        found = {"memory": programs * self.bytes * iterations / machine.bandwidth}
        found |= {pipe: share * cycles * iterations / machine.clock for pipe, cycles in self.pipes.items()}
        return found | {"latency": (self.alone.start + self.alone.cycles * iterations) / machine.clock}

    def predict(self, programs: int, logits: float) -> Prediction:
        """Predict a launch of `programs` programs, each of which reads `logits` logits."""
        iterations = logits / self.logits
        slots = flight.resident_programs(self.program) * self.machine.multiprocessors
        full, rest = divmod(programs, slots)
        waves = [self.seconds(slots, iterations)] * full + [self.seconds(rest, iterations)] * (rest > 0)
        total = sum(max(wave.values()) for wave in waves)
        memory = programs * self.bytes * iterations / self.machine.bandwidth
        return Prediction(max(waves[0], key=lambda name: waves[0][name]), memory / total, programs / slots)


@dataclass(frozen=True)
class Prediction:
    """How fast one launch is.

    Attributes:
        bound: what takes longest in the first wave: "memory", "latency", "issue" or a pipe.
        of_bandwidth: the share of the memory's speed that the launch reaches.
        waves: programs of the launch, over those that the device holds.
    """

    bound: str
    of_bandwidth: float
    waves: float
