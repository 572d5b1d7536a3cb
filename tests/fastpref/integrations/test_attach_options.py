"""Keywords of a scored call, transforms that are stated to `attach`, and tokens that PEFT trains."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch

import fastpref
from fastpref import reference
from fastpref.integrations import _call
from tests.fastpref.integrations.attached import IDS, LABELS, assert_as_own_logits, assert_close, build, gradients, lora

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
# PEFT reads what it says.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


SHIFTED = torch.cat([LABELS[:, 1:], torch.full((2, 1), -100)], 1)


def test_shift_labels_are_scored_as_they_are() -> None:
    """Context parallelism gives each rank a shard of the sequence, and of the labels that were shifted before."""
    model = fastpref.attach(build())
    logits = model(IDS).logits
    expected = reference.token_logprobs(logits, SHIFTED, shift=False)
    for labels in ({}, {"labels": LABELS}, {"shift": False}):
        assert_close(model(IDS, shift_labels=SHIFTED, fastpref=True, **labels).logprobs, expected)
    summed = model(IDS, shift_labels=SHIFTED, labels=LABELS, fastpref=True, reduction="sum").logprobs
    assert_close(summed, reference.sequence_logprobs(logits, LABELS))
    score = functools.partial(fastpref.linear_sequence_logprobs, reduction="mean")
    assert_close(
        model(IDS, shift_labels=SHIFTED, fastpref=score).scored,
        reference.sequence_logprobs(logits, LABELS, reduction="mean"),
    )
    with pytest.raises(ValueError, match="shifted already; got shift=True"):
        model(IDS, shift_labels=SHIFTED, fastpref=True, shift=True)


@pytest.mark.parametrize("function", [True, fastpref.linear_token_logprobs])
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("num_items_in_batch", torch.tensor(3)), ("logits_to_keep", 3), ("logits_to_keep", torch.tensor([1, 2])),
        ("num_logits_to_keep", 1), ("skip_logits", True), ("softcap", 3.0), ("logit_scale", 0.5),
        ("inplace_backward", True),
    ],
)  # fmt: skip
def test_keywords_that_bear_on_the_loss_are_refused(function: Any, keyword: str, value: Any) -> None:
    model = fastpref.attach(build())
    with pytest.raises(ValueError, match=f"takes no {keyword}: .*; got {keyword}="):
        model(IDS, labels=LABELS, fastpref=function, **{keyword: value})


def test_keywords_at_rest_are_taken() -> None:
    model = fastpref.attach(build())
    expected = model(IDS, labels=LABELS, fastpref=True).logprobs
    ours = model(IDS, labels=LABELS, fastpref=True, logits_to_keep=0, num_items_in_batch=None, shift_labels=None)
    assert_close(ours.logprobs, expected)


def test_every_keyword_of_the_models_own_loss_is_used_or_refused() -> None:
    loss = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    parameters = inspect.signature(loss).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    known = {*_call._REFUSED, *_call._SCORING, "labels", "shift_labels"}
    assert names - {"logits", "vocab_size"} <= known


@pytest.mark.parametrize("keyword", ["skip_logits", "inplace_backward"])
def test_a_keyword_that_asks_for_nothing_is_taken(keyword: str) -> None:
    model = fastpref.attach(build())
    expected = model(IDS, labels=LABELS, fastpref=True).logprobs
    for value in (False, None):
        assert_close(model(IDS, labels=LABELS, fastpref=True, **{keyword: value}).logprobs, expected)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("value", [LABELS.tolist(), LABELS.float(), "labels"])
def test_labels_are_a_tensor(name: str, value: Any) -> None:
    model = fastpref.attach(build())
    with pytest.raises(TypeError, match=rf"^{name} must be an int64 or int32 tensor"):
        model(IDS, fastpref=True, **{name: value})


@pytest.mark.parametrize("value", ["", 0, ["sum"]])
def test_a_wrong_reduction_is_refused(value: Any) -> None:
    model = fastpref.attach(build())
    with pytest.raises((TypeError, ValueError), match=r"^reduction must be one of"):
        model(IDS, labels=LABELS, fastpref=True, reduction=value)


def text_over_vision(name: str, text: str, **options: Any) -> Any:
    sizes = {
        "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    vision["model_type"] = "clip_vision_model" if name == "LlavaNext" else "siglip_vision_model"
    config = kind(text_config={"model_type": text, **sizes, **options}, vision_config=vision)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("name", "text", "option", "value"),
    [
        ("AyaVision", "cohere2", "logit_scale", 0.25), ("Cohere2Vision", "cohere2", "logit_scale", 0.25),
        ("LlavaNext", "granite", "logits_scaling", 4.0),
    ],
)  # fmt: skip
def test_a_scale_that_the_forward_leaves_out_is_stated(name: str, text: str, option: str, value: float) -> None:
    model = fastpref.attach(text_over_vision(name, text, **{option: value}))
    with pytest.raises(NotImplementedError, match=r"attach\(model, logit_scale="):
        model(IDS, labels=LABELS, fastpref=True)
    with pytest.raises(NotImplementedError, match=r"logit_scale=0\.5"):
        fastpref.attach(model, logit_scale=0.5)(IDS, labels=LABELS, fastpref=True)
    fastpref.attach(model, logit_scale=1.0)
    assert_as_own_logits(model)
    assert not model._fastpref.verify


def test_a_transform_is_stated() -> None:
    model = fastpref.attach(build("Gemma2"))
    assert_as_own_logits(model)
    model.config.final_logit_softcapping = 5.0
    with pytest.raises(NotImplementedError, match=r"softcap=0\.3"):
        fastpref.attach(model, softcap=0.3)(IDS, labels=LABELS, fastpref=True)
    fastpref.attach(model, softcap=5)
    assert_as_own_logits(model)
    own = model(IDS, labels=LABELS, fastpref=True).logprobs
    model.config.final_logit_softcapping = None
    fastpref.attach(model, softcap=float("inf"))
    assert_as_own_logits(model)
    assert (model(IDS, labels=LABELS, fastpref=True).logprobs - own).abs().max() > 1e-3


@pytest.mark.parametrize("value", ["0.1", -1.0, 0.0, float("nan"), [1.0], True])
@pytest.mark.parametrize("name", ["logit_scale", "softcap"])
def test_a_wrong_transform_is_refused(name: str, value: Any) -> None:
    model = build()
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        fastpref.attach(model, **{name: value})
    assert not hasattr(model, "_fastpref")


def test_stating_one_part_of_a_transform_keeps_the_other() -> None:
    model = fastpref.attach(build(), logit_scale=2.0, softcap=5.0, verify=False)
    expected = reference.token_logprobs(model(IDS).logits, LABELS, logit_scale=3.0, softcap=5.0)
    fastpref.attach(model, logit_scale=3.0, verify=False)
    assert_close(model(IDS, labels=LABELS, fastpref=True).logprobs, expected)
    fastpref.attach(model)
    assert_close(model(IDS, labels=LABELS, fastpref=True).logprobs, expected)
    fastpref.attach(model, softcap=5.0)
    with pytest.raises(NotImplementedError, match="something else"):
        model(IDS, labels=LABELS, fastpref=True)


@pytest.mark.parametrize("value", ["no", None, 1])
def test_verify_is_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^verify must be True or False"):
        fastpref.attach(build(), verify=value)


@pytest.mark.parametrize("tied", [True, False])
def test_peft_trains_some_tokens(tied: bool) -> None:
    """PEFT puts the rows of tokens that it trains into a copy of the weight, of a tied head too."""
    model = build("Llama", tie_word_embeddings=tied)
    config = lora("q_proj", trainable_token_indices=[3, 9, 60])
    model = peft.get_peft_model(model, config).eval()
    model.model.model.norm.weight.requires_grad_()  # something to train where no adapter is on
    deltas = [value for name, value in model.named_parameters() if "trainable_tokens_delta" in name]
    for delta in deltas:
        delta.data.add_(torch.randn_like(delta))
    fastpref.attach(model)
    ours = assert_as_own_logits(model)
    trained = gradients(model, ours.logprobs)
    assert any("trainable_tokens_delta" in name and value.abs().max() > 1e-3 for name, value in trained.items())
    with model.disable_adapter():
        assert (assert_as_own_logits(model).logprobs - ours.logprobs).abs().max() > 1e-3
    model.merge_adapter()
    assert_close(assert_as_own_logits(model).logprobs, ours.logprobs)


def test_peft_trains_some_tokens_of_the_head_alone() -> None:
    model = build("Llama")
    model = peft.get_peft_model(
        model, peft.TrainableTokensConfig(target_modules=["lm_head"], token_indices=[3, 9], task_type="CAUSAL_LM")
    ).eval()
    fastpref.attach(model)
    ours = assert_as_own_logits(model)
    assert all("lm_head" in name for name in gradients(model, ours.logprobs))
