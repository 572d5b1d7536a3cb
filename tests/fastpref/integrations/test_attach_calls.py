"""Calls of attached models in threads, within each other and cut short, and forwards that were patched before."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpref
from fastpref import reference
from tests.fastpref.integrations.attached import (
    IDS,
    LABELS,
    assert_as_own_logits,
    assert_close,
    build,
    with_lora,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT reads it


def states(model: nn.Module) -> dict[str, Any]:
    """Return what every module holds by name, and what it holds in dicts, so that any change of it shows."""
    found: dict[str, Any] = {}
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            found[f"{place}.{name}"] = value
            if isinstance(value, dict):
                found |= {f"{place}.{name}[{key}]": held for key, held in value.items()}
    return found


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = states(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] is value, name


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


def that_counts(model: Any) -> Callable[..., Any]:
    own, calls = model.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        forward.calls = calls  # type: ignore[attr-defined]
        return own(*args, **kwargs)

    return forward


def that_hold_each_other(model: Any) -> Callable[..., Any]:
    own = model.forward

    def first(*args: Any, depth: int = 0, **kwargs: Any) -> Any:
        return second(*args, depth=depth + 1, **kwargs) if depth < 2 else own(*args, **kwargs)

    def second(*args: Any, **kwargs: Any) -> Any:
        return first(*args, **kwargs)

    return first


def with_an_empty_cell(model: Any) -> Callable[..., Any]:
    own = model.forward
    if own is None:
        later = 1

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if kwargs is not None else later

    return forward


def in_a_default(model: Any) -> Callable[..., Any]:
    return lambda *args, own=model.forward, **kwargs: own(*args, **kwargs)


def in_a_keyword(model: Any) -> Callable[..., Any]:
    return functools.partial(lambda *args, own, **kwargs: own(*args, **kwargs), own=model.forward)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "patch",
    [
        around_a_method, as_trl, as_accelerate, around_the_model, that_counts, that_hold_each_other,
        with_an_empty_cell, in_a_default, in_a_keyword,
    ],
)  # fmt: skip
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


def test_a_patch_keeps_its_own_state() -> None:
    model = build()
    model.forward = forward = that_counts(model)
    fastpref.attach(model)
    for _ in range(3):
        model(IDS, labels=LABELS, fastpref=True)
    model(IDS)
    assert forward.calls == 4  # type: ignore[attr-defined]


def test_what_a_forward_sets_on_the_model_is_kept() -> None:
    model = build()
    forward = type(model).forward

    class Counts(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            return forward(self, *args, **kwargs)

    model.__class__ = Counts
    fastpref.attach(model)
    for _ in range(2):
        model(IDS, labels=LABELS, fastpref=True)
    assert model.steps == 2
    assert fastpref.detach(model).steps == 2


@pytest.mark.parametrize("make", [build, lambda: with_lora(build())], ids=["plain", "LoRA"])
def test_a_call_leaves_nothing_for_the_garbage_collector(make: Callable[[], Any]) -> None:
    model = fastpref.attach(make())
    model(IDS, labels=LABELS, fastpref=True)
    gc.collect()
    gc.disable()
    try:
        ours = model(IDS, labels=LABELS, fastpref=True)
        held = [weakref.ref(ours.logprobs), weakref.ref(ours.last_hidden_state)]
        del ours
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


def test_accelerate_dispatches_a_model_whose_head_peft_trains() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build()
    accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.AlignDevicesHook(io_same_device=True))
    model = with_lora(model, targets=("q_proj",), modules_to_save=["lm_head"])
    assert_as_own_logits(fastpref.attach(model))


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


@pytest.mark.parametrize("part", ["", "base_layer"])
def test_a_patched_forward_of_the_head_is_refused(part: str) -> None:
    model = fastpref.attach(build() if part == "" else with_lora(build()), verify=False)
    module = model.get_output_embeddings().get_submodule(part)
    forward = module.forward
    module.forward = lambda hidden: 2 * forward(hidden)
    with pytest.raises(NotImplementedError, match=r"lm_head.*must have the forward of its class"):
        model(IDS, labels=LABELS, fastpref=True)
