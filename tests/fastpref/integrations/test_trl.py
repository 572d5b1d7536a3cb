"""TRL's own trainers, with and without `patch()`: every loss, every logged metric, the weights at the end."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpref.integrations import trl as ours

trl = pytest.importorskip("trl", minversion="1.16")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
utils = pytest.importorskip("trl.trainer.utils")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and PEFT's, which are not ours to mend

WORDS = [f"w{i}" for i in range(47)]
SEAM = ("_ChunkedLogProbFunction", "_use_triton")
TIMES = ("runtime", "per_second", "time", "flos", "mfu")
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ...]]:
    """TRL's objects, which must be back at the end; and no telemetry."""
    from trl.trainer import base_trainer

    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *args, **kwargs: None)
    before = seam()
    yield before
    ours.unpatch()
    assert seam() == before


def seam() -> tuple[Any, ...]:
    return tuple(getattr(utils, name) for name in SEAM)


@pytest.fixture
def scored_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that each call of our operator multiplied."""
    rows, own = [], torch.ops.fastpref.linear_logprobs

    def counted(hidden: Tensor, *args: Any) -> Any:
        rows.append(hidden.shape[:-1].numel())
        return own(hidden, *args)

    monkeypatch.setattr(torch.ops.fastpref, "linear_logprobs", counted)
    return rows


def tokenizer() -> Any:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def build(name: str = "Llama", **config: Any) -> Any:
    """A model with random weights, whose logits spread by about 1."""
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
    """Prompts and completions, each of another length."""
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
    kind: str, folder: Path, model: Callable[[], Any] = build, *, arguments: dict[str, Any] | None = None,
    reference: bool = True, before: Callable[[], Any] = nullcontext, **options: Any,
) -> Run:  # fmt: skip
    """Train for three steps. `before` is what is in force while a trainer of this kind runs."""
    transformers.set_seed(0)
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 0.5,
        "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "bf16": False, "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, **options,
    }  # fmt: skip
    arguments = {"model": model(), "train_dataset": rows(kind), **(arguments or {})}
    if kind in ("GRPO", "RLOO"):
        settings = {"num_generations": 2, "max_completion_length": 5, **settings}
        arguments["reward_funcs"] = distinct_words
    elif kind != "SFT" and reference:
        arguments["ref_model"] = perturbed(model(), 2)
    trainer = getattr(trl, f"{kind}Trainer")(
        args=getattr(trl, f"{kind}Config")(**settings), processing_class=tokenizer(), **arguments
    )
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    losses, compute_loss = [], trainer.compute_loss

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = recorded
    with before():
        trainer.train()
    metrics = [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMES)}
        for entry in trainer.state.log_history
    ]
    return Run(losses, metrics, start, {name: x.detach() for name, x in trainer.model.named_parameters()})


def assert_trained_alike(found: Run, wanted: Run, tolerance: float) -> None:
    assert len(wanted.losses) == 3
    assert found.losses == pytest.approx(wanted.losses, rel=tolerance, abs=tolerance)
    for name, value in wanted.parameters.items():
        torch.testing.assert_close(found.parameters[name], value, rtol=10 * tolerance, atol=tolerance)
    moved = [(value - wanted.start[name]).abs().max().item() for name, value in wanted.parameters.items()]
    assert max(moved) > max(2 * tolerance, 1e-3)


def compare(kind: str, folder: Path, scored_rows: list[int], **options: Any) -> Run:
    """Hold a patched training against TRL's own. Returns TRL's."""
    wanted = train(kind, folder, **options)
    assert not scored_rows
    found = train(kind, folder, before=ours.patch, **options)
    assert len(scored_rows) >= 3
    assert_trained_alike(found, wanted, 1e-5)
    assert len(found.metrics) == len(wanted.metrics) >= 3
    for a, b in zip(found.metrics, wanted.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5, nan_ok=True)
    return wanted


@pytest.mark.parametrize("options", [
    {"loss_type": "sigmoid", "gradient_checkpointing": True},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": "ipo"},
    {"loss_type": "apo_zero", "precompute_ref_log_probs": True},
    {"use_weighting": True},
    {"ld_alpha": 0.4},
], ids=["sigmoid", "list", "ipo", "precomputed", "wpo", "ld"])  # fmt: skip
def test_dpo(options: dict[str, Any], tmp_path: Path, scored_rows: list[int]) -> None:
    wanted = compare("DPO", tmp_path, scored_rows, beta=0.5, **options)
    assert {"entropy", "logits/chosen", "mean_token_accuracy"} <= wanted.metrics[0].keys()


@pytest.mark.parametrize("options", [{}, {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.5}], ids=str)
def test_kto(options: dict[str, Any], tmp_path: Path, scored_rows: list[int]) -> None:
    compare("KTO", tmp_path, scored_rows, beta=0.5, **options)


@pytest.mark.parametrize("options", [
    {}, {"loss_type": "dft"}, {"completion_only_loss": False},
], ids=["nll", "dft", "prompt too"])  # fmt: skip
def test_sft(options: dict[str, Any], tmp_path: Path, scored_rows: list[int]) -> None:
    wanted = compare("SFT", tmp_path, scored_rows, **options)
    assert {"entropy", "mean_token_accuracy"} <= wanted.metrics[0].keys()


@pytest.mark.parametrize("options", [
    {"temperature": 0.7, "entropy_coef": 0.1, "num_iterations": 2}, {"cast_lm_head_to_fp32": True, "beta": 0.1},
], ids=["entropy", "float32 head, KL"])  # fmt: skip
def test_grpo(options: dict[str, Any], tmp_path: Path, scored_rows: list[int]) -> None:
    build().save_pretrained(tmp_path / "model")  # from where TRL loads its reference
    arguments = {"model": str(tmp_path / "model")}
    dtype = {"dtype": "bfloat16" if "cast_lm_head_to_fp32" in options else "float32"}
    if dtype["dtype"] == "float32":
        compare("GRPO", tmp_path, scored_rows, arguments=arguments, model_init_kwargs=dtype, **options)
        return
    # The head multiplies float32 on both sides; what went before rounds to bfloat16, and so do the weights.
    wanted = train("GRPO", tmp_path, arguments=arguments, model_init_kwargs=dtype, **options)
    found = train("GRPO", tmp_path, arguments=arguments, model_init_kwargs=dtype, before=ours.patch, **options)
    assert len(scored_rows) >= 3
    assert found.losses[0] == pytest.approx(wanted.losses[0], abs=1e-5)
    assert found.metrics[0] == pytest.approx(wanted.metrics[0], rel=1e-2, abs=1e-5)


def test_rloo(tmp_path: Path, scored_rows: list[int]) -> None:
    build().save_pretrained(tmp_path / "model")
    arguments = {"model": str(tmp_path / "model")}
    dtype = {"dtype": "float32"}
    compare("RLOO", tmp_path, scored_rows, arguments=arguments, model_init_kwargs=dtype, temperature=0.8, beta=0.1)


def test_lora_whose_reference_is_itself_without_adapters(tmp_path: Path, scored_rows: list[int]) -> None:
    def lora() -> dict[str, Any]:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        return {"peft_config": config}

    wanted = compare("DPO", tmp_path, scored_rows, arguments=lora(), reference=False)
    assert wanted.metrics[1]["rewards/margins"] != 0
    assert all("lora" in name for name, x in wanted.parameters.items() if not torch.equal(x, wanted.start[name]))


def test_softcap(tmp_path: Path, scored_rows: list[int]) -> None:
    def gemma() -> Any:
        return build("Gemma2", final_logit_softcapping=0.3)

    capped = compare("DPO", tmp_path, scored_rows, model=gemma)
    uncapped = train("DPO", tmp_path, model=lambda: build("Gemma2", final_logit_softcapping=None))
    assert abs(capped.metrics[0]["entropy"] - uncapped.metrics[0]["entropy"]) > 1e-2


@pytest.mark.parametrize("kind", ["DPO", "SFT"])
def test_bf16_autocast(kind: str, tmp_path: Path, scored_rows: list[int]) -> None:
    wanted = train(kind, tmp_path, bf16=True)
    exact = train(kind, tmp_path)
    found = train(kind, tmp_path, bf16=True, before=ours.patch)
    assert len(scored_rows) >= 3
    assert_trained_alike(found, wanted, 2e-2)
    assert found.losses != wanted.losses  # theirs rounds the logits
    assert found.losses == pytest.approx(exact.losses, abs=2e-2)


LABELS = torch.tensor([[-100, -100, 7, 1, 40, 0, 22], [-100, 3, 3, 9, 41, -100, -100], [-100] * 7])
IDS = torch.tensor([[5, 8, 7, 1, 40, 0, 22], [4, 3, 3, 9, 41, 0, 0], [9, 9, 9, 9, 0, 0, 0]])


def fused(name: str = "Llama", *, bias: bool = False, head: dict[str, Any] | None = None, **config: Any) -> Any:
    model = build(name, **config)
    if bias:
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, len(WORDS) + 4))
    utils.add_fused_lm_head(model, **{"outputs": OUTPUTS, **(head or {})})
    return model


def call(model: Any, labels: Tensor = LABELS, **kwargs: Any) -> tuple[Any, list[Tensor]]:
    """What TRL's fused head gives, and the gradient of all of it."""
    output = model(IDS, labels=labels, fused_lm_head=True, **kwargs)
    loss = output.loss
    if output.entropy is not None:
        loss = loss + (output.entropy * torch.linspace(-1, 2, output.entropy.shape[1])).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return output, list(grads)


