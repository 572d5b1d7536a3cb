"""The head of a transformers causal LM: which module it is, what it multiplies, and what the config makes of that.

A head is an `nn.Linear`, plain LoRA on one, or PEFT's copy of one that is trained whole: what is known to be a product,
which log-probs can be made from.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_LORA = re.compile(r"base_layer\.(weight|bias)|lora_A\.[^.]+\.weight|lora_B\.[^.]+\.(weight|bias)")


def find(model: Any) -> nn.Module:
    """The module that makes the logits. `NotImplementedError` unless it is a linear one, or LoRA on one."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT's copy that is trained whole
        active, copies = head.active_adapters, head.modules_to_save
        plain = head.disable_adapters or not active or any(name not in copies for name in active)
        head = head.original_module if plain else copies[active[0]]
    if hasattr(head, "base_layer"):
        unknown = [parameter for parameter, _ in head.named_parameters() if not _LORA.fullmatch(parameter)]
        if unknown or not hasattr(head, "lora_A") or getattr(head, "lora_variant", None):
            raise NotImplementedError(f"{_name(model, head)} is not plain LoRA, {', '.join(unknown)}: {head}")
    linear = getattr(head, "base_layer", head)
    # A quantised linear layer, or one that does more, has a forward or parameters of its own.
    names = {parameter for parameter, _ in linear.named_parameters()}
    if type(linear).forward is not nn.Linear.forward or not names <= {"weight", "bias"}:
        raise NotImplementedError(f"{_name(model, head)} must be a plain nn.Linear, or LoRA on one; got {linear}")
    return head


def _name(model: nn.Module, head: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is head), "head")


def logit_transform(config: Any) -> dict[str, Any]:
    """How a model with this config transforms its logits: `logit_scale` and `softcap`."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind, scale, softcap = getattr(config, "model_type", ""), 1.0, None
    # MPT's is never used; MiniCPM3 divides hidden states, before the head.
    for name in () if kind == "mpt" else _SCALES:
        scale *= 1.0 if getattr(config, name, None) is None else getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None and kind != "minicpm3":
        scale = scale * scaling if kind.startswith("hyperclovax") else scale / scaling
    for name in _SOFTCAPS:
        softcap = getattr(config, name, None) or softcap
    return {"logit_scale": scale, "softcap": softcap}


# Both of these write to the module's own dict and leave other dicts as they are. So they hold within one replica of
# DataParallel, which shares its hooks' dict with all others in other threads, and `torch.compile` can trace them.


@contextmanager
def replaced_forward(module: Any, function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Within it, calling the module runs `function` in place of its forward, between its hooks. Gives the forward."""
    # accelerate's hooks are a forward around the one it keeps.
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    before, forward = module.__dict__.get(name), getattr(module, name)
    module.__dict__[name] = function
    try:
        yield forward
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextmanager
def last_hook(module: Any, hook: Callable[[nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Within it, `hook(module, args, output)` runs on the module's output, after all its other hooks.

    Tensor parallelism's own hook, which places logits as a layout says, is left out: log-probs are whole on every rank.
    """
    hooks = module._forward_hooks
    others = [item for item in hooks.items() if getattr(item[1], "__module__", "") != "torch.distributed.tensor._api"]
    module._forward_hooks = OrderedDict([*others, ("fastpref", hook)])
    try:
        yield
    finally:
        module._forward_hooks = hooks


def multiply(head: Any, hidden: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
    """`function(hidden, weight, bias)` of what the head multiplies; call it in place of the head's forward.

    LoRA is one product more: [h, s·A(h)] @ [W, B]ᵀ. Added to W, in bf16, most of a small s·B@A would be rounded away.
    A frozen W is copied into [W, B], and the backward makes the gradient of [W, B] whole to keep that of B alone: what
    makes the gradients knows no weight of which only some columns are trained.
    """
    if not hasattr(head, "base_layer"):
        return function(hidden, head.weight, head.bias)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    skips = head.disable_adapters or head.merged
    adapters = [] if skips else [name for name in head.active_adapters if name in head.lora_A]

    def within(modules: Sequence[nn.Module], hidden: Tensor) -> Any:
        """Inside the calls of all modules whose weights are read, because their hooks may be what gathers them."""
        if modules:
            with replaced_forward(modules[0], partial(within, modules[1:])):
                return modules[0](hidden)
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

    return within([head.base_layer, *(head.lora_B[name] for name in adapters)], hidden)


def with_ramp(rows: Tensor) -> Tensor:
    """What a head gave, (R, V), and a row from −1000 to 1000, which shows a cap or bound that those never reach."""
    ramp = torch.linspace(-1000, 1000, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    return torch.cat([rows, ramp[None]])


def check_transform(logits: Tensor, products: Tensor, *, logit_scale: float, softcap: float | None) -> None:
    """Raise `NotImplementedError` unless a model's logits are the transform of `with_ramp(products)`."""
    z = with_ramp(products).double() * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    allowed = max(1e-2, 4 * torch.finfo(products.dtype).eps)
    if logits.shape == z.shape:
        off = (logits.double() - z).abs().amax(-1) / z.abs().amax(-1).clamp(min=1e-30)
        # A padded row may be NaN in both; what becomes of the last, the ramp, may not.
        if off[-1] <= allowed and not (off > allowed).any():
            return
    raise NotImplementedError(
        f"this model's logits are not hidden @ weight.T, times {logit_scale}, capped at {softcap}, as its config has "
        "it: its forward makes something else of them, and fastpref cannot score it"
    )
