"""Calls of attached models that threads, exceptions and the scoring function itself could disturb; hooks; keywords."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpref
from fastpref import reference
from fastpref.integrations import _call
from tests.fastpref.integrations.attached import (
    IDS,
    LABELS,
    assert_as_own_logits,
    assert_close,
    build,
    gradients,
    lora,
    with_lora,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT reads it


def states(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what every module holds, each dict copied, so that any change of it shows."""

    def held(value: Any) -> Any:
        return list(value.items()) if isinstance(value, dict) else value

    return {name: {key: held(value) for key, value in vars(module).items()} for name, module in model.named_modules()}


def assert_unchanged(model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
    after = states(model)
    assert after.keys() == before.keys()
    for name, held in before.items():
        assert after[name].keys() == held.keys(), name
        for key, value in held.items():
            same = after[name][key] is value or (isinstance(value, list) and len(value) == len(after[name][key]))
            assert same or key == "_fastpref", f"{name}.{key}"


@pytest.mark.parametrize("make", [build, lambda: with_lora(build())], ids=["plain", "LoRA"])
def test_threads_score_and_make_logits_with_one_model(make: Callable[[], Any]) -> None:
    model = fastpref.attach(make())
    inputs = [IDS.roll(shift, 1) for shift in range(4)]
    logits = [model(ids).logits.detach() for ids in inputs]
    expected = [reference.token_logprobs(own, LABELS) for own in logits]
    start = threading.Barrier(4, timeout=600)

    def run(worker: int) -> list[Tensor]:
        start.wait()
        found = []
        for step in range(30):
            if (worker + step) % 2:
                found.append(model(inputs[worker]).logits.detach())
            else:
                found.append(model(inputs[worker], labels=LABELS, fastpref=True).logprobs.detach())
        return found

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, range(4)))
    for worker, found in enumerate(results):
        for step, values in enumerate(found):
            assert_close(values, logits[worker] if (worker + step) % 2 else expected[worker])


def test_plain_and_scored_calls_within_each_other() -> None:
    """All heads wait for each other, so that every call is in its head while every other one is."""
    model = fastpref.attach(build())
    logits = model(IDS).logits
    meet = threading.Barrier(3, timeout=600)
    model.lm_head.register_forward_pre_hook(lambda module, args: (meet.wait(), None)[1])
    calls = [{}, {"labels": LABELS, "fastpref": True}, {"labels": LABELS, "fastpref": True, "temperature": 0.5}]
    with ThreadPoolExecutor(3) as threads:
        plain, scored, warm = threads.map(lambda options: model(IDS, **options)[0], calls)
    assert_close(plain, logits)
    assert_close(scored, reference.token_logprobs(logits, LABELS))
    assert_close(warm, reference.token_logprobs(logits, LABELS, temperature=0.5))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("make", [build, lambda: with_lora(build())], ids=["plain", "LoRA"])
def test_an_exception_leaves_the_model_as_it_was(make: Callable[[], Any], error: type[BaseException]) -> None:
    model = fastpref.attach(make())
    logits, before = model(IDS).logits, states(model)

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        assert_unchanged(model, before)  # nor does it change within the call
        raise error("from the scoring function")

    with pytest.raises(error, match="from the scoring function"):
        model(IDS, labels=LABELS, fastpref=fail)
    assert_unchanged(model, before)
    assert_close(model(IDS).logits, logits)
    assert_close(model(IDS, labels=LABELS, fastpref=True).logprobs, reference.token_logprobs(logits, LABELS))
    assert_unchanged(model, before)


def around_a_method(model: Any) -> Callable[..., Any]:
    own = model.forward
    return lambda *args, **kwargs: own(*args, **kwargs)


