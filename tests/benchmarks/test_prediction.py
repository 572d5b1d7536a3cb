"""How fast a kernel is predicted to be, on loops short enough to do it on paper, and on kernels of ours."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import flight, instructions, sass, static_roofline
from benchmarks.prediction import MACHINES, Pass
from benchmarks.report import predicted
from fastpref_kernels.triton import launches
from tests.triton.linkers import skip_without_linker

H200 = MACHINES["sm_90"]
LATENCY = H200.latency * H200.clock
LOADS = ["LDG.E.128 R4, desc[UR14][R20.64]", "LDG.E.128 R8, desc[UR14][R20.64+0x800]"]
USES = ["FADD R16, R4, R16", "FADD R17, R8, R17"]
TOGETHER = [*LOADS, *USES]
IN_TURN = [LOADS[0], USES[0], LOADS[1], USES[1]]
BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"
EXPONENTIAL = "MUFU.EX2 R15, R37"
THREADS, BLOCK = 128, 2048  # 16 bfloat16 logits a lane, which two loads of 16 bytes read
BYTES = 2 * BLOCK


def work(code: list[str], registers: int = 128) -> Pass:
    """A pass of a loop of these instructions, by programs that have 128 registers: four fit a multiprocessor."""
    listing = "\n".join(f"        /*{i:04x}*/ {line} ;" for i, line in enumerate(code))
    loop = sass.Loop(tuple(line[0] for line in instructions.nvidia(listing) if not isinstance(line, str)))
    program = sass.Program("", "sm_90", {"BLOCK": BLOCK}, THREADS, registers, 0, 0, 0, loop.instructions, (loop,), 0)
    return Pass(program, loop, itemsize=2)


def full(code: list[str], registers: int = 128) -> float:
    """The share of the memory's speed where programs fill the device for long."""
    found = work(code, registers)
    programs = flight.resident_programs(found.program) * H200.multiprocessors
    return found.predict(programs, 1e6 * found.logits).of_bandwidth


def share(programs: int, cycles: float) -> float:
    """The share of the memory's speed of so many programs a multiprocessor, each a block in so many cycles."""
    return programs * BYTES / (cycles / H200.clock) / (H200.bandwidth / H200.multiprocessors)


def test_few_bytes_in_flight_are_bound_by_latency() -> None:
    # Two loads in two cycles, the answer to the second, and the use of it.
    assert full(TOGETHER) == pytest.approx(share(4, 2 + LATENCY + 1), rel=1e-6)
    assert full(TOGETHER) == pytest.approx(4 * BYTES / H200.needed, rel=0.01)  # Little's law
    assert work(TOGETHER).predict(4 * 132, 1e6 * BLOCK).bound == "latency"


def test_loads_in_turn_halve_what_is_in_flight() -> None:
    assert full(IN_TURN) == pytest.approx(full(TOGETHER) / 2, rel=0.01)


def test_enough_bytes_in_flight_are_bound_by_memory() -> None:
    assert full(TOGETHER, registers=64) == 1.0
    assert work(TOGETHER, 64).predict(8 * 132, 1e6 * BLOCK).bound == "memory"


def test_a_barrier_takes_time_while_nothing_is_in_flight() -> None:
    cycles = 2 + LATENCY + 1
    assert full([*TOGETHER, BARRIER]) == pytest.approx(share(4, cycles + 1 + flight.SHORT), rel=1e-6)
    # Programs that fill the memory hide it.
    assert full([*TOGETHER, BARRIER], registers=64) == 1.0


def test_exponentials_bind_where_there_are_many() -> None:
    found = work([*TOGETHER, *[EXPONENTIAL] * 64], registers=64)
    prediction = found.predict(8 * 132, 1e6 * BLOCK)
    assert prediction.bound == "special"
    assert prediction.of_bandwidth == pytest.approx(share(1, 64 * THREADS / 16), rel=1e-6)


def test_programs_beyond_a_wave_wait_for_another() -> None:
    found = work(TOGETHER)
    wave = found.predict(4 * 132, 1e6 * BLOCK)
    assert (wave.waves, wave.of_bandwidth) == (1.0, full(TOGETHER))
    one_more = found.predict(4 * 132 + 1, 1e6 * BLOCK)
    assert one_more.of_bandwidth == pytest.approx(wave.of_bandwidth / 2, rel=0.01)
    assert found.predict(4 * 132 * 100 + 1, 1e6 * BLOCK).of_bandwidth == pytest.approx(wave.of_bandwidth, rel=0.01)


def test_few_programs_leave_multiprocessors_idle() -> None:
    found = work(TOGETHER)
    expected = full(TOGETHER) * 66 / (4 * 132)
    assert found.predict(66, 1e6 * BLOCK).of_bandwidth == pytest.approx(expected, rel=1e-6)


def test_what_is_loaded_before_the_loop_delays_it() -> None:
    label = ["LDG.E R2, desc[UR14][R20.64]", "IADD3 R3, R2, 0x1, RZ"]
    found = work([*label, *TOGETHER])
    loop = sass.Loop(found.loop.instructions[2:], begin=2)
    late = Pass(found.program, loop, itemsize=2)
    # As long as one iteration: of four, the loop has four of five parts of the time.
    assert late.predict(132, 4 * BLOCK).of_bandwidth == pytest.approx(share(1, 5 / 4 * LATENCY), rel=0.01)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("case", static_roofline.CASES[:3], ids=lambda case: case.name)
def test_kernels_of_ours_are_predicted(target: str, case: static_roofline.Case) -> None:
    skip_without_linker(target)
    rows = list(static_roofline.rows_of(target, torch.bfloat16, 32768, 8192, case))
    assert rows
    for row in rows:
        assert row.in_flight >= row.programs * sass.TARGETS[target].warp_size * row.widest_load
        shares = [row.of_bandwidth, row.predicted, row.predicted_512, row.predicted_64]
        assert all(0 < found < 1 + 1e-9 for found in shares if not math.isnan(found))


def test_stages_are_read_from_what_is_launched() -> None:
    found = []
    for stages in (1, 4):
        with mock.patch.dict(launches.ROWS, {("logprobs_forward", 2): launches.Launch(2048, 4, stages)}):
            rows = static_roofline.rows_of("sm_90", torch.bfloat16, 32768, 8192, static_roofline.CASES[0])
            found.append(next(rows))
    plain, staged = found
    assert staged.in_flight / staged.programs == 3 * plain.in_flight / plain.programs
    assert staged.predicted_64 > 2 * plain.predicted_64


def test_the_tables_show_what_was_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'peer'")

    cases = (static_roofline.CASES[0], static_roofline.Case("a peer", absent))
    with mock.patch.object(static_roofline, "CASES", cases):
        static_roofline.main("sm_90", "bfloat16", 32768, 8192, tmp_path / "static_roofline.csv")
    assert "No row of a peer: ModuleNotFoundError: No module named 'peer'" in capsys.readouterr().out
    rows = predicted.read(tmp_path)
    assert [row["kernel"] for row in rows] == ["logprobs_forward_kernel", "logprobs_backward_kernel"]
    shown = predicted.logits(rows)
    assert "not measured on a GPU" in shown
    for row in rows:
        assert (
            f"| {int(row['in_flight']) / 1024:.0f} | {row['barriers']} | {row['bound']} | {float(row['waves']):.1f} |"
            in shown
        )
        assert f"{float(row['predicted']):.0%}" in shown
    assert predicted.tiles(rows) == "Not predicted yet.\n"
