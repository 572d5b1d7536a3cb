"""Test the options, labels and results of scored calls."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch

import fastpref
from fastpref import reference
from fastpref.integrations.transformers import _call
from tests.fastpref.integrations.transformers.attached import (
    IDS,
    LABELS,
    PEFT_WARNINGS,
    assert_as_own_logits,
    assert_close,
    build,
    gradients,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = PEFT_WARNINGS


def test_sequences_ld_and_packing() -> None:
    model = fastpref.attach(build("Gemma2"))
    logits = model(IDS).logits
    for options in (
        {"reduction": "sum"},
        {"reduction": "mean", "temperature": 0.7},
        {"reduction": "sum", "ld_alpha": 0.3},
        {"reduction": "sum", "ld_alpha": 0.3, "shared_lengths": torch.tensor([2, 1])},
        {"reduction": "sum", "ignore_index": 60},
        {"reduction": "mean", "shift": False},
    ):
        labels = LABELS.clamp(min=0) if "ignore_index" in options else LABELS
        ours = model(IDS, labels=labels, fastpref=True, **options).logprobs
        assert_close(ours, reference.sequence_logprobs(logits, labels, **options))
    packed, bounds = LABELS.view(1, -1), torch.tensor([0, 4, 14])
    places = torch.cat([torch.arange(4), torch.arange(10)])[None]
    ours = model(IDS.view(1, -1), position_ids=places, labels=packed, fastpref=True, reduction="sum", cu_seqlens=bounds)
    logits = model(IDS.view(1, -1), position_ids=places).logits
    assert_close(ours.logprobs, reference.sequence_logprobs(logits, packed, reduction="sum", cu_seqlens=bounds))


def test_outputs_are_the_models() -> None:
    model = fastpref.attach(build())
    output = model(IDS, labels=LABELS, fastpref=True, output_hidden_states=True, use_cache=True)
    own = model(IDS, output_hidden_states=True)
    # Since transformers 5.24 the cache has another name in the model's outputs.
    cache = (
        "cache"
        if "cache" in transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
        else "past_key_values"
    )
    assert output._fields == ("logprobs", "last_hidden_state", cache, "hidden_states", "attentions")
    assert output.logprobs.shape == (2, 6)
    assert getattr(output, cache).get_seq_length() == 7
    assert_close(output.hidden_states, own.hidden_states)
    assert_close(output.last_hidden_state, own.hidden_states[-1])
    assert getattr(model(IDS, labels=LABELS, fastpref=True, use_cache=False), cache) is None
    # DDP finds tensors that need a gradient by this function.
    tensors = torch.nn.parallel.distributed._find_tensors(output)
    assert any(tensor is output.logprobs for tensor in tensors)


def test_router_loss_is_the_models() -> None:
    model = build("Mixtral", num_local_experts=4, output_router_logits=True, experts_implementation="eager")
    own = model(IDS)
    ours = assert_as_own_logits(model)
    assert own.aux_loss > 0
    assert_close(ours.aux_loss, own.aux_loss)
    assert_close(gradients(model, ours.aux_loss), gradients(model, own.aux_loss))


def test_embeddings_and_masks_reach_the_model() -> None:
    model = fastpref.attach(build())
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
    inputs = {"inputs_embeds": model.get_input_embeddings()(IDS), "attention_mask": mask}
    ours = model(**inputs, labels=LABELS, fastpref=True).logprobs
    assert_close(ours, reference.token_logprobs(model(**inputs).logits, LABELS))


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
        ("num_items_in_batch", torch.tensor(3)),
        ("logits_to_keep", 3),
        ("logits_to_keep", torch.tensor([1, 2])),
        ("num_logits_to_keep", 1),
        ("skip_logits", True),
        ("softcap", 3.0),
        ("logit_scale", 0.5),
        ("inplace_backward", True),
    ],
)
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
    known = {*_call.UNSUPPORTED, *_call.TOKEN_OPTIONS, "labels", "shift_labels"}
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "labels"),
        ({"labels": LABELS, "logits_to_keep": 3}, "logits_to_keep"),
        ({"labels": LABELS, "softcap": 3.0}, "softcap"),
        ({"labels": LABELS, "cu_seqlens": torch.tensor([0, 14])}, "reduction"),
        ({"labels": LABELS, "ld_alpha": 0.5}, "reduction"),
        ({"labels": LABELS, "reduction": "max"}, "reduction"),
        ({"labels": LABELS, "stats": ("perplexity",)}, "stats"),
        ({"labels": LABELS[:, :5]}, "labels"),
        ({"labels": LABELS, "return_dict": False}, "return_dict"),
    ],
)
def test_refused_arguments(options: dict[str, Any], message: str) -> None:
    model = fastpref.attach(build())
    with pytest.raises(ValueError, match=message):
        model(IDS, fastpref=True, **options)
    assert_close(model(IDS).logits.shape, (2, 7, 61))
    assert "forward" not in model.lm_head.__dict__
