"""What a kernel keeps outstanding, read from small listings and from kernels that are compiled here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import flight, instructions, sass
from tests.triton.linkers import skip_without_linker

SLOW = 1e6  # cycles in which memory answers, next to which an instruction takes no time


def loop(code: str, parse=instructions.nvidia) -> sass.Loop:
    """A loop of these instructions, one a line."""
    lines = code.strip().splitlines()
    listing = "\n".join(f"        /*{i:04x}*/ {line.strip()} ;" for i, line in enumerate(lines))
    if parse is instructions.amd:
        listing = "\n".join("\t" + line.strip() for line in lines)
    return sass.Loop(tuple(line[0] for line in parse(listing) if not isinstance(line, str)))


TOGETHER = """
    LDG.E.128 R4, desc[UR14][R20.64]
    LDG.E.64 R8, desc[UR14][R22.64]
    SHF.L.U32 R15, R5, 0x10, RZ
    FADD R16, R9, R16
"""
IN_TURN = """
    LDG.E.128 R4, desc[UR14][R20.64]
    SHF.L.U32 R15, R7, 0x10, RZ
    LDG.E.64 R8, desc[UR14][R22.64]
    FADD R16, R9, R16
"""
# What a lap uses has been loaded a lap before, and kept in other registers.
A_LAP_AHEAD = """
    FADD R16, R12, R16
    LDG.E.128 R4, desc[UR14][R20.64]
    FADD R17, R13, R17
    MOV R12, R4
    MOV R13, R5
"""
AT_THE_END = """
    FADD R16, R4, R16
    FADD R17, R5, R17
    LDG.E.128 R4, desc[UR14][R20.64]
"""
IN_GROUPS = """
    DEPBAR.LE SB0, 0x2
    LDS.128 R4, [R24]
    LDGSTS.E.BYPASS.128 [R63], desc[UR10][R48.64], !P1
    LDGSTS.E.BYPASS.128 [R63+0x1000], desc[UR10][R50.64], !P1
    LDGDEPBAR
    FADD R16, R4, R16
"""
BY_COUNT = """
    s_waitcnt vmcnt(1)
    v_add_f32_e32 v9, v4, v9
    global_load_dwordx4 v[4:7], v[0:1], off
    s_waitcnt vmcnt(1) lgkmcnt(0)
    v_add_f32_e32 v10, v5, v10
    global_load_dwordx4 v[8:11], v[0:1], off offset:16
