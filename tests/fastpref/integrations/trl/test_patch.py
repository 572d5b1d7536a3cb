"""Train with TRL's trainers with and without `patch()`: every loss, every logged metric, the weights at the end."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastpref.integrations import _replace
from fastpref.integrations import trl as ours
from tests.fastpref.integrations.trl.runs import WORDS, Run, assert_trained_alike, build, train

trl = pytest.importorskip("trl", minversion="1.16")
peft = pytest.importorskip("peft")
utils = pytest.importorskip("trl.trainer.utils")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL and PEFT warn of things that are not tested here

REPLACED = ("_ChunkedLogProbFunction", "_use_triton")
OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def own() -> Iterator[tuple[Any, ...]]:
    """Return TRL's objects, and check that they are back at the end."""
    before = objects()
    yield before
    ours.unpatch()
    assert objects() == before


def objects() -> tuple[Any, ...]:
    return tuple(getattr(utils, name) for name in REPLACED)


def compare(kind: str, folder: Path, scored_rows: list[int], **options: Any) -> Run:
    """Train with and without the patch, compare, and return the run without it."""
    wanted = train(kind, folder, **options)
    assert not scored_rows
    found = train(kind, folder, before=ours.patch, **options)
    assert len(scored_rows) >= 3
    assert_trained_alike(found, wanted, 1e-5)
    assert len(found.metrics) == len(wanted.metrics) >= 3
    for a, b in zip(found.metrics, wanted.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5, nan_ok=True)
    return wanted


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid", "gradient_checkpointing": True},
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "ipo"},
        {"loss_type": "apo_zero", "precompute_ref_log_probs": True},
        {"use_weighting": True},
        {"ld_alpha": 0.4},
    ],
    ids=["sigmoid", "list", "ipo", "precomputed", "wpo", "ld"],
)
def test_dpo(options: dict[str, Any], tmp_path: Path, scored_rows: list[int]) -> None:
    wanted = compare("DPO", tmp_path, scored_rows, beta=0.5, **options)
    assert {"entropy", "logits/chosen", "mean_token_accuracy"} <= wanted.metrics[0].keys()


@pytest.mark.parametrize("options", [{}, {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.5}], ids=str)
def test_kto(options: dict[str, Any], tmp_path: Path, scored_rows: list[int]) -> None:
    compare("KTO", tmp_path, scored_rows, beta=0.5, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "dft"},
        {"completion_only_loss": False},
    ],
    ids=["nll", "dft", "prompt too"],
)
def test_sft(options: dict[str, Any], tmp_path: Path, scored_rows: list[int]) -> None:
    wanted = compare("SFT", tmp_path, scored_rows, **options)
    assert {"entropy", "mean_token_accuracy"} <= wanted.metrics[0].keys()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "entropy_coef": 0.1, "num_iterations": 2},
        {"cast_lm_head_to_fp32": True, "beta": 0.1},
    ],
    ids=["entropy", "float32 head, KL"],
)
def test_grpo(options: dict[str, Any], tmp_path: Path, scored_rows: list[int]) -> None:
    build().save_pretrained(tmp_path / "model")  # TRL loads its reference from there
    arguments = {"model": str(tmp_path / "model")}
    dtype = {"dtype": "bfloat16" if "cast_lm_head_to_fp32" in options else "float32"}
    if dtype["dtype"] == "float32":
        compare("GRPO", tmp_path, scored_rows, arguments=arguments, model_init_kwargs=dtype, **options)
        return
    # Both multiply the head in float32, but the layers before it and the weights round to bfloat16.
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
    assert found.losses != wanted.losses  # TRL rounds the logits
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
    """Return the output of TRL's fused head, and the gradient of all of it."""
    output = model(IDS, labels=labels, fused_lm_head=True, **kwargs)
    loss = output.loss
    if output.entropy is not None:
        loss = loss + (output.entropy * torch.linspace(-1, 2, output.entropy.shape[1])).sum()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return output, list(grads)


@pytest.mark.parametrize(
    "options",
    [
        {"head": {"temperature": 0.7}},
        {"bias": True},
        {"name": "Gemma2", "final_logit_softcapping": 0.3},
        {"name": "Cohere", "logit_scale": 0.25},
        {"name": "Granite", "logits_scaling": 4.0},
        {"head": {"outputs": ("log_probs",)}},
        {"head": {"outputs": ("log_probs", "is_top1", "entropy")}},
    ],
    ids=str,
)
def test_the_heads_outputs(options: dict[str, Any], scored_rows: list[int]) -> None:
    model = fused(**options)
    wanted, grads = call(model)
    with ours.patch():
        found, our_grads = call(model)
    # Only scored positions are multiplied; TRL multiplies all 18 positions on a CPU.
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
        model.bfloat16().lm_head.float()  # hidden states in bfloat16, to which TRL casts the head
        output, grads = call(model)
    assert output.log_probs.dtype == torch.float32
    assert {grad.dtype for grad in grads} == {torch.bfloat16, torch.float32}
    wanted, _ = call(model)
    torch.testing.assert_close(output.log_probs, wanted.log_probs, rtol=2e-2, atol=2e-2)


