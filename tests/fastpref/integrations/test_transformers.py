"""Models that `attach` has patched, against their own logits: log-probs, every gradient, and what is refused."""

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
import torch.nn.functional as F
from torch import Tensor, nn

import fastpref
from fastpref import detach, reference
from fastpref.integrations import _head
from tests.fastpref.integrations.attached import (
    IDS,
    LABELS,
    MODELS,
    assert_as_own_logits,
    assert_close,
    build,
    gradients,
    lora,
    with_lora,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]
# Dynamo cannot trace that an attribute is taken off a module before torch 2.12, and breaks the graph there.
traced_whole = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason=f"torch {torch.__version__} breaks the graph of an attached model"
)
TRANSFORMED = ("Gemma2", "Cohere", "Granite", "HyperCLOVAX")


@pytest.mark.parametrize("name", MODELS)
def test_scores_as_its_own_logits_do(name: str) -> None:
    model = build(name)
    assert_as_own_logits(model)
    assert not model._fastpref.verify
    assert_as_own_logits(model, mode="recompute", chunk_rows=3)


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


def test_sequences_ld_and_packing() -> None:
    model = fastpref.attach(build("Gemma2"))
    logits = model(IDS).logits
    for options in (
        {"reduction": "sum"}, {"reduction": "mean", "temperature": 0.7}, {"reduction": "sum", "ld_alpha": 0.3},
        {"reduction": "sum", "ld_alpha": 0.3, "shared_lengths": torch.tensor([2, 1])},
        {"reduction": "sum", "ignore_index": 60}, {"reduction": "mean", "shift": False},
    ):  # fmt: skip
        labels = LABELS.clamp(min=0) if "ignore_index" in options else LABELS
        ours = model(IDS, labels=labels, fastpref=True, **options).logprobs
        assert_close(ours, reference.sequence_logprobs(logits, labels, **options))
    packed, bounds = LABELS.view(1, -1), torch.tensor([0, 4, 14])
    places = torch.cat([torch.arange(4), torch.arange(10)])[None]
    ours = model(IDS.view(1, -1), position_ids=places, labels=packed, fastpref=True, reduction="sum", cu_seqlens=bounds)
    logits = model(IDS.view(1, -1), position_ids=places).logits
    assert_close(ours.logprobs, reference.sequence_logprobs(logits, packed, reduction="sum", cu_seqlens=bounds))


def test_tied_head_has_both_gradients() -> None:
    model = build("GPT2")
    assert model.lm_head.weight is model.transformer.wte.weight
    ours = assert_as_own_logits(model)
    both = gradients(model, ours.logprobs)["transformer.wte.weight"]
    hidden = ours.last_hidden_state.detach()
    head = model.lm_head.weight.detach().requires_grad_()
    alone = fastpref.linear_token_logprobs(hidden, head, LABELS)
    (once,) = torch.autograd.grad(alone, head, torch.linspace(-1, 2, alone.numel(), dtype=alone.dtype).view_as(alone))
    # A token that is not in the input has only the head's.
    assert_close(both[30], once[30])
    assert (both[5] - once[5]).abs().max() > 1e-3


def managing(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that looks like one of DeepSpeed's, which gather a module's weights and let them go."""
    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    return hook


def test_head_hooks_run_around_the_log_probs() -> None:
    """As under ZeRO-3: the weight is there between the head's hooks alone, and gone before the model goes on."""
    model = fastpref.attach(build())
    expected = model(IDS, labels=LABELS, fastpref=True, stats=("lse",))
    weight, seen = model.lm_head.weight.data, []

    def gather(module: nn.Module, args: Any) -> None:
        assert module is model.lm_head  # FSDP2 keeps account of the modules that its hooks are called with
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
    """ZeRO-3 gives every output a new tensor, whose gradient gathers the weight again."""
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
    """A model, in whatever precision it is run, scores what its own logits say."""
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
    """As FSDP2 makes one."""
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
    """A replica as DataParallel makes it, with weights of its own."""
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

    model.lm_head.register_forward_pre_hook(wait)  # both heads run while both are replaced
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


def test_outputs_are_the_models() -> None:
    model = fastpref.attach(build())
    output = model(IDS, labels=LABELS, fastpref=True, output_hidden_states=True, use_cache=True)
    own = model(IDS, output_hidden_states=True)
    # Since transformers 5.24 the cache has another name in what a model returns.
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
    # DDP's own search for what needs a gradient.
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
    model.merge_adapter(["two"])  # and then the other is not computed either
    seen.append(assert_as_own_logits(model))
    with model.disable_adapter():  # which unmerges
        assert_close(assert_as_own_logits(model).logprobs, seen[3].logprobs)
    assert_close(assert_as_own_logits(model).logprobs, seen[2].logprobs)
    for index, one in enumerate(seen):
        assert all((one.logprobs - other.logprobs).abs().max() > 1e-3 for other in seen[:index])


def test_lora_hooks_run() -> None:
    model, seen = with_lora(), []
    for name, module in model.get_base_model().lm_head.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    fastpref.attach(model, verify=False)(IDS, labels=LABELS, fastpref=True)
    wanted = {"", "base_layer", "lora_A.default", "lora_B.default"}
    assert sorted(wanted) == sorted(name for name in seen if name in wanted)


def test_small_lora_is_not_rounded_away() -> None:
    """Added to a bf16 weight, most of it would be. PEFT keeps its own weights in float32."""
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


@traced_whole
def test_compile_with_lora() -> None:
    model = fastpref.attach(with_lora(build(num_hidden_layers=1).float()), verify=False)
    torch._dynamo.reset()
    ours = torch.compile(model, fullgraph=True, backend="eager")(IDS, labels=LABELS, fastpref=True).logprobs
    theirs = reference.token_logprobs(model(IDS).logits, LABELS)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(model, ours), gradients(model, theirs))


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


def pair_loss(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **transform: Any) -> Any:
    """DPO in chunks of less than the batch, so that its gradients are made where the head's product would be."""
    return fastpref.linear_dpo_loss(hidden, weight, labels, *PAIR_REFERENCES, bias=bias, **PAIR_OPTIONS, **transform)


PAIR_REFERENCES = torch.full((2, 2), -9.0, dtype=torch.float64)
PAIR_OPTIONS = {"beta": 0.5, "chunk_rows": 12, "stats": ("entropy",)}
PAIR_IDS, PAIR_LABELS = torch.cat([IDS, IDS.flip(1)]), torch.cat([LABELS, LABELS.flip(1).roll(1, 1)])


def assert_scored_by(model: Any) -> Any:
    """Hold a loss made by a function against the same loss of the model's own logits. Returns ours."""
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
        (pair_loss, {"softcap": 3.0}, ValueError, "attach takes it, once for the model; got softcap=float 3.0"),
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