"""


@pytest.mark.parametrize(
    ("code", "waits", "outstanding"),
    [
        (TOGETHER, 1, 24),
        (IN_TURN, 2, 16),
        (A_LAP_AHEAD, 1, 16),
        (AT_THE_END, 1, 16),
        (IN_GROUPS, 1 / 3, 96),
        (IN_GROUPS.replace("SB0, 0x2", "SB0, 0x0"), 1, 32),
    ],
)
def test_loads_are_outstanding_until_something_waits(code: str, waits: float, outstanding: int) -> None:
    alone = flight.walk(loop(code), issue=1.0, latency=SLOW)
    assert alone.cycles / SLOW == pytest.approx(waits, rel=1e-3)
    assert alone.bytes == outstanding


@pytest.mark.parametrize(("entries", "waits", "outstanding"), [(1, 1, 32), (0, 2, 16)])
def test_amd_waits_by_counters(entries: int, waits: int, outstanding: int) -> None:
    code = BY_COUNT.replace("vmcnt(1)", f"vmcnt({entries})")
    alone = flight.walk(loop(code, instructions.amd), issue=1.0, latency=SLOW)
    assert alone.cycles / SLOW == pytest.approx(waits, rel=1e-3)
    assert alone.bytes == outstanding


def test_a_load_is_hidden_by_what_is_issued_before_its_use() -> None:
    work = "FMUL R30, R31, R32\n" * 100
    used_late = TOGETHER.replace("    SHF", work + "    SHF")
    assert flight.walk(loop(used_late), issue=1.0, latency=60).cycles == 104
    assert flight.walk(loop(TOGETHER + work), issue=1.0, latency=60).cycles == pytest.approx(104 + 60 - 1)


def test_a_barrier_and_a_shuffle_take_time() -> None:
    synchronised = "BAR.SYNC.DEFER_BLOCKING 0x0\n" + TOGETHER
    shuffled = TOGETHER + "SHFL.BFLY PT, R17, R16, 0x10, 0x1f\nFADD R16, R17, R16\n"
    reduced = TOGETHER + "CREDUX.MAX.F32 UR7, R16\nIMAD.U32 R16, RZ, RZ, UR7\n"
    plain = flight.walk(loop(TOGETHER), issue=1.0, latency=600).cycles
    assert loop(synchronised).barriers == loop(shuffled).shuffles == loop(reduced).shuffles == 1
    assert flight.walk(loop(synchronised), issue=1.0, latency=600).cycles == plain + 1 + flight.SHORT
    for code in (shuffled, reduced):
        assert flight.walk(loop(code), issue=1.0, latency=600).cycles == plain + 2 + flight.SHORT


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "programs"),
    [
        ("sm_90", 32, 16, 0, 32),  # as many as there may be
        ("sm_90", 256, 32, 0, 8),  # 64 warps
        ("sm_90", 256, 56, 0, 4),  # 9 warps a scheduler
        ("sm_90", 256, 57, 0, 4),  # 8 warps a scheduler
        ("sm_90", 128, 168, 0, 3),
        ("sm_90", 128, 32, 56 << 10, 4),  # with 1 KiB each, 57 * 4 = 228
        ("sm_90", 128, 32, (56 << 10) + 1, 3),
        ("sm_80", 128, 32, 40 << 10, 4),  # 41 * 4 = 164
        ("sm_80", 128, 32, 41 << 10, 3),
        ("gfx942", 256, 64, 0, 8),  # 8 waves a SIMD
        ("gfx942", 256, 65, 0, 7),
        ("gfx942", 64, 32, 32 << 10, 2),
    ],
)
def test_resident_programs(target: str, threads: int, registers: int, shared: int, programs: int) -> None:
    program = sass.Program("", target, {}, threads, registers, 0, 0, shared, (), (), 0)
    assert flight.resident_programs(program) == programs


@triton.jit
def sum_kernel(x, y, n, BLOCK: tl.constexpr, STAGES: tl.constexpr, MAXIMUM: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    top = -float("inf")
    for i in tl.range(0, n, num_stages=STAGES):
        value = tl.load(x + tl.program_id(0) * n * BLOCK + i * BLOCK + at).to(tl.float32)
        if MAXIMUM:
            top = tl.maximum(top, tl.max(value))
            value -= top
        total += tl.exp2(value)
    tl.store(y + tl.program_id(0) * BLOCK + at, total)


BLOCK, WARPS = 2048, 4


@cache
def compiled(target: str, stages: int, maximum: bool = False) -> sass.Program:
    skip_without_linker(target)
    x, y = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    with sass.compiling(target) as kernels:
        sum_kernel[(1,)](x, y, 1 << 16, BLOCK, stages, maximum, num_warps=WARPS, enable_fp_fusion=True)
    return sass.read(kernels[0], target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_stages_of_a_kernel_are_bytes_in_flight(target: str) -> None:
    one, four = compiled(target, 1), compiled(target, 4)
    per_program = [flight.bytes_in_flight(p) / flight.resident_programs(p) for p in (one, four)]
    # Triton copies 3 blocks ahead where it pipelines 4 stages.
    assert per_program == [2 * BLOCK, 3 * 2 * BLOCK]


def test_bytes_in_flight_of_a_kernel_for_amd() -> None:
    program = compiled("gfx942", 1)
    per_program = flight.bytes_in_flight(program) / flight.resident_programs(program)
    assert per_program % (2 * BLOCK) == 0
    assert per_program > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_a_maximum_over_a_block_takes_barriers(target: str) -> None:
    plain, found = (compiled(target, 1, maximum).passes[0] for maximum in (False, True))
    assert plain.barriers == plain.shuffles == 0
    assert found.barriers >= 2
    assert found.shuffles >= 2  # sm_100 reduces a warp by one instruction
    # One barrier may pass while loads are under way, which lanes wait for either way; the others take time.
    without = replace(found, instructions=tuple(i for i in found.instructions if not i.barrier))
    cycles = [flight.walk(each, issue=1.0, latency=600).cycles for each in (found, without)]
    assert cycles[0] >= cycles[1] + flight.SHORT * (found.barriers - 1)


@pytest.mark.parametrize("grid", [(3, 5), lambda options: (5 * triton.cdiv(options["n"], options["BLOCK"]),)])
def test_programs_of_a_launch_are_counted(grid: object) -> None:
    x, y = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    with sass.compiling("sm_90") as kernels:
        sum_kernel[grid](x, y, 3 * BLOCK, BLOCK, 1, False, num_warps=WARPS, enable_fp_fusion=True)
    assert kernels.programs == [15]


def test_bulk_copies_fill_shared_memory() -> None:
    program = replace(compiled("sm_90", 4), instructions=loop("UTMALDG.2D [UR8], [UR6]").instructions)
    assert flight.bytes_in_flight(program) == flight.resident_programs(program) * program.shared
