"""Small causal LMs of transformers and PEFT, and how an attached one is held against its own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpref
from fastpref import reference

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
# At these sizes each scale and cap changes the log-probs clearly.
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 0.3},
    "GPT2": {"n_inner": 24},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "HyperCLOVAX": {"logits_scaling": 4.0},
    "MiniCPM3": {"dim_model_base": 4, "num_key_value_heads": 2, **MLA},
}
LABELS = torch.tensor([[-100, -100, 7, 1, 60, 0, 22], [-100, 3, 3, 9, 60, -100, -100]])
IDS = torch.tensor([[5, 8, 7, 1, 60, 0, 22], [4, 3, 3, 9, 60, 0, 0]])


def build(name: str = "Llama", **config: Any) -> Any:
    """A model with random weights, in float64, whose logits spread by about 1."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    made = getattr(transformers, f"{name}Config")(**{**SIZES, **MODELS.get(name, {}), **config})
    model = transformers.AutoModelForCausalLM.from_config(made).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 2, values.numel(), dtype=values.dtype).view_as(values)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(
        values, list(trained.values()), weights if values.dim() else None, retain_graph=True, allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return dict(zip(trained, found, strict=True))


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def assert_as_own_logits(model: Any, *, seed: int = 0, **options: Any) -> Any:
    """Hold log-probs, statistics and every gradient against the model's own logits. Returns ours."""
    torch.manual_seed(seed)
    theirs = reference.token_logprobs(model(IDS).logits, LABELS, stats=("entropy", "lse"))
    torch.manual_seed(seed)
    ours = fastpref.attach(model)(IDS, labels=LABELS, fastpref=True, stats=("entropy", "lse"), **options)
    for field in ("logprobs", "entropy", "lse"):
        assert_close(getattr(ours, field), getattr(theirs, field))
    expected, found = gradients(model, theirs.logprobs), gradients(model, ours.logprobs)
    assert any(value.abs().max() > 1e-3 for value in expected.values())
    assert_close(found, expected)
    return ours


def lora(*targets: str, **options: Any) -> Any:
    sizes = {"r": 3, "lora_alpha": 7, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(target_modules=list(targets), **sizes, **options)


def with_lora(model: Any = None, *, targets: tuple[str, ...] = ("lm_head", "q_proj"), **options: Any) -> Any:
    model = build("Gemma2", tie_word_embeddings=False) if model is None else model
    made = peft.get_peft_model(model, lora(*targets, **options)).eval()
    model.model.norm.weight.requires_grad_()  # something to train where no adapter is on
    return made
