"""Train with FastDPOTrainer and with TRL's DPOTrainer: every loss type and option, every metric, the weights."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from fastpref import linear_dpo_loss
from fastpref.integrations import trl as ours
from tests.fastpref.integrations.trl.runs import (
    Run,
    assert_alike,
    assert_trained_alike,
    build,
    perturbed,
    rows,
    tokenizer,
    train,
)
from tests.helpers.dpo import TRL_LOSS_TYPES

trl = pytest.importorskip("trl", minversion="0.29")
_dpo_options = pytest.importorskip("fastpref.integrations.trl._dpo_options")
peft = pytest.importorskip("peft")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and PEFT warn of things that are not tested here

VERSION = Version(trl.__version__)
USES_TRLS = "FastDPOTrainer uses the loss of TRL"
NEEDED = {"exo_pair": {"label_smoothing": 0.01}, "robust": {"label_smoothing": 0.1}}


@pytest.fixture
def dpo_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the options of each call of `linear_dpo_loss`, with chunks small enough for gradients in the forward."""
    module, calls = sys.modules[ours.FastDPOTrainer.__module__], []

    def called(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return linear_dpo_loss(*args, chunk_rows=16, **options)

    monkeypatch.setattr(module, "linear_dpo_loss", called)
    return calls


@contextmanager
def without_trls_loss() -> Iterator[None]:
    """Fail if TRL's own loss is called."""

    def called(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("TRL's own loss ran")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_trainer.DPOTrainer, "_compute_loss", called)
        patch.setattr(dpo_trainer.DPOTrainer, "compute_ref_log_probs", called)
        yield


def compare(folder: Path, dpo_calls: list[Any], caplog: Any, **options: Any) -> Run:
    """Train with FastDPOTrainer and with TRL's trainer, compare them, and return TRL's run."""
    wanted = train("DPO", folder, **options)
    assert not dpo_calls
    with caplog.at_level(logging.WARNING):
        found = train("DPO", folder, trainer=ours.FastDPOTrainer, before=without_trls_loss, **options)
    assert len(dpo_calls) >= 3
    dpo_calls.clear()
    assert USES_TRLS not in caplog.text
    assert_alike(found, wanted)
    return wanted


@pytest.mark.parametrize("loss_type", TRL_LOSS_TYPES)
def test_loss_types(loss_type: str, tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    if loss_type not in inspect.getsource(dpo_trainer.DPOTrainer._compute_loss):
        pytest.skip(f"TRL {VERSION} has no {loss_type}")
    compare(tmp_path, dpo_calls, caplog, beta=0.5, loss_type=loss_type, **NEEDED.get(loss_type, {}))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "gradient_checkpointing": True},
        {"precompute_ref_log_probs": True, "ld_alpha": 0.4},
        {"use_weighting": True, "loss_type": "apo_down"},
        {"ld_alpha": 0.4, "max_length": 8},
        {"ld_alpha": 0.4, "loss_type": "ipo", "max_length": 5, "truncation_mode": "keep_end"},
        {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "hinge"]},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7, "loss_type": "robust"},
        {"label_smoothing": 0.2, "loss_type": "aot"},
        {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "discopop_tau": 0.1,
            "loss_type": "discopop",
        },
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        {"padding_free": True, "activation_offloading": False, "pad_to_multiple_of": 16},
    ],
    ids=lambda options: ",".join(options),
)
def test_options(options: dict[str, Any], tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    compare(tmp_path, dpo_calls, caplog, beta=0.5, **options)


def test_evaluation(tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    arguments = {"eval_dataset": rows("DPO", 6)}
    wanted = compare(tmp_path, dpo_calls, caplog, arguments=arguments, eval_strategy="steps", eval_steps=1)
    assert "eval_rewards/margins" in wanted.metrics[1]


@pytest.mark.parametrize("precompute", [False, True])
def test_reference_is_the_model_without_its_adapter(
    precompute: bool, tmp_path: Path, dpo_calls: list[Any], caplog: Any
) -> None:
    config = {"peft_config": lora("q_proj", "v_proj")}
    options = {"precompute_ref_log_probs": precompute, "gradient_checkpointing": True}
    wanted = compare(tmp_path, dpo_calls, caplog, arguments=config, reference=False, **options)
    assert wanted.metrics[1]["rewards/margins"] != 0
    assert all("lora" in name for name, x in wanted.parameters.items() if not torch.equal(x, wanted.start[name]))


def test_reference_is_the_adapter_it_started_from(tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    def adapted() -> Any:
        return perturbed(peft.get_peft_model(build(), lora("q_proj", "v_proj")), 3)

    wanted = compare(tmp_path, dpo_calls, caplog, model=adapted, reference=False)
    assert wanted.metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(wanted.metrics[1]["rewards/margins"]) > 1e-3


def lora(*targets: str, **options: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(targets), **options)


def test_prompt_of_virtual_tokens(tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    if Version("1.15") > VERSION:
        pytest.skip(f"TRL {VERSION} does not score virtual tokens")
    config = {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    compare(tmp_path, dpo_calls, caplog, arguments=config, reference=False, use_weighting=True, ld_alpha=0.5)


@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_router_loss(coefficient: float, tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    if Version("1.10") > VERSION:
        pytest.skip(f"TRL {VERSION} does not add the router's loss")

    def experts() -> Any:
        return build("Mixtral", num_local_experts=4, experts_implementation="eager")

    wanted = compare(tmp_path, dpo_calls, caplog, model=experts, router_aux_loss_coef=coefficient)
    assert ("aux_loss" in wanted.metrics[0]) == (coefficient > 0)


def test_softcap(tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    compare(tmp_path, dpo_calls, caplog, model=lambda: build("Gemma2", final_logit_softcapping=0.3))


def test_autocast(tmp_path: Path, dpo_calls: list[Any]) -> None:
    adapted = {"arguments": {"peft_config": lora("q_proj", "v_proj", init_lora_weights=False)}, "reference": False}
    exact = train("DPO", tmp_path, **adapted)
    ours_in_bf16 = {"trainer": ours.FastDPOTrainer, "bf16": True, "before": without_trls_loss, **adapted}
    found = train("DPO", tmp_path, **ours_in_bf16)
    assert_trained_alike(found, exact, 2e-2)
    assert abs(found.losses[0] - exact.losses[0]) > 1e-5
    # The reference is computed in bf16 like the policy, also when it is precomputed, before the model is wrapped.
    before = train("DPO", tmp_path, precompute_ref_log_probs=True, **ours_in_bf16)
    assert before.losses[0] == pytest.approx(found.losses[0], abs=1e-6)
    assert len(dpo_calls) == 6


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (
            {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.2},
            "label_smoothing=0.2 with loss_type sigmoid, rob",
        ),
        ({"loss_type": "robust", "label_smoothing": 0.6}, "label_smoothing must be below 1/2"),
        ({"loss_type": ["ipo", "sigmoid"]}, "ipo, which divides by lengths, in loss_type ipo, sigmoid"),
        ({"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4}, "ld_alpha with the type sft"),
        ({"loss_type": ["ipo", "sft"]}, "lengths with the type sft"),
        (
            {"loss_type": "sft", "f_divergence_type": "js_divergence"},
            "f_divergence='js' is not an option of loss_type sft",
        ),
    ],
    ids=str,
)
def test_what_is_left_to_trl(
    options: dict[str, Any], left: str, tmp_path: Path, dpo_calls: list[Any], caplog: Any
) -> None:
    wanted = train("DPO", tmp_path, **options)
    found = train("DPO", tmp_path, trainer=ours.FastDPOTrainer, **options)
    assert_alike(found, wanted)
    assert not dpo_calls
    (line,) = (message for message in caplog.messages if USES_TRLS in message)
    assert f"TRL {VERSION}" in line
    assert left in line


def test_logits_for_compute_metrics_are_left_to_trl(tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    arguments = {"eval_dataset": rows("DPO", 6), "compute_metrics": lambda out: {"width": out.predictions.shape[-1]}}
    options = {"arguments": arguments, "eval_strategy": "steps", "eval_steps": 1}
    wanted = train("DPO", tmp_path, **options)
    assert_alike(train("DPO", tmp_path, trainer=ours.FastDPOTrainer, **options), wanted)
    assert wanted.metrics[1]["eval_width"] == 51
    assert len(dpo_calls) == 3
    (line,) = (message for message in caplog.messages if USES_TRLS in message)
    assert "return_outputs=True" in line


def test_label_smoothing_that_trl_ignores(tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    compare(tmp_path, dpo_calls, caplog, label_smoothing=0.2)
    assert sum("ignores label_smoothing" in message for message in caplog.messages) == 1


def test_options_that_cannot_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dpo(tmp_path)
    assert _dpo_options.unsupported(made) == []
    made._is_vision_dataset = True
    made.use_liger_kernel = True
    made.f_divergence_type = "hellinger"
    assert _dpo_options.unsupported(made) == [
        "a dataset with images",
        "use_liger_kernel=True",
        "f_divergence_type='hellinger'",
    ]
    made, other = dpo(tmp_path), dpo(tmp_path, f_divergence_type="js_divergence", loss_type="ipo")
    later = dataclasses.make_dataclass("Later", [("tilt", float, 0.0), ("top_k", int, 3)], bases=(trl.DPOConfig,))
    monkeypatch.setattr(_dpo_options, "DPOConfig", later)
    for trainer in (made, other):
        trainer.args.tilt, trainer.args.top_k = 0.5, 3
    assert _dpo_options.unsupported(made) == ["tilt=0.5, an option that TRL 1.16 did not have"]
    monkeypatch.setattr(_dpo_options, "version", lambda name: "1.9.0")
    assert "'js_divergence' with loss_type ipo, which TRL before 1.10" in _dpo_options.unsupported(other)[1]


def dpo(folder: Path, model: Any = None, **options: Any) -> Any:
    settings = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, **options}
    model = build() if model is None else model
    arguments = {"model": model, "ref_model": build(), "train_dataset": rows("DPO"), "processing_class": tokenizer()}
    return ours.FastDPOTrainer(args=trl.DPOConfig(**settings), **arguments)


def test_a_head_that_cannot_be_computed_is_left_to_trl(tmp_path: Path, caplog: Any) -> None:
    model = build()
    model.lm_head.register_parameter("gain", torch.nn.Parameter(torch.ones(51)))
    dpo(tmp_path, model)
    (line,) = (message for message in caplog.messages if USES_TRLS in message)
    assert "lm_head must be a plain nn.Linear" in line
