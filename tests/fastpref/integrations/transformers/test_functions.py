"""Test scored calls with a function as `fastpref=`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.integrations.transformers import _head
from tests.fastpref.integrations.transformers.attached import (
    IDS,
    LABELS,
    PEFT_WARNINGS,
    assert_close,
    build,
    gradients,
    traced_whole,
    with_lora,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = PEFT_WARNINGS


def pair_loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **transform: Any) -> Any:
    """Compute DPO in chunks smaller than the batch, so that gradients are computed in the forward."""
    return fastpref.linear_dpo_loss(hidden, weight, labels, *PAIR_REFERENCES, bias=bias, **PAIR_OPTIONS, **transform)


PAIR_REFERENCES = torch.full((2, 2), -9.0, dtype=torch.float64)
PAIR_OPTIONS = {"beta": 0.5, "chunk_rows": 12, "stats": ("entropy",)}
PAIR_IDS, PAIR_LABELS = torch.cat([IDS, IDS.flip(1)]), torch.cat([LABELS, LABELS.flip(1).roll(1, 1)])


def assert_scored_by(model: Any) -> Any:
    """Compare a loss that a function computes with the same loss from the model's logits, and return the former."""
    theirs = reference.sequence_logprobs(model(PAIR_IDS).logits, PAIR_LABELS)
    expected = fastpref.dpo_loss(*theirs.chunk(2), *PAIR_REFERENCES, beta=0.5).loss
    ours = fastpref.attach(model)(PAIR_IDS, labels=PAIR_LABELS, fastpref=pair_loss)
    assert_close(ours.loss, expected)
    found = gradients(model, ours.loss)
    assert any(value.abs().max() > 1e-3 for value in found.values())
    assert_close(found, gradients(model, expected))
    return ours


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Granite"])
def test_scored_by_a_function(name: str) -> None:
    model = build(name)
    ours = assert_scored_by(model)
    assert ours._fields[:6] == (*fastpref.linear_dpo_loss(*two_rows())._fields, "entropy")
    assert ours._fields[6:] == ("last_hidden_state", *own_fields(model))
    assert ours.entropy.shape == (4, 6)
    assert ours.loss.grad_fn is not None
    assert not model._fastpref.verify
    assert_scored_by(model)


def two_rows() -> tuple[Tensor, ...]:
    return torch.ones(2, 2, 1), torch.ones(3, 1), torch.ones(2, 2, dtype=torch.int64), *torch.zeros(2, 1)


def own_fields(model: Any) -> tuple[str, ...]:
    return model(IDS, labels=LABELS, fastpref=True)._fields[2:]


def test_a_function_that_scores_to_one_tensor() -> None:
    model, given = build("Gemma2"), []

    def score(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **transform: Any) -> Tensor:
        given.append((hidden.shape, weight.shape, labels, bias, transform))
        return fastpref.linear_sequence_logprobs(hidden, weight, labels, bias, temperature=0.7, **transform)

    ours = fastpref.attach(model)(IDS, labels=LABELS, fastpref=score)
    assert given == [((2, 7, 16), (61, 16), LABELS, None, {"logit_scale": 1.0, "softcap": 0.3})]
    assert ours._fields[:2] == ("scored", "last_hidden_state")
    assert_close(ours.scored, reference.sequence_logprobs(model(IDS).logits, LABELS, temperature=0.7))


def test_a_function_scores_lora_on_the_head() -> None:
    ours = assert_scored_by(model := with_lora())
    trained = gradients(model, ours.loss)
    assert min(value.abs().max() for name, value in trained.items() if "lm_head.lora_" in name) > 1e-3
    with model.disable_adapter():
        assert (assert_scored_by(model).loss - ours.loss).abs() > 1e-3


def test_a_function_and_a_transform_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_head, "logit_transform", lambda config: {"logit_scale": 1.0, "softcap": None})
    with pytest.raises(NotImplementedError, match="something else"):
        fastpref.attach(build("Gemma2"))(PAIR_IDS, labels=PAIR_LABELS, fastpref=pair_loss)


@traced_whole
def test_compile_with_a_function() -> None:
    model = fastpref.attach(build(num_hidden_layers=1).float(), verify=False)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **transform: Any) -> Any:
        return fastpref.linear_dpo_loss(hidden, weight, labels, *PAIR_REFERENCES.float(), bias=bias, **transform)

    eager = model(PAIR_IDS, labels=PAIR_LABELS, fastpref=loss)
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")(PAIR_IDS, labels=PAIR_LABELS, fastpref=loss)
    assert whole._fields == eager._fields
    torch.testing.assert_close(whole[:5], eager[:5])
    torch.testing.assert_close(gradients(model, whole.loss), gradients(model, eager.loss))


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        (
            pair_loss,
            {"stats": ("entropy",), "shift": False},
            ValueError,
            r"bind options of scoring to the function .*; got shift, stats at the call",
        ),
        (pair_loss, {"reduction": "sum", "ld_alpha": 0.5}, ValueError, "got ld_alpha, reduction at the call"),
        (pair_loss, {"softcap": 3.0}, ValueError, "pass it to attach, once for the model; got softcap=float 3.0"),
        ("yes", {}, TypeError, "fastpref must be a bool, or a function to score with; got str 'yes'"),
        (lambda *args, **_: [1.0], {}, TypeError, r"a named tuple of tensors; got list \[1.0\]"),
        (lambda *args, **_: fastpref.KTOResult(args[0], 3), {}, TypeError, "a named tuple of tensors; got"),
    ],
)
def test_refused_functions(function: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = fastpref.attach(build())
    with pytest.raises(error, match=message):
        model(PAIR_IDS, labels=PAIR_LABELS, fastpref=function, **options)
    with pytest.raises(ValueError, match="pass labels="):
        model(PAIR_IDS, fastpref=pair_loss)
    assert "forward" not in model.lm_head.__dict__


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
