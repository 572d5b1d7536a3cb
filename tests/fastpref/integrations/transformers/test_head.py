"""Test which heads are supported, and how logits are scaled and capped."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpref
from fastpref import detach, reference
from fastpref.integrations.transformers import _head
from tests.fastpref.integrations.transformers.attached import (
    IDS,
    LABELS,
    PEFT_WARNINGS,
    assert_as_own_logits,
    assert_close,
    build,
    gradients,
    lora,
    traced_whole,
    with_lora,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = PEFT_WARNINGS

TRANSFORMED = ("Gemma2", "Cohere", "Granite", "HyperCLOVAX")


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_transform_left_out_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    theirs = reference.token_logprobs(model(IDS).logits, LABELS)
    monkeypatch.setattr(_head, "logit_transform", lambda config: {"logit_scale": 1.0, "softcap": None})
    with pytest.raises(NotImplementedError, match="something else"):
        fastpref.attach(model)(IDS, labels=LABELS, fastpref=True)
    detach(model)
    wrong = fastpref.attach(model, verify=False)(IDS, labels=LABELS, fastpref=True).logprobs
    assert (wrong - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("post", [lambda z: 1.1 * z, lambda z: z.clamp(max=900.0), lambda z: z[..., :60]])
def test_a_forward_that_does_more_is_seen_and_leaves_the_model_whole(post: Callable[[Tensor], Tensor]) -> None:
    model = build()
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.logits = post(output.logits)
        return output

    model.forward = forward
    fastpref.attach(model)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="something else"):
            model(IDS, labels=LABELS, fastpref=True)
    assert_close(model(IDS).logits, post(own(IDS).logits))
    assert detach(model).forward is forward


def text_over_vision(name: str, text: str, **options: Any) -> Any:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
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
        ("AyaVision", "cohere2", "logit_scale", 0.25),
        ("Cohere2Vision", "cohere2", "logit_scale", 0.25),
        ("LlavaNext", "granite", "logits_scaling", 4.0),
    ],
)
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


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_lora_on_the_head(options: dict[str, Any]) -> None:
    model = with_lora(**options).train()
    assert fastpref.attach(model) is model
    ours = assert_as_own_logits(model)
    assert model._fastpref.verify == ("lora_dropout" in options)
    trained = gradients(model, ours.logprobs)
    on_head = [value.abs().max().item() for name, value in trained.items() if "lm_head.lora_" in name]
    assert len(on_head) == (3 if "lora_bias" in options else 2)
    assert min(on_head) > 1e-3
    assert not any("base_layer" in name for name in trained)
    assert_as_own_logits(model.eval())
    assert not model._fastpref.verify
    assert_as_own_logits(copy.deepcopy(model))
    assert_as_own_logits(pickle.loads(pickle.dumps(model)))
    assert type(detach(model).get_base_model()) is transformers.Gemma2ForCausalLM


def test_lora_put_on_an_attached_model() -> None:
    model = with_lora(fastpref.attach(build("Gemma2", tie_word_embeddings=False)))
    assert "logprobs" in model(IDS, labels=LABELS, fastpref=True)._fields
    assert_as_own_logits(model)


def test_lora_chosen_disabled_and_merged() -> None:
    model = with_lora()
    model.add_adapter("two", lora("lm_head"))
    seen = [assert_as_own_logits(model)]
    model.set_adapter("two")
    seen.append(assert_as_own_logits(model))
    model.base_model.set_adapter(["default", "two"])
    seen.append(assert_as_own_logits(model))
    with model.disable_adapter():
        seen.append(assert_as_own_logits(model))
    model.merge_adapter(["two"])  # after which PEFT ignores the other adapter too
    seen.append(assert_as_own_logits(model))
    with model.disable_adapter():  # this unmerges
        assert_close(assert_as_own_logits(model).logprobs, seen[3].logprobs)
    assert_close(assert_as_own_logits(model).logprobs, seen[2].logprobs)
    for index, one in enumerate(seen):
        assert all((one.logprobs - other.logprobs).abs().max() > 1e-3 for other in seen[:index])


def test_small_lora_is_not_rounded_away() -> None:
    """Adding it to a bf16 weight would round most of it away. PEFT keeps LoRA's weights in float32."""
    model = with_lora(build("Gemma2", tie_word_embeddings=False).bfloat16(), targets=("lm_head",))
    head, cap = model.get_base_model().lm_head, model.config.final_logit_softcapping
    up, down = head.lora_B["default"].weight, head.lora_A["default"].weight
    assert up.dtype == torch.float32
    up.data.mul_(1e-3 / up.std())
    ours = fastpref.attach(model)(IDS, labels=LABELS, fastpref=True)
    hidden = ours.last_hidden_state.detach().double()

    def logprobs(weight: Tensor) -> Tensor:
        return reference.linear_token_logprobs(hidden, weight, LABELS, softcap=cap)

    base, delta = head.weight.double(), head.scaling["default"] * up.double() @ down.double()
    truth, rounded = logprobs(base + delta), logprobs((base + delta).bfloat16().double())
    assert 4 * (ours.logprobs - truth).abs().max() < (rounded - truth).abs().max()


