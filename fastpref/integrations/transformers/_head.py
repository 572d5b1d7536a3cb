"""The head of a transformers causal LM: find it, get the operands of its product, and check the logits' transform.

A supported head is an `nn.Linear`, plain LoRA on one, one with PEFT's trainable tokens, or PEFT's fully trained copy of
one. The output of each is one matrix product, from whose operands log-probs can be computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.integrations.transformers._copies import (
    copy_with_forward,
    forward_name,
    run_users_hooks,
    users_hooks,
)

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_ADAPTERS = {  # the attribute that identifies a kind of PEFT's layers, and the parameters that such a layer may have
    "lora_A": re.compile(r"base_layer\.(weight|bias)|lora_A\.[^.]+\.weight|lora_B\.[^.]+\.(weight|bias)"),
    "trainable_tokens_delta": re.compile(r"base_layer\.weight|trainable_tokens_delta\.[^.]+"),
}


def find(model: Any) -> nn.Module:
    """Return the module that computes the logits.

    Raises:
        NotImplementedError: the module is not an `nn.Linear`, nor plain LoRA or trainable tokens on one.
    """
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT's fully trained copy
        active, copies = head.active_adapters, head.modules_to_save
        plain = head.disable_adapters or not active or any(name not in copies for name in active)
        head = head.original_module if plain else copies[active[0]]
    head = getattr(head, "token_adapter", head)  # PEFT's trainable tokens
    if hasattr(head, "base_layer"):
        known = next((names for kind, names in _ADAPTERS.items() if hasattr(head, kind)), None)
        unknown = [name for name, _ in head.named_parameters() if known is None or not known.fullmatch(name)]
        unknown += [f"lora_variant {name}" for name in getattr(head, "lora_variant", None) or ()]
        if unknown:
            raise NotImplementedError(
                f"{_name(model, head)} must be plain LoRA or PEFT's trainable tokens on an nn.Linear; got "
                f"{', '.join(unknown)} in {head}"
            )
    linear = getattr(head, "base_layer", head)
    # A quantised linear layer, or one that computes something else, has a forward or parameters of its own.
    names = {parameter for parameter, _ in linear.named_parameters()}
    if type(linear).forward is not nn.Linear.forward or not names <= {"weight", "bias"}:
        raise NotImplementedError(
            f"{_name(model, head)} must be a plain nn.Linear, or LoRA or trainable tokens on one; got {linear}"
        )
    for module in (head, linear):
        own = module.__dict__.get(forward_name(module))
        if own is not None and getattr(own, "__func__", None) is not type(module).forward:
            raise NotImplementedError(f"{_name(model, head)} must have the forward of its class; got {own}")
    return head


def _name(model: nn.Module, head: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is head), "head")


def logit_transform(config: Any) -> dict[str, Any]:
    """Return the `logit_scale` and `softcap` that a model with this config applies to its logits."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind, scale, softcap = getattr(config, "model_type", ""), 1.0, None
    # MPT never uses its logit_scale; MiniCPM3 divides hidden states, before the head.
    for name in () if kind == "mpt" else _SCALES:
        scale *= 1.0 if getattr(config, name, None) is None else getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None and kind != "minicpm3":
        scale = scale * scaling if kind.startswith("hyperclovax") else scale / scaling
    for name in _SOFTCAPS:
        softcap = getattr(config, name, None) or softcap
    return {"logit_scale": scale, "softcap": softcap}


def multiply(head: Any, hidden: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
    """Return `function(hidden, weight, bias)` with the operands of the head's product.

    This runs in place of the head's forward. With LoRA, the operands are concatenated: [h, s·A(h)] @ [W, B]ᵀ. Adding
    s·B@A to W in bf16 would round most of it away. A frozen W is copied into [W, B], and the backward computes the
    gradient of all of [W, B] and keeps that of B, because gradients for some columns only are not supported.
    """
    if not hasattr(head, "base_layer"):
        return function(hidden, head.weight, head.bias)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    chosen = [] if head.disable_adapters or head.merged else head.active_adapters
    if hasattr(head, "trainable_tokens_delta"):
        compute = partial(_multiply_tokens, head, chosen, function)
        return _within([head.base_layer], compute, hidden)
    adapters = [name for name in chosen if name in head.lora_A]
    modules = [head.base_layer, *(head.lora_B[name] for name in adapters)]
    for module in modules if adapters else ():
        for hook in users_hooks(module._forward_pre_hooks).values():
            raise NotImplementedError(
                f"the head's {module} has a forward pre-hook, {hook}, which would also change the hidden states of the "
                "other parts of LoRA, because a scored call multiplies all parts at once; remove the hook, or register "
                "it on the head itself"
            )
    return _within(modules, partial(_multiply_lora, head, adapters, function), hidden)


def _within(modules: Sequence[nn.Module], compute: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Run `compute` inside calls of all modules whose weights it reads, because their hooks may gather the weights."""
    if not modules:
        return compute(hidden)
    return copy_with_forward(modules[0], partial(_within, modules[1:], compute), check_hooks)(hidden)


def _multiply_tokens(head: Any, chosen: Sequence[str], function: Callable[..., Any], hidden: Tensor) -> Any:
    linear = head.base_layer
    if not chosen:
        return function(hidden, linear.weight, linear.bias)
    return function(hidden, head.get_merged_weights(chosen), None)  # PEFT ignores the bias here


def _multiply_lora(head: Any, adapters: Sequence[str], function: Callable[..., Any], hidden: Tensor) -> Any:
    linear = head.base_layer
    columns, weights, bias = [hidden], [linear.weight], linear.bias
    for name in adapters:
        down, up, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        low = down(head.lora_dropout[name](hidden.to(down.weight.dtype))) * scaling
        columns.append(low.to(hidden.dtype))
        weights.append(up.weight.to(linear.weight.dtype))
        if up.bias is not None:
            added = (up.bias * scaling).to(linear.weight.dtype)
            bias = added if bias is None else bias + added
    if not adapters:
        return function(hidden, linear.weight, bias)
    return function(torch.cat(columns, -1), torch.cat(weights, 1), bias)


def check_hooks(linear: Any, args: Any, output: Any) -> None:
    """Raise `NotImplementedError` if a forward hook of a linear module changes its output, other than its dtype."""
    del output
    if users_hooks(linear._forward_hooks):
        weight = linear.weight
        run_users_hooks(linear, args, with_ramp(weight.new_zeros(0, linear.out_features, dtype=args[0].dtype))[None])


def with_ramp(rows: Tensor) -> Tensor:
    """Return a head's output (R, V) and a row from −1000 to 1000, which shows a cap that the others never reach."""
    ramp = torch.linspace(-1000, 1000, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return torch.cat([rows, ramp[None]])


def check_transform(logits: Tensor, products: Tensor, *, logit_scale: float, softcap: float | None) -> None:
    """Raise `NotImplementedError` unless a model's logits are `with_ramp(products)`, scaled and capped as stated."""
    z = with_ramp(products).double() * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    allowed = max(1e-2, 4 * torch.finfo(products.dtype).eps)
    if logits.shape == z.shape:
        off = (logits.double() - z).abs().amax(-1) / z.abs().amax(-1).clamp(min=1e-30)
        # A padded row may be NaN in both. The last row, the ramp, may not be.
        if off[-1] <= allowed and not (off > allowed).any():
            return
    raise NotImplementedError(
        f"this model's logits are not hidden @ weight.T, times logit_scale={logit_scale}, capped at softcap={softcap}: "
        "its forward does something else to them. If it scales or caps them differently from its config, pass the "
        "values that it uses: attach(model, logit_scale=..., softcap=...)"
    )