@pytest.mark.parametrize("options", [
    {"head": {"temperature": 0.7}}, {"bias": True}, {"name": "Gemma2", "final_logit_softcapping": 0.3},
    {"name": "Cohere", "logit_scale": 0.25}, {"name": "Granite", "logits_scaling": 4.0},
    {"head": {"outputs": ("log_probs",)}}, {"head": {"outputs": ("log_probs", "is_top1", "entropy")}},
], ids=str)  # fmt: skip
def test_the_heads_outputs(options: dict[str, Any], scored_rows: list[int]) -> None:
    model = fused(**options)
    wanted, grads = call(model)
    with ours.patch():
        found, our_grads = call(model)
    # No more than what is scored: theirs multiplies all 18 positions here.
    assert scored_rows == [int((LABELS[:, 1:] != -100).sum())] == [9]
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].requires_grad is value.requires_grad, name
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grads, grads, rtol=1e-4, atol=1e-5)


def test_shifted_labels_and_the_divisor(scored_rows: list[int]) -> None:
    model = fused()
    arguments = {"shift_labels": LABELS, "fused_lm_head": True, "num_items_in_batch": 30}
    wanted = model(IDS, **arguments)
    with ours.patch():
        found = model(IDS, **arguments)
    assert scored_rows == [9]
    torch.testing.assert_close(dict(found), dict(wanted), rtol=1e-5, atol=1e-5)


