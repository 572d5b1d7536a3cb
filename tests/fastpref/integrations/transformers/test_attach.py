"""Test attached models: calls without `fastpref=`, copies, pickles, replicas, compilation and autocast."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastpref
from fastpref import detach, reference
from tests.fastpref.integrations.transformers.attached import (
    IDS,
    LABELS,
    MODELS,
    PEFT_WARNINGS,
    assert_as_own_logits,
    assert_close,
    build,
    gradients,
    traced_whole,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = PEFT_WARNINGS


@pytest.mark.parametrize("name", MODELS)
def test_scores_as_its_own_logits_do(name: str) -> None:
    model = build(name)
    assert_as_own_logits(model)
    assert not model._fastpref.verify
    assert_as_own_logits(model, mode="recompute", chunk_rows=3)


def test_tied_head_has_both_gradients() -> None:
    model = build("GPT2")
    assert model.lm_head.weight is model.transformer.wte.weight
    ours = assert_as_own_logits(model)
    both = gradients(model, ours.logprobs)["transformer.wte.weight"]
    hidden = ours.last_hidden_state.detach()
    head = model.lm_head.weight.detach().requires_grad_()
    alone = fastpref.linear_token_logprobs(hidden, head, LABELS)
    (once,) = torch.autograd.grad(alone, head, torch.linspace(-1, 2, alone.numel(), dtype=alone.dtype).view_as(alone))
    # The row of a token that is not in the input gets a gradient from the head only.
    assert_close(both[30], once[30])
    assert (both[5] - once[5]).abs().max() > 1e-3


def test_other_calls_are_as_before() -> None:
    model = build()
    before = model(IDS, labels=LABELS)
    signature, keys = inspect.signature(model.forward), model.state_dict().keys()
    drawn = model.generate(IDS, max_new_tokens=3, do_sample=False)
    fastpref.attach(model)(IDS, labels=LABELS, fastpref=True)
    after = model(IDS, labels=LABELS)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.loss, before.loss)
    assert type(model(IDS, return_dict=False)) is tuple
    assert inspect.signature(model.forward) == signature
    assert model.state_dict().keys() == keys
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), drawn)


def assert_scores(model: Any) -> None:
    """Compare log-probs with those of the model's logits, in the precision in which the model runs."""
    ours = model(IDS, labels=LABELS, fastpref=True).logprobs
    torch.testing.assert_close(ours, reference.token_logprobs(model(IDS).logits.to(ours.dtype), LABELS))


def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: forward(*args, **kwargs)


def test_attach_once_and_detach() -> None:
    model = build()
    own = type(model)
    assert fastpref.attach(model) is model
    attached = type(model)
    assert type(fastpref.attach(model)) is attached
    assert isinstance(model, own)
    assert detach(model) is model
    assert type(model) is own
    assert not {"forward", "_fastpref"} & model.__dict__.keys()
    assert detach(model) is model


def test_a_forward_patched_after_attach_is_kept() -> None:
    model = fastpref.attach(build())
    before = model.forward
    model.forward = patch = wrapped(before)
    assert fastpref.attach(model).forward is patch
    assert_scores(model)
    with pytest.raises(ValueError, match="patched again"):
        detach(model)
    model.forward = before  # as accelerate's hooks undo themselves
    assert_scores(model)
    assert_scores(pickle.loads(pickle.dumps(model)))
    assert "forward" not in detach(model).__dict__


def test_a_class_made_of_the_attached_one_is_kept() -> None:
    """FSDP2 makes such a class."""
    model = fastpref.attach(build())
    model.__class__ = sharded = type("Sharded", (type(model),), {})
    assert type(fastpref.attach(model)) is sharded
    assert_scores(model)
    with pytest.raises(ValueError, match="patched again"):
        detach(model)
    with pytest.raises((pickle.PicklingError, AttributeError), match="Sharded"):
        pickle.dumps(model)


@pytest.mark.parametrize("late", [False, True])
def test_accelerate_prepares_it_before_or_after(late: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build().float()
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(model if late else fastpref.attach(model))
    for _ in range(2):
        fastpref.attach(model)
        ours = model(IDS, labels=LABELS, fastpref=True)
        theirs = reference.token_logprobs(model(IDS).logits.double(), LABELS)
        torch.testing.assert_close(ours.logprobs.double(), theirs, rtol=0.02, atol=0.02)
        assert ours.last_hidden_state.dtype == torch.float32
    if not late:
        assert_scores(accelerator.unwrap_model(model, keep_fp32_wrapper=False))


def test_its_class_is_the_models_by_name(tmp_path: Path) -> None:
    model = build()
    own = type(model)
    fastpref.attach(model)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(model), name) == getattr(own, name)
    assert inspect.signature(type(model).forward) == inspect.signature(own.forward)
    model.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is own
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    ours = again(IDS, labels=LABELS, fastpref=True).logprobs
    assert_close(ours, model(IDS, labels=LABELS, fastpref=True).logprobs)


