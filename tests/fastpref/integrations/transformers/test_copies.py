"""Test that a scored call changes no model: in threads, within other calls, and when it fails."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import Tensor, nn

import fastpref
from fastpref import reference
from tests.fastpref.integrations.transformers.attached import (
    IDS,
    LABELS,
    PEFT_WARNINGS,
    assert_as_own_logits,
    assert_close,
    assert_unchanged,
    build,
    states,
    with_lora,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = PEFT_WARNINGS


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
    """All heads wait for each other, so that all calls are inside their heads at the same time."""
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
        assert_unchanged(model, before)  # nor during the call
        raise error("from the scoring function")

    with pytest.raises(error, match="from the scoring function"):
        model(IDS, labels=LABELS, fastpref=fail)
    assert_unchanged(model, before)
    assert_close(model(IDS).logits, logits)
    assert_close(model(IDS, labels=LABELS, fastpref=True).logprobs, reference.token_logprobs(logits, LABELS))
    assert_unchanged(model, before)


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


def test_a_head_inside_another_model_is_scored() -> None:
    """The copy of the model also copies the modules that lead to its head, with their hooks."""
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
