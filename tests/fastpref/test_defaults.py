"""Results do not depend on the process's default device and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import nn, reference
from fastpref.integrations import openrlhf, verl
from fastpref.losses import RLHF, TABLE, wpo_weights
from fastpref_kernels.eager.gae import _powers
from tests.tolerance import ALL_STATS

BATCH, TOKENS, WIDTH, VOCABULARY = 4, 6, 3, 11
PACKED = torch.tensor([0, 5, 9, 16, 24])
TRANSFORM: dict[str, Any] = {"temperature": 1.5, "logit_scale": 0.5, "softcap": 3.0}
SHARED = torch.tensor([2, 1, 2, 1])
Call = Callable[[], Any]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def labels() -> Tensor:
    drawn = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    drawn[:, 0] = drawn[1, 2] = -100
    return drawn


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors that a function's result holds."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, tuple) else []


def evaluate(function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> list[Tensor]:
    """Return what a function returns, and the gradients of its floating-point arguments."""
    leaves = [
        value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments
    ]
    results = tensors_of(function(*leaves, **options))
    for result in results:
        if result.requires_grad:
            result.sum().backward(retain_graph=True)
    grads = [leaf.grad for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad is not None]
    return [*(result.detach() for result in results), *grads]


def calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """Yield a name, a function and its arguments for every public function, in its variants that make tensors."""
    logits, hidden, weight = normal(BATCH, TOKENS, VOCABULARY), normal(BATCH, TOKENS, WIDTH), normal(VOCABULARY, WIDTH)
    ld = {"ld_alpha": 0.5, "shared_lengths": SHARED}
    packed = {"cu_seqlens": PACKED, "ld_alpha": 0.5, **TRANSFORM}
    stats = ALL_STATS
    flat = labels().view(-1)
    references = {"ref_chosen_logps": normal(2), "ref_rejected_logps": normal(2) - 1}
    for package in (fastpref, reference):
        of = package.__name__
        for name, first, last in (("", (logits,), ()), ("linear_", (hidden, weight), (normal(VOCABULARY),))):
            tokens, sequences = (getattr(package, f"{name}{kind}_logprobs") for kind in ("token", "sequence"))
            rows = first[0].view(-1, first[0].shape[-1])
            yield f"{of}.{tokens.__name__}", tokens, (*first, labels(), *last), {"stats": stats, **TRANSFORM}
            for reduction in ("sum", "mean"):
                options = {"reduction": reduction, "stats": stats}
                yield f"{of}.{sequences.__name__}:{reduction}", sequences, (*first, labels()), options
            yield f"{of}.{sequences.__name__}:ld", sequences, (*first, labels(), *last), ld
            yield f"{of}.{sequences.__name__}:packed", sequences, (rows, *first[1:], flat), packed
        for mode, chunk_rows in (("auto", None), ("auto", 11), ("save", None), ("recompute", 3)):
            linear = {"mode": mode, "chunk_rows": chunk_rows, "filter_eps": 1e-3, "stats": ("dropped_mass", *stats)}
            arguments = (hidden, weight, labels())
            yield (
                f"{of}.linear_dpo_loss:{mode}-{chunk_rows}",
                package.linear_dpo_loss,
                arguments,
                {**references, **linear, "bias": normal(VOCABULARY), "loss_type": {"simpo": 1.0, "aot": 0.5}, **ld},
            )
            yield (
                f"{of}.linear_dpo_loss:reference-{mode}-{chunk_rows}",
                package.linear_dpo_loss,
                arguments,
                {"ref_hidden": hidden + 1, "ref_weight": weight, **linear, "sft_weight": 0.5},
            )
            yield (
                f"{of}.linear_preference_loss:{mode}-{chunk_rows}",
                package.linear_preference_loss,
                (*arguments, lambda logps: logps.logsumexp(-1)),
                {"group_size": 2, **linear, "ld_alpha": 0.5},
            )
        yield f"{of}.implicit_reward", package.implicit_reward, (normal(BATCH), normal(BATCH)), {}
        yield f"{of}.ranks_from_scores", package.ranks_from_scores, (normal(BATCH, 5),), {}
    yield (
        "linear_token_logprobs:save",
        fastpref.linear_token_logprobs,
        (hidden, weight, labels()),
        {"mode": "save", "shift": False},
    )
    weights = (normal(BATCH, TOKENS), normal(BATCH, TOKENS), labels() >= 0)
    yield "wpo_weights", wpo_weights, weights, {}
    for entry in (*TABLE, *RLHF):
        drawn, options = entry.example(torch.Generator().manual_seed(0), BATCH)
        arguments = tuple(value.float() if value.is_floating_point() else value for value in drawn)
        options |= getattr(entry, "options", {})
        for function, of in ((entry.function, "fastpref"), (entry.reference, "reference")):
            yield f"{of}.{entry.name}", function, arguments, options
        if "margin" in getattr(entry, "takes", ()):
            yield f"{entry.name}:margin", entry.function, arguments, {**options, "margin": torch.arange(BATCH)}
    pair = (normal(BATCH), normal(BATCH) + 1)
    yield "nn.DPOLoss", lambda *logps: nn.DPOLoss(loss_type=["sigmoid", "hinge"])(*logps), pair * 2, {}
    yield "nn.KTOSplitLoss", lambda *logps: nn.KTOSplitLoss()(*logps), (*pair, normal(3)) * 2, {}
    yield "nn.PairwiseRewardLoss", lambda *rewards: nn.PairwiseRewardLoss(margin=1)(*rewards), pair, {}
    tokens = tuple(normal(BATCH, TOKENS) + i / 4 for i in range(3))
    yield "nn.PPOPolicyLoss", lambda *tokens: nn.PPOPolicyLoss()(*tokens), tokens, {}
    yield "nn.PPOValueLoss", lambda *tokens: nn.PPOValueLoss()(*tokens), tokens, {}
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    yield "openrlhf.PolicyLoss", lambda *tokens: openrlhf.PolicyLoss(0.1, 0.3, 1.5)(*tokens), tokens, {}
    yield "openrlhf.ValueLoss", lambda *tokens: openrlhf.ValueLoss()(*tokens), tokens, {}
    yield "openrlhf.get_advantages_and_returns", openrlhf.get_advantages_and_returns, (*tokens[:2], mask, 0.9, 0.8), {}
    policy = (*tokens, mask, 0.1)
    yield "verl.compute_policy_loss", verl.compute_policy_loss, policy, {"cliprange_high": 0.3}
    yield "verl.compute_value_loss", verl.compute_value_loss, (*tokens, mask, 0.2), {}
    whitened = (*tokens[:2], labels() >= 0, 0.9, 0.8)
    yield "verl.compute_gae_advantage_return", verl.compute_gae_advantage_return, whitened, {}


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        # Before torch 2.9, torch.get_default_device fails on the None that this leaves.
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "torch.device": lambda: torch.device("meta"),
    "set_default_device": default_device,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize(("function", "arguments", "options"), [c[1:] for c in calls()], ids=[c[0] for c in calls()])
@pytest.mark.usefixtures("implementation")
def test_results_do_not_depend_on_them(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    default: Callable[[], AbstractContextManager[Any]],
) -> None:
    wanted = evaluate(function, arguments, options)
    _powers.cache_clear()  # it would keep what the call above has made
    with default():
        got = evaluate(function, arguments, options)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_every_public_function_is_called() -> None:
    called = {getattr(function, "__name__", "") for _, function, _, _ in calls()}
    public = {name for name in reference.__all__ if name[0].islower()}
    assert public <= called


@pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)
def test_an_attached_model_does_not_depend_on_them(default: Callable[[], AbstractContextManager[Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = fastpref.attach(transformers.AutoModelForCausalLM.from_config(config).float().eval())
    scored, weight = labels(), model.get_output_embeddings().weight
    input_ids = scored.clamp(min=0)

    def call() -> tuple[Tensor, Tensor]:
        logprobs = model(input_ids=input_ids, labels=scored, fastpref=True, stats=("entropy",)).logprobs
        return logprobs.detach(), torch.autograd.grad(logprobs.sum(), weight)[0]

    wanted = call()
    model = fastpref.attach(fastpref.detach(model))  # verified again
    with default():
        got = call()
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
