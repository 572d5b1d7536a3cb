"""Train with FastRewardTrainer: on pairs beside TRL's RewardTrainer, on rankings beside the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpref import pairwise_reward_loss, reference
from fastpref.integrations import trl as ours
from tests.fastpref.integrations.trl.runs import (
    ANSWERS,
    PROMPTS,
    assert_alike,
    classifier,
    fast,
    pairs,
    ranked,
    reward,
    tokenizer,
)

trl = pytest.importorskip("trl", minversion="0.29")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and PEFT warn of things that are not tested here


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({}, {}),
        ({"margin": [i / 6 for i in range(12)]}, {}),
        ({}, {"center_rewards_coefficient": 0.1}),
        ({}, {"max_length": 6, "gradient_accumulation_steps": 2}),
    ],
    ids=["pairs", "margin", "centred", "short"],
)
def test_pairs_of_rewards(
    columns: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = reward(tmp_path, None, pairs(**columns), **options)
    trainer, calls = fast(), []
    monkeypatch.setattr(trl.RewardTrainer, "compute_loss", None)  # it must not be called
    module = sys.modules[trainer.func.__module__]
    monkeypatch.setattr(
        module, "pairwise_reward_loss", lambda *a, **k: calls.append(k) or pairwise_reward_loss(*a, **k)
    )
    assert_alike(reward(tmp_path, trainer, pairs(**columns), **options), wanted)
    assert len(calls) > 3


@pytest.mark.parametrize(("loss_type", "ranks"), [(None, True), ("plackett_luce", False), ("best_of_k", True)])
def test_a_ranking_of_two_is_a_pair(loss_type: str | None, ranks: bool, tmp_path: Path) -> None:
    wanted = reward(tmp_path, None, pairs())
    numbers = {"ranks": [[1, 2]] * 12} if ranks else {"scores": [[0.5, -1.0]] * 12}
    found = reward(tmp_path, fast(loss_type), ranked([answers[:2] for answers in ANSWERS], **numbers))
    assert_alike(found, wanted)


def conversation(ids: list[Any]) -> list[Any]:
    return [[{"role": "assistant", "content": answer}] for answer in ids]


def ranking_trainer(folder: Path, dataset: Any, loss_type: str | None, words: Any = None, **options: Any) -> Any:
    settings = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, **options}
    return ours.FastRewardTrainer(
        model=classifier(),
        args=trl.RewardConfig(**settings),
        train_dataset=dataset,
        loss_type=loss_type,
        processing_class=words or tokenizer(),
    )


@pytest.mark.parametrize("loss_type", ["ranking", "plackett_luce", "best_of_k"])
@pytest.mark.parametrize("talks", [False, True])
def test_rankings_of_unequal_lengths(loss_type: str, talks: bool, tmp_path: Path) -> None:
    """Compare one batch with the reference, which takes one prompt and one sequence at a time."""
    words, dataset = tokenizer(), ranked()
    words.chat_template = "{% for m in messages %}{{ m['content'] }} {{ 'w46' }} {% endfor %}"
    if talks:
        prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        rows = {"prompt": prompts, "completions": [conversation(row) for row in ANSWERS], "scores": dataset["scores"]}
        dataset = datasets.Dataset.from_dict(rows)
    made = ranking_trainer(tmp_path, dataset, loss_type, words, per_device_train_batch_size=12, pad_to_multiple_of=8)
    made.model.eval()
    batch = next(iter(made.get_train_dataloader()))
    assert batch["mask"].sum() == len(batch["input_ids"]) == sum(map(len, ANSWERS))
    assert batch["input_ids"].shape[1] % 8 == 0
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    assert (batch["ranks"][~batch["mask"]] == batch["mask"].shape[1]).all()
    loss = made.compute_loss(made.model, batch)
    losses, gaps, seen = [], [], []
    for prompt, answers, scores in zip(PROMPTS, ANSWERS, ranked()["scores"], strict=True):
        texts = [f"{prompt} w46 {answer} w46 " if talks else f"{prompt}{answer}</s>" for answer in answers]
        given = torch.cat([made.model(torch.tensor([words(text)["input_ids"]])).logits[:, 0] for text in texts])
        ranks = reference.ranks_from_scores(torch.tensor([scores]))
        if loss_type == "best_of_k":
            losses.append(reference.best_of_k_loss(given[None], ranks.argmin(1)))
        else:
            losses.append(getattr(reference, f"{loss_type}_loss")(given[None], ranks))
        order = range(len(scores))
        gaps += [(given[i] - given[j]).item() for i in order for j in order if scores[i] > scores[j]]
        seen += given.tolist()
    wanted = torch.stack(losses).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    parameters = list(made.model.parameters())
    grads = [torch.autograd.grad(x, parameters, allow_unused=True, materialize_grads=True) for x in (loss, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    found = {name: values[-1] for name, values in made._metrics["eval"].items()}
    assert found == pytest.approx(
        {
            "num_tokens": 0,
            "min_reward": min(seen),
            "max_reward": max(seen),
            "mean_reward": sum(seen) / len(seen),
            "accuracy": sum(gap > 0 for gap in gaps) / len(gaps),
            "margin": sum(gaps) / len(gaps),
        },
        rel=1e-4,
    )


@pytest.mark.parametrize("streams", [False, True])
def test_rankings_leave_out_what_is_too_long(streams: bool, tmp_path: Path) -> None:
    dataset = ranked().to_iterable_dataset() if streams else ranked()
    made = ranking_trainer(tmp_path, dataset, None, max_length=8, per_device_train_batch_size=3, max_steps=2)
    kept = [max(len(f"{p}{a}".split()) for a in row) + 1 <= 8 for p, row in zip(PROMPTS, ANSWERS, strict=True)]
    assert 0 < sum(kept) < 12
    assert len(list(made.train_dataset)) == sum(kept)
    assert made.train().global_step == 2
    made.evaluate(made.train_dataset)
    metrics = made.state.log_history[-1]
    assert metrics["eval_loss"] > 0
    assert 0 <= metrics["eval_accuracy"] <= 1


@pytest.mark.parametrize(
    ("dataset", "loss_type", "options", "message"),
    [
        (lambda: pairs(), "listwise", {}, "one of 'pairwise', 'ranking', .*; got 'listwise'"),
        (
            lambda: pairs(),
            "ranking",
            {},
            "'ranking' needs a dataset with the columns prompt, completions.*; train has prompt, cho",
        ),
        (
            lambda: ranked(),
            "pairwise",
            {},
            "'pairwise' needs a dataset with the columns chosen and rejected; train has prompt, comp",
        ),
        (lambda: ranked(scores=[[1.0]] * 12), None, {}, r"as many numbers in scores .* completions=.*, scores=\[1.0\]"),
        (
            lambda: ranked(none=[0] * 12),
            None,
            {},
            "a list of two or more, and as many numbers in scores or in ranks; got",
        ),
        (
            lambda: ranked(ranks=[[1] * len(a) for a in ANSWERS]),
            "plackett_luce",
            {},
            "does not support these ties.*'ranks': ",
        ),
        (lambda: ranked(ranks=[[1] * len(a) for a in ANSWERS]), "best_of_k", {}, "does not support these ties"),
        (
            lambda: ranked(),
            None,
            {"center_rewards_coefficient": 0.1},
            "center_rewards_coefficient is supported for pairs only; got 0.1",
        ),
        (lambda: ranked(scores=ranked()["scores"], margin=[0.1] * 12), None, {}, "margin is supported for pairs only"),
    ],
)
def test_refused_rewards(
    dataset: Callable[[], Any], loss_type: str | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        reward(tmp_path, fast(loss_type), dataset(), **options)