@traced_whole
def test_compile_with_lora() -> None:
    model = fastpref.attach(with_lora(build(num_hidden_layers=1).float()), verify=False)
    torch._dynamo.reset()
    ours = torch.compile(model, fullgraph=True, backend="eager")(IDS, labels=LABELS, fastpref=True).logprobs
    theirs = reference.token_logprobs(model(IDS).logits, LABELS)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(model, ours), gradients(model, theirs))


def test_a_head_that_peft_trains_whole() -> None:
    model = with_lora(build(), targets=("q_proj",), modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(1.3)
    trained = assert_as_own_logits(model)
    with model.disable_adapter():
        assert (assert_as_own_logits(model).logprobs - trained.logprobs).abs().max() > 1e-3


def test_adapters_by_the_sequence() -> None:
    names = ["default", "two"]
    for on_head in ({}, {"targets": ("q_proj",), "modules_to_save": ["lm_head"]}):
        for chosen in (names, ["two", "two"]):
            model = with_lora(build(), **on_head)
            model.add_adapter("two", model.peft_config["default"])
            with pytest.raises(NotImplementedError, match="adapter_names"):
                fastpref.attach(model)(IDS, labels=LABELS, fastpref=True, adapter_names=chosen)
    model = with_lora(build(), targets=("q_proj",))
    model.add_adapter("two", lora("q_proj"))
    ours = fastpref.attach(model)(IDS, labels=LABELS, fastpref=True, adapter_names=names).logprobs
    assert_close(ours, reference.token_logprobs(model(IDS, adapter_names=names).logits, LABELS))


@pytest.mark.parametrize("tied", [True, False])
def test_peft_trains_some_tokens(tied: bool) -> None:
    """PEFT trains rows of a copy of the weight, also for a tied head."""
    model = build("Llama", tie_word_embeddings=tied)
    config = lora("q_proj", trainable_token_indices=[3, 9, 60])
    model = peft.get_peft_model(model, config).eval()
    model.model.model.norm.weight.requires_grad_()  # something to train when no adapter is enabled
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


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def refused_dora(model: Any) -> None:
    with_lora(model, use_dora=True)


def refused_variant(model: Any) -> None:
    with_lora(model)
    model.lm_head.lora_variant["default"] = object()


def refused_adapter(model: Any) -> None:
    peft.get_peft_model(model, peft.AdaLoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM", total_step=9))


def refused_base(model: Any) -> None:
    model.lm_head = Scaled(16, 61)
    with_lora(model)


def refused_linear(model: Any) -> None:
    model.lm_head = Scaled(16, 61, bias=False)


def refused_parameter(model: Any) -> None:
    model.lm_head.register_parameter("gain", nn.Parameter(torch.ones(61)))


@pytest.mark.parametrize(
    "change", [refused_dora, refused_variant, refused_adapter, refused_base, refused_linear, refused_parameter]
)
def test_refused_heads(change: Callable[[Any], None]) -> None:
    model, late = build(), fastpref.attach(build())
    for changed in (model, late):
        change(changed)
    with pytest.raises(NotImplementedError, match="lm_head"):
        fastpref.attach(model)
    with pytest.raises(NotImplementedError, match="lm_head"):
        late(IDS, labels=LABELS, fastpref=True)


def test_quantised_weight_is_refused() -> None:
    model = fastpref.attach(build(), verify=False)
    del model.lm_head.weight
    model.lm_head.weight = torch.zeros(61, 16, dtype=torch.int8)
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        model(IDS, labels=LABELS, fastpref=True)


@pytest.mark.parametrize("part", ["", "base_layer"])
def test_a_patched_forward_of_the_head_is_refused(part: str) -> None:
    model = fastpref.attach(build() if part == "" else with_lora(build()), verify=False)
    module = model.get_output_embeddings().get_submodule(part)
    forward = module.forward
    module.forward = lambda hidden: 2 * forward(hidden)
    with pytest.raises(NotImplementedError, match=r"lm_head.*must have the forward of its class"):
        model(IDS, labels=LABELS, fastpref=True)
