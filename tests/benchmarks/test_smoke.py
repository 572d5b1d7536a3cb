"""The whole suite on its smallest shapes: every subject has figures, and what is broken is a row and not the end."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import store, suite
from benchmarks.report import plots
from tests.benchmarks.conftest import SMALLEST, Smoke, run

pytestmark = pytest.mark.slow


def test_it_passes_though_peers_are_broken(smoke: Smoke) -> None:
    assert smoke.status == 0, smoke.said


@pytest.mark.parametrize("subject", suite.MODULES)
def test_every_row_of_ours_is_right_and_timed(smoke: Smoke, subject: str) -> None:
    rows = [row for row in smoke.rows if row["subject"] == subject and row["package"] == "fastpref"]
    assert rows
    for row in rows:
        assert row["gate"] == "within", row
        assert 0 < row["ms_min"] <= row["ms_q1"] <= row["ms"] <= row["ms_q3"], row
        assert row["rounds"] >= 2
        assert row["commit"] != ""
        assert row["threads"].isdigit()
        assert math.isfinite(row["peak_mib"])
        assert subject == "scaling" or math.isfinite(row["error"])


@pytest.mark.parametrize(
    ("subject", "name", "why"),
    [
        ("logprobs", "planted, raises", "no kernel image"),
        ("logprobs", "planted, wrong", "off by 1.0e+00"),
        ("logprobs", "planted, wrong gradient", "wrong, and not timed"),
        ("logprobs", "planted, NaN", "nan"),
        ("linear", "planted, ends its process", "ended its process (status 3)"),
        ("linear", "planted, cannot be loaded", "no kernel image"),
    ],
)
def test_a_broken_peer_is_a_failed_row(smoke: Smoke, subject: str, name: str, why: str) -> None:
    (row,) = [row for row in smoke.rows if row["subject"] == subject and row["name"] == name]
    assert row["gate"] == "failed"
    assert why in row["problem"]
    assert "ms" not in row
    assert name in smoke.said.split("minutes", 1)[1], "what failed is said at the end"


@pytest.mark.parametrize("subject", ["logprobs", "linear"])
def test_a_peer_of_the_users_own_is_measured(smoke: Smoke, subject: str) -> None:
    (row,) = [row for row in smoke.rows if row["subject"] == subject and row["name"] == "planted, right"]
    assert row["gate"] == "within"
    assert row["over_ours"] > 0
    assert row["of_floor"] > 0


def test_peers_that_cannot_run_here_say_so(smoke: Smoke) -> None:
    absent = {row["name"]: row["problem"] for row in smoke.rows if row["gate"] == "absent"}
    assert absent["CCE"] == "runs on cuda only"
    assert not any(row["gate"] == "failed" for row in smoke.rows if not row["name"].startswith("planted"))


def test_what_was_measured_is_kept(smoke: Smoke, tmp_path: Path) -> None:
    for path in smoke.folder.glob("*.csv"):
        shutil.copy(path, tmp_path)
    again = run(tmp_path, *SMALLEST)
    assert again.status == 0
    assert repr(again.rows) == repr(smoke.rows), "of one a NaN is a part"
    shapes = len({store.key(row) for row in smoke.rows})
    assert f"{shapes} of them as they were measured before" in again.said


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let processes started here receive SIGINT, which those of a shell's background job inherit as ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_loses_nothing_measured(tmp_path: Path) -> None:
    shapes = ("logprobs", "--shapes", "B=1,2 T=4 V=1031", "--rounds", "5", "--peers", "planted")
    peer = Path(__file__).with_name("interrupting_peer.py")
    interrupted = run(tmp_path, *shapes, "--peer-file", str(peer))
    assert interrupted.status == 130, interrupted.said
    assert "goes on from there" in interrupted.said
    assert {row["B"] for row in interrupted.rows} == {1}
    again = run(tmp_path, *shapes)
    assert again.status == 0, again.said
    assert again.rows[: len(interrupted.rows)] == interrupted.rows
    assert {row["B"] for row in again.rows[len(interrupted.rows) :]} == {2}


def test_the_report_draws_it(smoke: Smoke, tmp_path: Path) -> None:
    written = plots.draw(smoke.folder, tmp_path)
    assert [path.name for path in written] == ["trainers.png"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