def test_a_sharded_head_is_gathered_again_in_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ZeRO-3, the weight exists inside TRL's context only."""
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
        patched = objects()
        assert not set(patched) & set(own)
        ours.patch()
        assert objects() == patched
        ours.unpatch()
        assert objects() == own
        ours.unpatch()

    def test_nested(self, own: tuple[Any, ...]) -> None:
        with ours.patch():
            patched = objects()
            with ours.patch():
                assert objects() == patched
            assert objects() == patched
        assert objects() == own
        ours.patch()
        with ours.patch():
            pass
        assert not set(objects()) & set(own)

    def test_mode(self, monkeypatch: pytest.MonkeyPatch, own: tuple[Any, ...]) -> None:
        """mode="recompute" keeps no exponentials for the backward; a second patch with another mode raises."""
        kept, backward = [], torch.ops.fastpref.linear_logprobs_backward

        def counted(*args: Any) -> Any:
            kept.append(args[8] is not None)
            return backward(*args)

        monkeypatch.setattr(torch.ops.fastpref, "linear_logprobs_backward", counted)
        hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(19, 8)
        for mode in ("recompute", "save"):
            with ours.patch(mode=mode):
                apply = getattr(utils, REPLACED[0]).apply
                apply(hidden, weight, None, torch.arange(10).view(2, 5), 1.0, 4, None, 1.0, ())[0].sum().backward()
                with pytest.raises(ValueError, match="unpatch first"):
                    ours.patch()
        assert kept == [False, True]
        with pytest.raises(ValueError, match="mode must be one of"):
            ours.patch(mode="lean")

    def test_back_after_an_error(self, own: tuple[Any, ...]) -> None:
        with pytest.raises(KeyError, match="mine"), ours.patch():
            raise KeyError("mine")
        assert objects() == own

    def test_what_replaced_it_since_is_not_lost(self, monkeypatch: pytest.MonkeyPatch, own: tuple[Any, ...]) -> None:
        ours.patch()
        with monkeypatch.context() as m:
            m.setattr(utils, "_use_triton", later := lambda device: False)
            with pytest.raises(RuntimeError, match="_use_triton was replaced again"):
                ours.unpatch()
            assert utils._use_triton is later
        ours.unpatch()
        assert objects() == own

    def test_other_devices_select_as_trl_does(self) -> None:
        with ours.patch():
            selects = {name: utils._use_triton(torch.device(name)) for name in ("cpu", "meta")}
        assert selects == {"cpu": True, "meta": False}


def changed(**parameters: Any) -> Any:
    """Return a Function like TRL's with other parameters."""

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
        ("_ChunkedLogProbFunction", changed(top_k=extra), r"takes \(ctx, hidden, .*, top_k\), not \(ctx, "),
        ("_ChunkedLogProbFunction", changed(bias=None), r"takes \(ctx, hidden, weight, targets.*, not \(ctx, "),
        (
            "_ChunkedLogProbFunction",
            changed(outputs=outputs),
            r"outputs=\('entropy', 'is_top1'\)\), not .*outputs=\('entropy', 'log_sum",
        ),
        ("_ChunkedLogProbFunction", None, r"lacks trl\.trainer\.utils\._ChunkedLogProbFunction"),
        ("add_fused_lm_head", lambda model: utils._use_triton, "does not use _ChunkedLogProbFunction"),
        ("add_fused_lm_head", None, r"lacks trl\.trainer\.utils\.add_fused_lm_head"),
    ):
        with monkeypatch.context() as m:
            m.setattr(utils, name, value)
            before = objects()
            with pytest.raises(NotImplementedError, match=rf"trl>=1\.15,<1\.17, .* found trl {installed}, .*{found}"):
                ours.patch()
            assert objects() == before
    for version in ("1.14.2", "1.17.0", "2.0"):
        with monkeypatch.context() as m:
            m.setattr(_replace, "version", lambda name, version=version: version)
            with pytest.raises(NotImplementedError, match=rf"trl>=1\.15,<1\.17, .* found trl {version}"):
                ours.patch()
            assert objects() == own
    with monkeypatch.context() as m:
        m.delattr(utils, "_use_triton")
        m.setattr(utils, "add_fused_lm_head", lambda: (utils._ChunkedLogProbFunction, utils.maybe_gather_lm_head_ctx))
        with pytest.raises(NotImplementedError, match="does not use _use_triton"):
            ours.patch()
        m.setattr(_replace, "version", lambda name: "1.15.0")  # it always selects
        with ours.patch():
            assert utils._ChunkedLogProbFunction is not own[0]
            assert not hasattr(utils, "_use_triton")


def test_importing_fastpref_imports_no_trl() -> None:
    code = "import fastpref.integrations.trl, sys; assert not {'trl', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