def test_nothing_to_score_still_has_a_gradient() -> None:
    model = fused()
    with ours.patch():
        output, grads = call(model, torch.full_like(LABELS, -100))
    assert output.loss.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_dtypes() -> None:
    model = fused()
    exact = model.double()(IDS, labels=LABELS, fused_lm_head=True)
    with ours.patch():
        found = model(IDS, labels=LABELS, fused_lm_head=True)
        assert {x.dtype for name, x in found.items() if name != "label_mask"} == {torch.float32, torch.bool}
        torch.testing.assert_close(dict(found), dict(exact), rtol=1e-5, atol=1e-5)
        model.bfloat16().lm_head.float()  # hidden states in bfloat16, as theirs casts the head to
        output, grads = call(model)
    assert output.log_probs.dtype == torch.float32
    assert {grad.dtype for grad in grads} == {torch.bfloat16, torch.float32}
    wanted, _ = call(model)
    torch.testing.assert_close(output.log_probs, wanted.log_probs, rtol=2e-2, atol=2e-2)


def test_a_sharded_head_is_gathered_again_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ZeRO-3: the weight is there within TRL's context alone."""
    model = fused(bias=True)
    wanted, grads = call(model)
    head = model.lm_head
    parts = {head.weight: head.weight.data, head.bias: head.bias.data}
    entered = []

    @contextmanager
    def gather(*parameters: Any) -> Iterator[None]:
        entered.append(len(parameters))
        for parameter in parameters:
            parameter.data = parts[parameter]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    for parameter in parts:
        parameter.ds_id = 0
        parameter.data = torch.empty(0)
    with ours.patch():
        found, our_grads = call(model)
    assert entered == [2, 2]
    assert head.weight.numel() == 0
    torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grads, grads, rtol=1e-4, atol=1e-5)


