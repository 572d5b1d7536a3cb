"""Build small causal LMs of transformers and PEFT, and compare attached ones with their own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpref
from fastpref import reference

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

PEFT_WARNINGS = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]
# Before torch 2.12, Dynamo cannot trace the deletion of a module's attribute, and breaks the graph.
traced_whole = pytest.mark.skipif(
    torch.__version__ < (2, 12), reason=f"torch {torch.__version__} breaks the graph of an attached model"
)


SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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
    """Return a float64 model with random weights, whose logits have a spread of about 1."""
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
        values,
        list(trained.values()),
        weights if values.dim() else None,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(trained, found, strict=True))


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def assert_as_own_logits(model: Any, *, seed: int = 0, **options: Any) -> Any:
    """Compare log-probs, statistics and gradients with those of the model's logits, and return the scored call's."""
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
    model.model.norm.weight.requires_grad_()  # something to train when no adapter is enabled
    return made


def states(model: nn.Module) -> dict[str, Any]:
    """Return every attribute of every module, and the items of those that are dicts, to see any change."""
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