def test_a_pickle_scores() -> None:
    model = fastpref.attach(build("GPT2"))
    model(IDS, labels=LABELS, fastpref=True)
    other = pickle.loads(pickle.dumps(model))
    assert_close(other(IDS, labels=LABELS, fastpref=True)[:2], model(IDS, labels=LABELS, fastpref=True)[:2])
    assert other.lm_head.weight is other.transformer.wte.weight
    assert not other._fastpref.verify
    assert type(detach(other)) is transformers.GPT2LMHeadModel


def replica(model: nn.Module, scale: float) -> Any:
    """Return a replica like DataParallel's, with its own scaled weights."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        for name, child in module._modules.items():
            made._modules[name] = copies[child]
        for name, parameter in module._parameters.items():
            setattr(made, name, None if parameter is None else scale * parameter)
    return copies[model]


def test_replicas_of_data_parallel_score_with_their_own_weights() -> None:
    model, meet = fastpref.attach(build()), threading.Barrier(2, timeout=600)

    def wait(module: nn.Module, args: Any) -> None:
        meet.wait()

    model.lm_head.register_forward_pre_hook(wait)  # both heads run at the same time
    copies = [replica(model, 1.0), replica(model, 1.3)]
    with ThreadPoolExecutor(2) as threads:
        logits = list(threads.map(lambda made: made(IDS).logits, copies))
        ours = list(threads.map(lambda made: made(IDS, labels=LABELS, fastpref=True).logprobs, copies))
    assert_close(ours, [reference.token_logprobs(own, LABELS) for own in logits])
    assert (ours[0] - ours[1]).abs().max() > 1e-2


@traced_whole
def test_compile() -> None:
    model = build(num_hidden_layers=1).float()
    plain = model(IDS).logits
    fastpref.attach(model)
    torch._dynamo.reset()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(IDS).logits, plain)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="score once"):
        whole(IDS, labels=LABELS, fastpref=True)
    broken = torch.compile(model, backend="eager")
    theirs = reference.token_logprobs(plain, LABELS)
    assert model._fastpref.verify
    torch.testing.assert_close(broken(IDS, labels=LABELS, fastpref=True).logprobs, theirs)
    assert not model._fastpref.verify
    ours = whole(IDS, labels=LABELS, fastpref=True).logprobs
    torch.testing.assert_close(ours, theirs)
    found, expected = gradients(model, ours), gradients(model, theirs)
    torch.testing.assert_close(found, expected)
    assert "forward" not in model.lm_head.__dict__
    assert not model.lm_head._forward_hooks


# In torch 2.11, Dynamo reads .grad of a tensor that is not a leaf when it resumes after a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compile_where_the_graph_may_break() -> None:
    model = fastpref.attach(build(num_hidden_layers=1).float())
    torch._dynamo.reset()
    ours = torch.compile(model, backend="eager")(IDS, labels=LABELS, fastpref=True).logprobs
    theirs = reference.token_logprobs(model(IDS).logits, LABELS)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(model, ours), gradients(model, theirs))
    assert "forward" not in model.lm_head.__dict__


def test_a_deep_copy_scores_with_its_own_weights() -> None:
    model = fastpref.attach(build())
    other = copy.deepcopy(model)
    other.lm_head.weight.data.zero_()
    ours = other(IDS, labels=LABELS, fastpref=True).logprobs
    assert_close(ours[0, 1:], torch.full((5,), -torch.tensor(61.0).double().log().item(), dtype=ours.dtype))
    assert model(IDS, labels=LABELS, fastpref=True).logprobs.std() > 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build().train()
    model.enable_input_require_grads()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    theirs = reference.token_logprobs(model(IDS, use_cache=False).logits, LABELS).sum()
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    fastpref.attach(model)(IDS, labels=LABELS, fastpref=True, use_cache=False).logprobs.sum().backward()
    assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Cohere"])
def test_bf16_and_autocast_pass_the_check(name: str) -> None:
    model = build(name)
    truth = reference.token_logprobs(model(IDS).logits, LABELS)
    fastpref.attach(model.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(IDS, labels=LABELS, fastpref=True).logprobs
    detach(model)
    for found in (cast, fastpref.attach(model.bfloat16())(IDS, labels=LABELS, fastpref=True).logprobs):
        assert found.dtype == torch.float32
        assert not model._fastpref.verify
        torch.testing.assert_close(found.double(), truth, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("value", ["no", None, 1])
def test_verify_is_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^verify must be True or False"):
        fastpref.attach(build(), verify=value)


@pytest.mark.parametrize("value", ["0.1", -1.0, 0.0, float("nan"), [1.0], True])
@pytest.mark.parametrize("name", ["logit_scale", "softcap"])
def test_a_wrong_transform_is_refused(name: str, value: Any) -> None:
    model = build()
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        fastpref.attach(model, **{name: value})
    assert not hasattr(model, "_fastpref")


def test_refused_models() -> None:
    model = build()
    for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        with pytest.raises(TypeError, match="before it is wrapped"):
            fastpref.attach(wrapper)
    for headless in (model.model, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="output embeddings"):
            fastpref.attach(headless)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 61}
    with pytest.raises(TypeError, match="encoder-decoder"):
        fastpref.attach(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)))
