"""DPO in other libraries' trainers: each script as a user runs it, with fewer steps, and against plain PyTorch."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("threads")]

EXAMPLES = Path(__file__).parents[2] / "examples"
RATE = 0.5


@pytest.fixture(params=["transformers_trainer", "lightning_dpo", "accelerate_dpo"])
def example(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(1)  # as fast as two on a model so small
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr("sys.argv", [example.__name__, *map(str, options)])
    example.main()


def test_held_out_accuracy_rises(
    example: ModuleType, scored_rows: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(example, monkeypatch, "--steps", 15)
    printed = capsys.readouterr().out
    found = re.search(r"held-out preference accuracy: ([\d.]+)% before, ([\d.]+)% after 15 steps", printed)
    assert found, printed
    assert float(found[1]) == 50
    assert float(found[2]) > 80
    # Policy and reference, at two batches of 4 pairs a step.
    assert scored_rows.count(2 * 4 * (example.PROMPT + example.ANSWER)) == 2 * 2 * 15


def step_by_gradient(example: Any, monkeypatch: pytest.MonkeyPatch, *options: object) -> tuple[Any, list[Any], Any]:
    """Run the script by gradient descent. Returns the reference, the batches it trained on and the trained policy."""

    def sgd(parameters: Any, **_: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=RATE)

    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    if hasattr(example, "TrainingArguments"):
        own = example.TrainingArguments
        descent = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0}
        monkeypatch.setattr(example, "TrainingArguments", lambda *args, **kwargs: own(*args, **{**kwargs, **descent}))
    calls, dpo = [], example.dpo

    def recorded(policy: Any, reference: Any, batch: Any) -> Any:
        calls.append((policy, reference, batch, torch.is_grad_enabled()))
        return dpo(policy, reference, batch)

    monkeypatch.setattr(example, "dpo", recorded)
    run(example, monkeypatch, *options)
    policy, reference, *_ = calls[-1]
    return reference, [batch for *_, batch, trains in calls if trains], policy


def plain_loss(model: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    """DPO of logits, as its paper has it."""

    def logps(model: Any, member: int) -> Tensor:
        ids, labels = batch["input_ids"][:, member], batch["labels"][:, member, 1:]
        rows = F.log_softmax(model(ids).logits[:, :-1], dim=-1)
        return (rows.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)

    gaps = [logps(model, member) - logps(reference, member).detach() for member in (0, 1)]
    return -F.logsigmoid(0.1 * (gaps[0] - gaps[1])).mean()


def test_a_step_is_that_of_plain_pytorch(
    example: ModuleType, scored_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, batches, policy = step_by_gradient(example, monkeypatch, "--steps", 2, "--batch", 6, "--accumulation", 1)
    assert len(batches) == 2
    assert scored_rows.count(2 * 6 * (example.PROMPT + example.ANSWER)) == 2 * 2
    # The policy starts as a copy of its reference.
    plain = copy.deepcopy(reference).requires_grad_(True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    for batch in batches:
        optimizer.zero_grad()
        plain_loss(plain, reference, batch).backward()
        optimizer.step()
    assert_same_steps(policy, plain, reference, 1e-5)


def test_accumulated_batches_are_one(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, whole, policy = step_by_gradient(example, monkeypatch, "--steps", 1, "--batch", 8, "--accumulation", 1)
    with monkeypatch.context() as patches:
        other, parts, accumulated = step_by_gradient(example, patches, "--steps", 1, "--batch", 2, "--accumulation", 4)
    assert [len(batch["labels"]) for batch in whole + parts] == [8, 2, 2, 2, 2]
    torch.testing.assert_close(other.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in parts]), whole[0]["input_ids"])
    assert_same_steps(accumulated, policy, reference, 1e-6)


def assert_same_steps(found: Any, wanted: Any, start: Any, tolerance: float) -> None:
    """Both have moved from `start` by the same, per unit of the learning rate."""
    parameters = zip(found.parameters(), wanted.parameters(), start.parameters(), strict=True)
    steps = [((a - s) / RATE, (b - s) / RATE) for a, b, s in parameters]
    assert max(b.abs().max().item() for _, b in steps) > 1e-2
    for a, b in steps:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
