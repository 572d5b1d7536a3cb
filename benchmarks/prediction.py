"""Predict how fast a kernel is from its machine code.

A program that runs alone takes the time to issue its instructions and to wait for memory (`flight.walk`). Programs that
are resident together take the longer of two times: that of one program alone, and that of the busiest resource (memory,
issue or a slower pipe) for the work of all of them. Programs run in waves of as many as the device holds; the last wave
may be smaller.

Waits are counted at the latency of busy memory, which is too long if memory is idle. Memory is taken to reach the speed
of a copy as soon as there are enough bytes in flight, which is too fast. Launches, caches and the part of a program
after its main loop are left out.
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
        name: the name of the product.
        multiprocessors: the number of multiprocessors, or of compute units on AMD.
        clock: cycles per second.
        issue: the lanes that a multiprocessor issues an instruction for in a cycle.
        alu: the lanes that the ALU pipe of a multiprocessor executes in a cycle.
        fma: those of the FMA pipe.
        special: those of the pipe for special functions.
        bandwidth: bytes per second of a copy in memory.
        latency: seconds until memory answers while it is busy.
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
        """The bytes in flight per multiprocessor that keep memory busy, by Little's law."""
        return self.bandwidth / self.multiprocessors * self.latency


# Rates come from the vendors' programming guides and data sheets. The bandwidth of the H200 is that of a measured copy,
# and its latency is such that the copy needs 30 KB in flight per multiprocessor. For the others, the bandwidth is nine
# tenths of the data sheet's and the latency is an assumption. On AMD, vector instructions issue on one pipe, which
# scalar instructions do not use.
MACHINES = {
    "sm_80": Machine("A100", 108, 1.41e9, 128, 64, 64, 16, 0.9 * 2.04e12, 0.7e-6),
    "sm_90": Machine("H200", 132, 1.98e9, 128, 64, 128, 16, 4.3e12, 0.9e-6),
    "sm_100": Machine("B200", 148, 1.96e9, 128, 64, 128, 16, 0.9 * 8.0e12, 1.0e-6),
    "gfx942": Machine("MI300X", 304, 2.1e9, 64, 64, 64, 16, 0.9 * 5.3e12, 1.2e-6),
}


@dataclass(frozen=True)
class Pass:
    """A pass of a kernel over the logits.

    Attributes:
        program: the kernel.
        loop: the main loop of the pass.
        itemsize: the bytes of a logit.
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
        """The logits that a program reads in one iteration."""
        return self.program.logits(self.loop, self.itemsize) * self.program.threads

    @cached_property
    def bytes(self) -> int:
        """The bytes that a program moves in one iteration."""
        return (self.loop.bytes("load") + self.loop.bytes("store")) * self.program.threads

    @cached_property
    def pipes(self) -> dict[str, float]:
        """The cycles that each pipe of a multiprocessor needs for one iteration of one program."""
        machine, threads = self.machine, self.program.threads
        alu, fma, special = (self.loop.count(pipe) * threads for pipe in ("alu", "fma", "special"))
        if self.program.target.startswith("gfx"):
            # A special function occupies the vector pipe four times as long; scalar instructions do not use it.
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
        """A program that has a multiprocessor to itself."""
        # Each warp has one scheduler, so fewer warps than schedulers leave pipes idle.
        idle = max(1.0, flight.SCHEDULERS / flight.warps_of(self.program))
        issue = max(self.pipes.values()) * idle / len(self.loop.instructions)
        before = self.program.instructions[: self.loop.begin]
        return flight.walk(self.loop, issue, self.machine.latency * self.machine.clock, before)

    def seconds(self, programs: int, iterations: float) -> dict[str, float]:
        """Return the seconds that each resource needs for `programs` programs that run at once."""
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
    """The predicted speed of a launch.

    Attributes:
        bound: what takes longest in the first wave: "memory", "latency", "issue" or a pipe.
        of_bandwidth: the share of the memory's speed that the launch reaches.
        waves: the programs of the launch, divided by those that the device holds.
    """

    bound: str
    of_bandwidth: float
    waves: float
