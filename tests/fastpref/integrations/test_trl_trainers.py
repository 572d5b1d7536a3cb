"""FastDPOTrainer and FastRewardTrainer against TRL's own: every loss type and option, every metric, the weights."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from fastpref import linear_dpo_loss, pairwise_reward_loss, reference
from fastpref.integrations import trl as ours
from tests.fastpref.integrations.trl_runs import (
    Run,
    assert_trained_alike,
    build,
    perturbed,
    rows,
    text,
    tokenizer,
    train,
)

trl = pytest.importorskip("trl", minversion="0.29")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and PEFT's, which are not ours to mend

VERSION = Version(trl.__version__)
LEFT = "cannot express"
LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
NEEDED = {"exo_pair": {"label_smoothing": 0.01}, "robust": {"label_smoothing": 0.1}}


@pytest.fixture
def dpo_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each call of `linear_dpo_loss` was given; in chunks so small that it makes its gradients in the forward."""
    module, calls = sys.modules[ours.FastDPOTrainer.__module__], []

    def called(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return linear_dpo_loss(*args, chunk_rows=16, **options)

    monkeypatch.setattr(module, "linear_dpo_loss", called)
    return calls


@contextmanager
def without_trls_loss() -> Iterator[None]:
    """TRL's own loss is not to be called."""

    def called(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("TRL's own loss ran")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_trainer.DPOTrainer, "_compute_loss", called)
        patch.setattr(dpo_trainer.DPOTrainer, "compute_ref_log_probs", called)
        yield


def assert_alike(found: Run, wanted: Run) -> None:
    assert_trained_alike(found, wanted, 1e-5)
    assert len(found.metrics) == len(wanted.metrics) >= 3
    for a, b in zip(found.metrics, wanted.metrics, strict=True):
        if b.get("rewards/margins") == 0:  # the policy is the reference still, and which reward is higher is rounding
            b["rewards/accuracies"] = a["rewards/accuracies"]
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def compare(folder: Path, dpo_calls: list[Any], caplog: Any, **options: Any) -> Run:
    """Hold our training against TRL's own. Returns TRL's."""
    wanted = train("DPO", folder, **options)
    assert not dpo_calls
    with caplog.at_level(logging.WARNING):
        found = train("DPO", folder, trainer=ours.FastDPOTrainer, before=without_trls_loss, **options)
    assert len(dpo_calls) >= 3
    dpo_calls.clear()
    assert LEFT not in caplog.text
    assert_alike(found, wanted)
    return wanted


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_types(loss_type: str, tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    if loss_type not in inspect.getsource(dpo_trainer.DPOTrainer._compute_loss):
        pytest.skip(f"TRL {VERSION} has no {loss_type}")
    compare(tmp_path, dpo_calls, caplog, beta=0.5, loss_type=loss_type, **NEEDED.get(loss_type, {}))


@pytest.mark.parametrize("options", [
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "gradient_checkpointing": True},
    {"precompute_ref_log_probs": True, "ld_alpha": 0.4},
    {"use_weighting": True, "loss_type": "apo_down"},
    {"ld_alpha": 0.4, "max_length": 8},
    {"ld_alpha": 0.4, "loss_type": "ipo", "max_length": 5, "truncation_mode": "keep_end"},
    {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid", "hinge"]},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7, "loss_type": "robust"},
    {"label_smoothing": 0.2, "loss_type": "aot"},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "discopop_tau": 0.1, "loss_type": "discopop"},
    {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    {"padding_free": True, "activation_offloading": False, "pad_to_multiple_of": 16},
], ids=lambda options: ",".join(options))  # fmt: skip
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
        pytest.skip("which TRL does not score")
    config = {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    compare(tmp_path, dpo_calls, caplog, arguments=config, reference=False, use_weighting=True, ld_alpha=0.5)


@pytest.mark.parametrize("coefficient", [0.5, 0.0])
def test_router_loss(coefficient: float, tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    if Version("1.10") > VERSION:
        pytest.skip("which TRL does not add")

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
    # The reference is rounded as the policy is, also before anything has wrapped the model.
    before = train("DPO", tmp_path, precompute_ref_log_probs=True, **ours_in_bf16)
    assert before.losses[0] == pytest.approx(found.losses[0], abs=1e-6)
    assert len(dpo_calls) == 6


@pytest.mark.parametrize(("options", "left"), [
    ({"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.2}, "label_smoothing=0.2 of sigmoid, robust"),
    ({"loss_type": "robust", "label_smoothing": 0.6}, "label_smoothing must be below 1/2"),
    ({"loss_type": ["ipo", "sigmoid"]}, "ipo by lengths beside others in ipo, sigmoid"),
    ({"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.4}, "ld_alpha with the loss type sft"),
    ({"loss_type": ["ipo", "sft"]}, "lengths with the loss type sft"),
    ({"loss_type": "sft", "f_divergence_type": "js_divergence"}, "f_divergence='js' has no place in loss_type sft"),
], ids=str)  # fmt: skip
def test_what_is_left_to_trl(
    options: dict[str, Any], left: str, tmp_path: Path, dpo_calls: list[Any], caplog: Any
) -> None:
    wanted = train("DPO", tmp_path, **options)
    found = train("DPO", tmp_path, trainer=ours.FastDPOTrainer, **options)
    assert_alike(found, wanted)
    assert not dpo_calls
    (line,) = (message for message in caplog.messages if LEFT in message)
    assert f"TRL {VERSION}" in line
    assert left in line


def test_logits_for_compute_metrics_are_left_to_trl(tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    arguments = {"eval_dataset": rows("DPO", 6), "compute_metrics": lambda out: {"width": out.predictions.shape[-1]}}
    options = {"arguments": arguments, "eval_strategy": "steps", "eval_steps": 1}
    wanted = train("DPO", tmp_path, **options)
    assert_alike(train("DPO", tmp_path, trainer=ours.FastDPOTrainer, **options), wanted)
    assert wanted.metrics[1]["eval_width"] == 51
    assert len(dpo_calls) == 3
    (line,) = (message for message in caplog.messages if LEFT in message)
    assert "return_outputs=True" in line


def test_label_smoothing_that_trl_ignores(tmp_path: Path, dpo_calls: list[Any], caplog: Any) -> None:
    compare(tmp_path, dpo_calls, caplog, label_smoothing=0.2)
    assert sum("ignores label_smoothing" in message for message in caplog.messages) == 1


def test_options_that_cannot_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.integrations import _trl_options

    made = dpo(tmp_path)
    assert _trl_options.unexpressed(made) == []
    made._is_vision_dataset = True
    made.use_liger_kernel = True
    made.f_divergence_type = "hellinger"
    assert _trl_options.unexpressed(made) == [
        "a dataset with images", "use_liger_kernel=True", "f_divergence_type='hellinger'"
    ]  # fmt: skip
    made, other = dpo(tmp_path), dpo(tmp_path, f_divergence_type="js_divergence", loss_type="ipo")
    later = dataclasses.make_dataclass("Later", [("tilt", float, 0.0), ("top_k", int, 3)], bases=(trl.DPOConfig,))
    monkeypatch.setattr(_trl_options, "DPOConfig", later)
    for trainer in (made, other):
        trainer.args.tilt, trainer.args.top_k = 0.5, 3
    assert _trl_options.unexpressed(made) == ["tilt=0.5, which TRL had not in 1.16"]
    monkeypatch.setattr(_trl_options, "version", lambda name: "1.9.0")
    assert "'js_divergence' of ipo, which before 1.10" in _trl_options.unexpressed(other)[1]


def dpo(folder: Path, model: Any = None, **options: Any) -> Any:
    settings = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, **options}
    model = build() if model is None else model
    arguments = {"model": model, "ref_model": build(), "train_dataset": rows("DPO"), "processing_class": tokenizer()}
    return ours.FastDPOTrainer(args=trl.DPOConfig(**settings), **arguments)


def test_a_head_that_cannot_be_computed_is_left_to_trl(tmp_path: Path, caplog: Any) -> None:
    model = build()
    model.lm_head.register_parameter("gain", torch.nn.Parameter(torch.ones(51)))
    dpo(tmp_path, model)
    (line,) = (message for message in caplog.messages if LEFT in message)
    assert "lm_head must be a plain nn.Linear" in line


@pytest.mark.parametrize("name", ["FastDPOTrainer", "FastRewardTrainer"])
def test_another_trl_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.integrations import _trl_seams

    def no_trl(name: str) -> str:
        raise PackageNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(_trl_seams, "version", no_trl)
        with pytest.raises(ImportError, match=rf"{name} .* pip install 'trl>=0.29'"):
            getattr(ours, name)
        patch.setattr(_trl_seams, "version", lambda name: "0.28.1")
        with pytest.raises(NotImplementedError, match=rf"{name} knows trl>=0\.29, up to .* installed is 0\.28\.1"):
            getattr(ours, name)
    kind, method = {"FastDPOTrainer": ("dpo", "_compute_loss"), "FastRewardTrainer": ("reward", "compute_loss")}[name]
    own = importlib.import_module(f"trl.trainer.{kind}_trainer")
    trainer = getattr(trl, name.removeprefix("Fast"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, method, lambda self, model, batch: None)
        with pytest.raises(
            NotImplementedError, match=rf"installed is {VERSION}, whose .* has no {method}\(self, model"
        ):
            getattr(ours, name)
    used = "use_adapter" if kind == "dpo" else "DataCollatorForPreference"
    monkeypatch.delattr(own, used)
    with pytest.raises(NotImplementedError, match=f"has no {used}"):
        getattr(ours, name)
    with pytest.raises(AttributeError, match="has no attribute 'FastPPOTrainer'"):
        _ = ours.FastPPOTrainer


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


@pytest.mark.parametrize(("columns", "options"), [
    ({}, {}), ({"margin": [i / 6 for i in range(12)]}, {}), ({}, {"center_rewards_coefficient": 0.1}),
    ({}, {"max_length": 6, "gradient_accumulation_steps": 2}),
], ids=["pairs", "margin", "centred", "short"])  # fmt: skip
def test_pairs_of_rewards(
    columns: dict[str, Any], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = reward(tmp_path, None, pairs(**columns), **options)
    trainer, calls = fast(), []
    monkeypatch.setattr(trl.RewardTrainer, "compute_loss", None)  # which is not to be called
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
        model=classifier(), args=trl.RewardConfig(**settings), train_dataset=dataset, loss_type=loss_type,
        processing_class=words or tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("loss_type", ["ranking", "plackett_luce", "best_of_k"])
@pytest.mark.parametrize("talks", [False, True])
def test_rankings_of_unequal_lengths(loss_type: str, talks: bool, tmp_path: Path) -> None:
    """One batch against the reference, a prompt and a sequence at a time."""
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
    assert found == pytest.approx({
        "num_tokens": 0, "min_reward": min(seen), "max_reward": max(seen), "mean_reward": sum(seen) / len(seen),
        "accuracy": sum(gap > 0 for gap in gaps) / len(gaps), "margin": sum(gaps) / len(gaps),
    }, rel=1e-4)  # fmt: skip


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


ON_TWO_RANKS = """
import sys
import torch
import trl
from fastpref.integrations.trl import FastDPOTrainer, FastRewardTrainer
from tests.fastpref.integrations import test_trl_trainers as tests

def save(kind, run):
    full = {k: x.full_tensor() if hasattr(x, "full_tensor") else x.clone() for k, x in run.parameters.items()}
    torch.save([run.metrics, full], f"{folder}/{kind}{torch.distributed.get_rank()}.pt")

wrapper, folder = sys.argv[1:]
fsdp = {"version": 2, "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
options = {"fsdp": "full_shard auto_wrap", "fsdp_config": fsdp} if wrapper == "FSDP2" else {}
trl.DPOTrainer._compute_loss = None  # which is not to be called
save("DPO", tests.train("DPO", folder, trainer=FastDPOTrainer, per_device_train_batch_size=2, **options))
if wrapper == "DDP":
    sizes = {f"per_device_{name}_batch_size": 2 for name in ("train", "eval")}
    save("ranking", tests.reward(folder, FastRewardTrainer, tests.ranked(), **sizes))
"""


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_two_ranks_train_as_one_process(wrapper: str, tmp_path: Path) -> None:
    """The loss is made in the forward of the wrapper; each rank has other numbers of tokens and answers."""
    (tmp_path / "run.py").write_text(ON_TWO_RANKS)
    root = Path(__file__).parents[3]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [*launch, str(tmp_path / "run.py"), wrapper, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"DPO": lambda: train("DPO", tmp_path)}
    if wrapper == "DDP":
        expected["ranking"] = lambda: reward(tmp_path, fast(), ranked(), per_device_eval_batch_size=4)
    for kind, make in expected.items():
        wanted = make()
        (metrics, parameters), (_, others) = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in range(2))
        torch.testing.assert_close(parameters, others, rtol=0, atol=0)
        assert_alike(Run(wanted.losses, metrics, wanted.start, parameters), wanted)


@pytest.mark.parametrize(("dataset", "loss_type", "options", "message"), [
    (lambda: pairs(), "listwise", {}, "one of 'pairwise', 'ranking', .*; got 'listwise'"),
    (lambda: pairs(), "ranking", {}, "'ranking' needs a dataset of prompt, completions.*; train has prompt, cho"),
    (lambda: ranked(), "pairwise", {}, "'pairwise' needs a dataset of chosen and rejected; train has prompt, comp"),
    (lambda: ranked(scores=[[1.0]] * 12), None, {}, r"as many numbers as scores .* completions=.*, scores=\[1.0\]"),
    (lambda: ranked(none=[0] * 12), None, {}, "a list of two or more, and as many numbers as scores or as ranks; got"),
    (lambda: ranked(ranks=[[1] * len(a) for a in ANSWERS]), "plackett_luce", {}, "no place for ties.*'ranks': "),
    (lambda: ranked(ranks=[[1] * len(a) for a in ANSWERS]), "best_of_k", {}, "no place for ties"),
    (lambda: ranked(), None, {"center_rewards_coefficient": 0.1}, "center_rewards_coefficient is of pairs; got 0.1"),
    (lambda: ranked(scores=ranked()["scores"], margin=[0.1] * 12), None, {}, "margin is of pairs"),
])  # fmt: skip
def test_refused_rewards(
    dataset: Callable[[], Any], loss_type: str | None, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        reward(tmp_path, fast(loss_type), dataset(), **options)
