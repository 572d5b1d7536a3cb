"""Run every code block of every page in order, each page in its own namespace."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("sybil")
pytest.importorskip("transformers")

from fastpref.integrations import openrlhf, trl, verl
from tests.docs import blocks, stand_ins

# Pages that use libraries that warn.
TRAINERS = {"trainers.md"}


@pytest.fixture(autouse=True)
def as_before(threads: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    torch.set_num_threads(1)  # models this small are no faster with more
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stand_ins.install(monkeypatch)
    yield
    for library in (openrlhf, trl, verl):
        library.unpatch()
    if dist.is_initialized():
        dist.destroy_process_group()


def _name(page: Path) -> str:
    return str(page.relative_to(blocks.ROOT))


def _marked(page: Path) -> Any:
    marks = [pytest.mark.filterwarnings("ignore")] if page.name in TRAINERS else []
    return pytest.param(page, id=_name(page), marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("page", [_marked(page) for page in blocks.PAGES])
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in TRAINERS:
        pytest.importorskip("lightning")
        base = pytest.importorskip("trl.trainer.base_trainer")
        monkeypatch.setattr(base, "send_telemetry", lambda *args, **kwargs: None, raising=False)
    _, examples = blocks.parse(page)
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("page", blocks.PAGES, ids=_name)
def test_no_block_slips_through(page: Path) -> None:
    """Every fenced block that readers see has an evaluator."""
    fences = re.findall(r"^[ \t]*(?:```|~~~)(.*)$", page.read_text(), re.MULTILINE)
    _, examples = blocks.parse(page)
    shown = blocks.visible(examples)
    assert 2 * len(shown) == len(fences), f"blocks in {fences[::2]}, of which {len(shown)} have an evaluator"
    assert all(fence == "" for fence in fences[1::2])
    assert bool(shown) or not fences


def test_most_pages_have_blocks() -> None:
    without = {_name(page) for page in blocks.PAGES if not blocks.visible(blocks.parse(page)[1])}
    assert without <= {"CONTRIBUTING.md", "docs/api.md", "docs/benchmarks.md", "docs/compatibility.md"}


@pytest.mark.parametrize(
    ("block", "fault"),
    [
        ("make no-such-target", "no-such-target"),
        ("pip install '.[no-such-extra]'", "has the extras"),
        ("fastpref bench --no-such-option", "No such option"),
        ("fastpref no-such-command", "has no no-such-command"),
        ("torchrun --nproc-per-node 2 examples/no_such_script.py", "must exist"),
        ("rm -r docs", "no evaluator"),
    ],
)
def test_a_command_that_would_fail_fails(block: str, fault: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{block}\n```\n")
    _, (example,) = blocks.parse(page)
    with pytest.raises(AssertionError, match=fault):
        example.evaluate()


def test_output_that_differs_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for said, right in (("logp -1.0 1.2e-06", True), ("logp -1.1 1.2e-06", False), ("logp -1.0 1.2e-04", False)):
        page.write_text(f'```python\nprint("logp -1.0 1.0e-06")\n```\n\n```text\n{said}\n```\n')
        _, (block, output) = blocks.parse(page)
        block.evaluate()
        if right:
            output.evaluate()
        else:
            with pytest.raises(AssertionError, match="the page says"):
                output.evaluate()