class TestPatch:
    def test_once_and_back(self, own: tuple[Any, ...]) -> None:
        ours.unpatch()
        ours.patch()
        patched = seam()
        assert not set(patched) & set(own)
        ours.patch()
        assert seam() == patched
        ours.unpatch()
        assert seam() == own
        ours.unpatch()

    def test_nested(self, own: tuple[Any, ...]) -> None:
        with ours.patch():
            patched = seam()
            with ours.patch():
                assert seam() == patched
            assert seam() == patched
        assert seam() == own
        ours.patch()
        with ours.patch():
            pass
        assert not set(seam()) & set(own)

    def test_back_after_an_error(self, own: tuple[Any, ...]) -> None:
        with pytest.raises(KeyError, match="mine"), ours.patch():
            raise KeyError("mine")
        assert seam() == own

    def test_what_replaced_it_since_is_not_lost(self, monkeypatch: pytest.MonkeyPatch, own: tuple[Any, ...]) -> None:
        ours.patch()
        with monkeypatch.context() as m:
            m.setattr(utils, "_use_triton", later := lambda device: False)
            with pytest.raises(RuntimeError, match="_use_triton was replaced again"):
                ours.unpatch()
            assert utils._use_triton is later
        ours.unpatch()
        assert seam() == own

    def test_other_devices_select_as_trl_does(self) -> None:
        with ours.patch():
            selects = {name: utils._use_triton(torch.device(name)) for name in ("cpu", "meta")}
        assert selects == {"cpu": True, "meta": False}


def changed(**parameters: Any) -> Any:
    """A Function like TRL's but for its parameters."""

    def forward(*args: Any) -> Any:
        raise AssertionError

    own = inspect.signature(utils._ChunkedLogProbFunction.forward)
    kept = {**own.parameters, **parameters}
    forward.__signature__ = own.replace(parameters=[x for x in kept.values() if x is not None])  # type: ignore
    return SimpleNamespace(forward=forward, apply=forward)


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch, own: tuple[Any, ...]) -> None:
    installed = trl.__version__
    outputs = inspect.Parameter("outputs", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=("entropy", "is_top1"))
    extra = inspect.Parameter("top_k", inspect.Parameter.KEYWORD_ONLY)
    for name, value, found in (
        ("_ChunkedLogProbFunction", changed(top_k=extra), "takes ctx, hidden, .*, top_k"),
        ("_ChunkedLogProbFunction", changed(bias=None), "takes ctx, hidden, weight, targets"),
        ("_ChunkedLogProbFunction", changed(outputs=outputs), r"gives \('entropy', 'is_top1'\)"),
        ("_ChunkedLogProbFunction", None, "lacks _ChunkedLogProbFunction"),
        ("add_fused_lm_head", lambda model: utils._use_triton, "does not use _ChunkedLogProbFunction"),
        ("add_fused_lm_head", None, "lacks add_fused_lm_head"),
    ):
        with monkeypatch.context() as m:
            m.setattr(utils, name, value)
            before = seam()
            with pytest.raises(NotImplementedError, match=rf"trl>=1\.15,<1\.17 .* installed is {installed}, .*{found}"):
                ours.patch()
            assert seam() == before
    for version in ("1.14.2", "1.17.0", "2.0"):
        with monkeypatch.context() as m:
            m.setattr(ours, "version", lambda name, version=version: version)
            with pytest.raises(NotImplementedError, match=rf"trl>=1\.15,<1\.17 .* installed is {version}"):
                ours.patch()
            assert seam() == own
    with monkeypatch.context() as m:
        m.delattr(utils, "_use_triton")
        m.setattr(utils, "add_fused_lm_head", lambda: (utils._ChunkedLogProbFunction, utils.maybe_gather_lm_head_ctx))
        with pytest.raises(NotImplementedError, match="does not use _use_triton"):
            ours.patch()
        m.setattr(ours, "version", lambda name: "1.15.0")  # which always selects
        with ours.patch():
            assert utils._ChunkedLogProbFunction is not own[0]
            assert not hasattr(utils, "_use_triton")


def test_importing_fastpref_imports_no_trl() -> None:
    code = "import fastpref.integrations.trl, sys; assert not {'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
