"""Test hooks on the head of an attached model: which run, with which arguments, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpref
from fastpref import reference
from tests.fastpref.integrations.transformers.attached import (
    IDS,
    LABELS,
    PEFT_WARNINGS,
    assert_as_own_logits,
    assert_close,
    build,
    with_lora,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = PEFT_WARNINGS


def managing(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that looks like one of DeepSpeed's, which gather and release a module's weights."""
    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    return hook


def test_head_hooks_run_around_the_log_probs() -> None:
    """As under ZeRO-3, the weight exists only between the head's hooks."""
    model = fastpref.attach(build())
    expected = model(IDS, labels=LABELS, fastpref=True, stats=("lse",))
    weight, seen = model.lm_head.weight.data, []

    def gather(module: nn.Module, args: Any) -> None:
        assert module is model.lm_head  # FSDP2 tracks the modules that its hooks are called with
        module.weight.data = weight

    def release(module: nn.Module, args: Any, output: Any) -> None:
        assert module is model.lm_head
        seen.append(output)
        module.weight.data = torch.empty(0, dtype=weight.dtype)

    model.lm_head.register_forward_pre_hook(gather)
    model.lm_head.register_forward_hook(managing(release))
    model.lm_head.weight.data = torch.empty(0, dtype=weight.dtype)
    with torch.no_grad():
        ours = model(IDS, labels=LABELS, fastpref=True, stats=("lse",))
    assert_close(ours.logprobs, expected.logprobs)
    assert len(seen) == 1
    assert seen[0].logprobs is ours.logprobs
    assert len(model.lm_head._forward_hooks) == 1


def test_a_managing_hook_that_replaces_the_log_probs_is_followed() -> None:
    """ZeRO-3 replaces every output by a new tensor, whose gradient gathers the weight again."""
    model = fastpref.attach(build())
    model.lm_head.register_forward_hook(managing(lambda module, args, output: 2 * output))
    ours = model(IDS, labels=LABELS, fastpref=True).logprobs
    assert_close(ours, 2 * reference.token_logprobs(F.linear(model.model(IDS)[0], model.lm_head.weight), LABELS))


def test_accelerate_hook_on_the_head_runs() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Gather(hooks.ModelHook):
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            module.weight.data = weight
            return args, kwargs

    model = build()
    expected = reference.token_logprobs(model(IDS).logits, LABELS)
    weight = model.lm_head.weight.data
    model.lm_head.weight.data = torch.empty(0, dtype=weight.dtype)
    hooks.add_hook_to_module(model.lm_head, Gather())
    kept = model.lm_head._old_forward
    assert_close(fastpref.attach(model)(IDS, labels=LABELS, fastpref=True).logprobs, expected)
    assert model.lm_head._old_forward == kept


def test_lora_hooks_run() -> None:
    model, seen = with_lora(), []
    for name, module in model.get_base_model().lm_head.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    fastpref.attach(model, verify=False)(IDS, labels=LABELS, fastpref=True)
    wanted = {"", "base_layer", "lora_A.default", "lora_B.default"}
    assert sorted(wanted) == sorted(name for name in seen if name in wanted)


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


@pytest.mark.parametrize("part", ["base_layer", "lora_B.default"])
def test_a_pre_hook_inside_lora_is_refused(part: str) -> None:
    """It would change the hidden states of all parts of LoRA."""
    model = fastpref.attach(with_lora(build()), verify=False)
    module = model.get_base_model().lm_head.get_submodule(part)
    handle = module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.raises(NotImplementedError, match=r"forward pre-hook.*remove the hook"):
        model(IDS, labels=LABELS, fastpref=True)
    handle.remove()
    assert_as_own_logits(model)


def test_a_pre_hook_of_the_head_is_followed() -> None:
    for make in (build, lambda: with_lora(build())):
        model = fastpref.attach(make())
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (2 * args[0],))
        assert_as_own_logits(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hook_that_casts_may_see_logits_that_are_not_finite(value: float) -> None:
    model = build()
    theirs = reference.token_logprobs(model(IDS).logits, LABELS)
    model.get_input_embeddings().weight.data[22] = value  # a token of the first sequence
    model.lm_head.register_forward_hook(upcast)
    ours = fastpref.attach(model)(IDS, labels=LABELS, fastpref=True).logprobs
    assert_close(ours[1], theirs[1])