def as_trl(model: Any) -> Callable[..., Any]:
    """A method whose function holds the forward that it replaces."""
    own = model.forward

    def forward(self: Any, *args: Any, extra: bool = False, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if not extra else self

    return MethodType(forward, model)


def as_accelerate(model: Any) -> Callable[..., Any]:
    model._old_forward = model.forward
    return functools.update_wrapper(functools.partial(lambda module, *a, **k: module._old_forward(*a, **k), model), own)


def around_the_model(model: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: type(model)._own_class.forward(model, *args, **kwargs)


def own(*args: Any, **kwargs: Any) -> None:
    """A forward for `functools.update_wrapper` to look at."""


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("patch", [around_a_method, as_trl, as_accelerate, around_the_model])
def test_a_forward_patched_before_attach_is_run(patch: Callable[[Any], Any], nested: bool) -> None:
    model = build()
    model.forward = forward = patch(model)
    if nested:
        model.forward = forward = around_a_method(model)
    fastpref.attach(model)
    before = states(model)
    assert_as_own_logits(model)
    assert_unchanged(model, before)
    assert fastpref.detach(model).forward is forward


class Opaque:
    def __init__(self, model: Any) -> None:
        self.own = model.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


@pytest.mark.parametrize("verify", [False, True])
def test_a_forward_that_cannot_be_followed_is_refused(verify: bool) -> None:
    model = build()
    model.forward = Opaque(model)
    logits = model(IDS).logits
    fastpref.attach(model, verify=verify)
    with pytest.raises(NotImplementedError, match=r"replaced before attach by .*Opaque"):
        model(IDS, labels=LABELS, fastpref=True)
    assert_close(model(IDS).logits, logits)


def test_a_scoring_function_may_call_the_model() -> None:
    model = fastpref.attach(build())
    logits = model(IDS).logits
    expected = reference.token_logprobs(logits, LABELS)

    def score(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **transform: Any) -> Tensor:
        assert_close(model(IDS).logits, logits)
        within = model(IDS, labels=labels, fastpref=True).logprobs
        return within - fastpref.linear_token_logprobs(hidden, weight, labels, bias, **transform)

    scored = model(IDS, labels=LABELS, fastpref=score).scored
    assert_close(scored, torch.zeros_like(expected))
    assert_close(model(IDS, labels=LABELS, fastpref=True).logprobs, expected)


def test_a_head_inside_another_model_is_scored() -> None:
    """A head two modules down: the copy of the model has copies of the modules on the way, with their hooks."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    inner = transformers.OPTConfig(
        **sizes, ffn_dim=16, max_position_embeddings=32, word_embed_proj_dim=16, do_layer_norm_before=True
    )
    config = transformers.Blip2Config(
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        qformer_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        text_config=inner.to_dict(),
    )
    model = transformers.Blip2ForConditionalGeneration(config).language_model.double().eval()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, ids: Tensor) -> Any:
            return self.inner(ids)

    outer, seen = Outer(), []
    logits = outer(IDS).logits
    model.register_forward_hook(lambda module, args, output: seen.append(module))
    fastpref.attach(outer)
    before = states(outer)
    ours = outer(IDS, labels=LABELS, fastpref=True).logprobs
    assert_close(ours, reference.token_logprobs(logits, LABELS))
    assert seen == [model]
    assert_unchanged(outer, before)


def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output / 2


def halve_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.div_(2)


def mask_padding(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.cat([output[..., :60], torch.full_like(output[..., 60:], -torch.inf)], -1)


def clamp(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.clamp(-50, 50)


def halve_with_kwargs(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output / 2


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("hook", [halve, halve_in_place, mask_padding, clamp, halve_with_kwargs])
def test_a_hook_that_changes_the_logits_is_refused(hook: Callable[..., Any], late: bool, verify: bool) -> None:
    model = fastpref.attach(build(), verify=verify)
    if late:
        model(IDS, labels=LABELS, fastpref=True)
    handle = model.lm_head.register_forward_hook(hook, with_kwargs=hook is halve_with_kwargs)
    for stats in ((), ("entropy",)):
        with pytest.raises(NotImplementedError, match=f"(?s)forward hook .*{hook.__name__}.*changes the logits"):
            model(IDS, labels=LABELS, fastpref=True, stats=stats)
    handle.remove()
    assert_as_own_logits(model)


def upcast(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


def upcast_with_kwargs(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    assert kwargs == {}
    return output.float()


@pytest.mark.parametrize("with_kwargs", [False, True])
@pytest.mark.parametrize("stats", [(), ("entropy", "lse")])
def test_a_hook_that_casts_the_logits_is_followed(with_kwargs: bool, stats: tuple[str, ...]) -> None:
    model = fastpref.attach(build().bfloat16())
    hook = upcast_with_kwargs if with_kwargs else upcast
    model.lm_head.register_forward_hook(hook, with_kwargs=with_kwargs, always_call=True)
    assert model(IDS).logits.dtype == torch.float32
    for _ in range(2):
        ours = model(IDS, labels=LABELS, fastpref=True, stats=stats)
        hidden = model.model(IDS).last_hidden_state
        theirs = reference.token_logprobs(hidden.float() @ model.lm_head.weight.float().T, LABELS)
        torch.testing.assert_close(ours[0], theirs)


def test_a_hook_that_casts_serves_a_loss() -> None:
    model = fastpref.attach(build())
    model.lm_head.register_forward_hook(upcast)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **transform: Any) -> Any:
        return fastpref.linear_dpo_loss(hidden, weight, labels, bias=bias, loss_type="cpo", **transform)

    ours = model(IDS, labels=LABELS, fastpref=loss)
    theirs = reference.sequence_logprobs(model(IDS).logits, LABELS)
    torch.testing.assert_close(ours.chosen_logps, theirs[:1], check_dtype=False)


def test_a_hook_that_reads_sees_the_hidden_states() -> None:
    model, seen = fastpref.attach(build()), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output.shape)))
    ours = model(IDS, labels=LABELS, fastpref=True)
    ((module, hidden, shape),) = seen
    assert module is model.lm_head
    assert_close(hidden, ours.last_hidden_state)
    assert shape[-1] == 61


@pytest.mark.parametrize("part", ["base_layer", "lora_B.default"])
def test_hooks_inside_lora_on_the_head(part: str) -> None:
    """LLaMA-Factory upcasts the head before PEFT wraps it, so its hook is on the base layer."""
    model = with_lora(build())
    module = model.get_base_model().lm_head.get_submodule(part)
    module.register_forward_hook(lambda module, args, output: output.double())
    assert_as_own_logits(fastpref.attach(model))
    module.register_forward_hook(halve)
    with pytest.raises(NotImplementedError, match="changes the logits"):
        model(IDS, labels=LABELS, fastpref=True)


def test_hooks_on_a_head_that_peft_trains_whole() -> None:
    model = with_lora(build(), targets=("q_proj",), modules_to_save=["lm_head"])
    copied = model.get_base_model().lm_head.modules_to_save["default"]
    copied.register_forward_hook(lambda module, args, output: output.double())
    assert_as_own_logits(fastpref.attach(model))
    copied.register_forward_hook(halve)
    with pytest.raises(NotImplementedError, match="changes the logits"):
        model(IDS, labels=LABELS, fastpref=True)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("part", ["", "base_layer", "lora_B.default"])
def test_a_backward_hook_on_the_head_is_refused(register: str, part: str) -> None:
    model = build() if part == "" else with_lora(build())
    head = fastpref.attach(model).get_output_embeddings()
    handle = getattr(head.get_submodule(part), register)(lambda *args: None)
    with pytest.raises(NotImplementedError, match=r"backward hook.*gradient of logits"):
        model(IDS, labels=LABELS, fastpref=True)
    model(IDS).logits.sum().backward()
    handle.remove()
    assert_as_own_logits(model)


@pytest.mark.parametrize("part", ["", "base_layer"])
def test_a_patched_forward_of_the_head_is_refused(part: str) -> None:
    model = fastpref.attach(build() if part == "" else with_lora(build()), verify=False)
    module = model.get_output_embeddings().get_submodule(part)
    forward = module.forward
    module.forward = lambda hidden: 2 * forward(hidden)
    with pytest.raises(NotImplementedError, match=r"lm_head.*must have the forward of its class"):
        model(IDS, labels=LABELS, fastpref=True)


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
