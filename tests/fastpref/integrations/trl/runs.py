"""Train small models with TRL's trainers or ours, and compare losses, metrics and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations import trl as ours

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{i}" for i in range(47)]
TIMES = ("runtime", "per_second", "time", "flos", "mfu")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer() -> Any:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def build(name: str = "Llama", **config: Any) -> Any:
    """Return a model with random weights, whose logits have a spread of about 1."""
    made = getattr(transformers, f"{name}Config")(vocab_size=len(WORDS) + 4, **{**SIZES, **config})
    model = transformers.AutoModelForCausalLM.from_config(made).float()
    return perturbed(model, 1)


def perturbed(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def text(*numbers: int) -> str:
    return " ".join(WORDS[n % len(WORDS)] for n in numbers)


def rows(kind: str, n: int = 12) -> Any:
    """Return a dataset of prompts and completions of unequal lengths."""
    prompts = [text(*range(i, i + 2 + i % 4)) for i in range(n)]
    first = [f" {text(*range(3 * i, 3 * i + 1 + i % 5))}" for i in range(n)]
    second = [f" {text(*range(7 * i, 7 * i + 6 - i % 5))}" for i in range(n)]
    columns: dict[str, Any] = {"prompt": prompts}
    if kind == "DPO":
        columns |= {"chosen": first, "rejected": second}
    elif kind in ("KTO", "SFT"):
        columns |= {"completion": first}
        columns |= {"label": [i % 3 > 0 for i in range(n)]} if kind == "KTO" else {}
    return datasets.Dataset.from_dict(columns)


def distinct_words(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


@dataclasses.dataclass
class Run:
    losses: list[float]
    metrics: list[dict[str, float]]
    start: dict[str, Tensor]
    parameters: dict[str, Tensor]


def train(
    kind: str,
    folder: Path,
    model: Callable[[], Any] = build,
    *,
    trainer: Any = None,
    arguments: dict[str, Any] | None = None,
    reference: bool = True,
    before: Callable[[], Any] = nullcontext,
    **options: Any,
) -> Run:
    """Train for three steps, with TRL's trainer of this kind or with `trainer`, inside the context of `before()`."""
    transformers.set_seed(0)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **options,
    }
    arguments = {"model": model(), "train_dataset": rows(kind), **(arguments or {})}
    if kind in ("GRPO", "RLOO"):
        settings = {"num_generations": 2, "max_completion_length": 5, **settings}
        arguments["reward_funcs"] = distinct_words
    elif kind != "SFT" and reference:
        arguments["ref_model"] = perturbed(model(), 2)
    made = (trainer or getattr(trl, f"{kind}Trainer"))(
        args=getattr(trl, f"{kind}Config")(**settings), processing_class=tokenizer(), **arguments
    )
    start = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    losses, compute_loss = [], made.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    made.compute_loss = recorded
    with before():
        made.train()
    metrics = [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMES)}
        for entry in made.state.log_history
    ]
    return Run(losses, metrics, start, {name: x.detach() for name, x in made.model.named_parameters()})


def assert_trained_alike(found: Run, wanted: Run, tolerance: float) -> None:
    assert len(wanted.losses) >= 3
    assert found.losses == pytest.approx(wanted.losses, rel=tolerance, abs=tolerance)
    for name, value in wanted.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=10 * tolerance, atol=tolerance)
    moved = [(value - wanted.start[name]).abs().max().item() for name, value in wanted.parameters.items()]
    assert max(moved) > max(2 * tolerance, 1e-3)


def assert_alike(found: Run, wanted: Run) -> None:
    assert_trained_alike(found, wanted, 1e-5)
    assert len(found.metrics) == len(wanted.metrics) >= 3
    for a, b in zip(found.metrics, wanted.metrics, strict=True):
        if (
            b.get("rewards/margins") == 0
        ):  # the policy equals the reference, and rounding decides which reward is higher
            b["rewards/accuracies"] = a["rewards/accuracies"]
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


PROMPTS = [text(*range(i, i + 2 + i % 4)) for i in range(12)]
ANSWERS = [[f" {text(*range(j * i, j * i + 1 + (i + j) % 5))}" for j in range(2 + i % 3)] for i in range(12)]


def classifier() -> Any:
    return perturbed(transformers.AutoModelForSequenceClassification.from_config(build(num_labels=1).config), 4)


def pairs(**columns: Any) -> Any:
    chosen, rejected = zip(*(answers[:2] for answers in ANSWERS), strict=True)
    return datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": chosen, "rejected": rejected, **columns})


def ranked(answers: list[Any] = ANSWERS, **columns: Any) -> Any:
    if not columns:
        columns = {"scores": [[float((7 * j + i) % 5) for j in range(len(row))] for i, row in enumerate(answers)]}
    return datasets.Dataset.from_dict({"prompt": PROMPTS, "completions": answers, **columns})


def reward(folder: Path, trainer: Any, dataset: Any, **options: Any) -> Run:
    arguments = {"train_dataset": dataset, "eval_dataset": dataset}
    options = {"eval_strategy": "steps", "eval_steps": 2, **options}
    return train("Reward", folder, classifier, trainer=trainer, arguments=arguments, reference=False, **options)


def fast(loss_type: str | None = None) -> Any:
    return partial(ours.FastRewardTrainer, loss_type=loss_type)
