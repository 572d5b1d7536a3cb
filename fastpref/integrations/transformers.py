"""Log-probs of a transformers causal LM without its logits: `attach(model)`, then `model(..., fastpref=True)`.

The model's own forward runs, and with it whatever hooks into it: DDP, FSDP, ZeRO, accelerate. Only the forward of its
head, the output embeddings, is another for that call: it makes log-probs from the weight. The model then goes on with
one row of zeros for logits. A head used outside its module's call would miss the hooks that gather its weight.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SCORING = ("ignore_index", "shift", "temperature", "stats", "mode", "chunk_rows", "filter_eps")
_SEQUENCE = ("cu_seqlens", "ld_alpha", "shared_lengths")
# What a model's config says, and what would leave out logits that labels score.
_REFUSED = ("logit_scale", "softcap", "inplace_backward", "logits_to_keep", "num_logits_to_keep")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_WRAPPERS = ("module", "_fsdp_wrapped_module", "_orig_mod")  # where DDP and DeepSpeed, FSDP, and compile keep a model
_LORA = re.compile(r"base_layer\.(weight|bias)|lora_A\.[^.]+\.weight|lora_B\.[^.]+\.(weight|bias)")


def attach(model: Any, *, verify: bool = True) -> Any:
    """Teach a transformers causal LM to return log-probs in place of logits, which it then never makes.

    `model(input_ids, ..., labels=labels, fastpref=True)` returns a named tuple: `logprobs`, the statistics asked for,
    `last_hidden_state` (what the head was given), and the model's own outputs except `loss` and `logits`: `aux_loss`,
    `past_key_values`, `hidden_states` and so on. It also takes `linear_token_logprobs`' ignore_index, shift,
    temperature, stats, mode, chunk_rows and filter_eps; and with `reduction="sum"` or "mean", which makes log-probs of
    sequences, `linear_sequence_logprobs`' cu_seqlens, ld_alpha and shared_lengths. A softcap or scale of the logits is
    the config's. Everything else goes to the model as ever, and a call without `fastpref=True` is as it was.

    LoRA on the head is computed, dropout too. So is a head that PEFT trains whole. Of other heads only `nn.Linear` is.

    Args:
        model: a causal LM, or a PEFT model of one. Attach before DDP, FSDP or compile wrap it; `copy.deepcopy` of an
            attached model is attached.
        verify: at the first scored call, hold what is known of this model's logits against its own head on eight rows,
            and against what its own forward makes of one row of logits between −1000 and 1000.

    Returns:
        `model`, its forward patched. Attaching again changes nothing; `detach` undoes it.

    Raises:
        TypeError: not a decoder with a head, or already wrapped.
        NotImplementedError: the head is not one that can be computed; at a scored call, the model makes of its logits
            something else than its config says.
    """
    inner = _causal_lm(model)
    _head(inner)
    if not _is_attached(inner):
        inner._fastpref = _Patch(inner.__dict__.get("forward"), verify)
        inner.forward = MethodType(_patched(type(inner)), inner)
    return model


def detach(model: Any) -> Any:
    """Undo `attach`. Returns the model."""
    inner = _causal_lm(model)
    if _is_attached(inner):
        own = inner._fastpref.own
        if own is None:
            del inner.forward
        else:
            inner.forward = own
        del inner._fastpref
    elif "_fastpref" in inner.__dict__:
        raise ValueError("the model's forward was patched again after attach: undo that first")
    return model


@dataclasses.dataclass
class _Patch:
    own: Callable[..., Any] | None  # an instance's own forward, such as accelerate's; None: the class's
    verify: bool


def _is_attached(model: nn.Module) -> bool:
    return hasattr(getattr(model.__dict__.get("forward"), "__func__", None), "is_fastpref")


def _patched(cls: type) -> Callable[..., Any]:
    # A method, and no closure over the model: a deep copy's forward must be the copy's. Its signature stays the
    # model's, because trainers choose a batch's columns by it.
    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, fastpref: bool = False, **kwargs: Any) -> Any:
        own = self._fastpref.own or MethodType(type(self).forward, self)
        return _Call(self, kwargs).run(own, args, kwargs) if fastpref else own(*args, **kwargs)

    forward.is_fastpref = True  # type: ignore[attr-defined]
    return forward


def _causal_lm(model: Any) -> Any:
    if any(name in getattr(model, "_modules", {}) for name in _WRAPPERS):
        raise TypeError(f"attach to the model before it is wrapped; got the wrapper, a {type(model).__name__}")
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        raise TypeError(f"model must be a transformers causal LM, with output embeddings; got a {type(inner).__name__}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise TypeError(f"model must be a decoder alone; got an encoder-decoder, a {type(inner).__name__}")
    return inner


def _head(model: Any) -> nn.Module:
    """The module that makes the logits, checked to be a linear one, or LoRA on one."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # PEFT's copy that is trained whole
        active, copies = head.active_adapters, head.modules_to_save
        plain = head.disable_adapters or not active or any(name not in copies for name in active)
        head = head.original_module if plain else copies[active[0]]
    name = next((name for name, module in model.named_modules() if module is head), "head")
    if hasattr(head, "base_layer"):
        unknown = [parameter for parameter, _ in head.named_parameters() if not _LORA.fullmatch(parameter)]
        if unknown or not hasattr(head, "lora_A") or getattr(head, "lora_variant", None):
            raise NotImplementedError(f"{name}, a {type(head).__name__}, is not plain LoRA: {', '.join(unknown)}")
    linear = getattr(head, "base_layer", head)
    # A quantised linear layer, or one that does more, has a forward or parameters of its own.
    names = {parameter for parameter, _ in linear.named_parameters()}
    if type(linear).forward is not nn.Linear.forward or not names <= {"weight", "bias"}:
        raise NotImplementedError(f"{name} must be a plain nn.Linear, or LoRA on one; got {linear}")
    return head


def _transform(config: Any) -> dict[str, Any]:
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


@contextmanager
def _forward(module: Any, function: Callable[[Tensor], Any]) -> Iterator[Callable[[Tensor], Any]]:
    """Within it, calling the module runs `function` in place of its forward, between its hooks. Gives the forward."""
    # accelerate's hooks are a forward around the one it keeps.
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    before, forward = module.__dict__.get(name), getattr(module, name)
    setattr(module, name, function)
    try:
        yield forward
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


def _multiply(head: Any, hidden: Tensor, function: Callable[[Tensor, Tensor, Tensor | None], Any]) -> Any:
    """`function(hidden, weight, bias)` of what the head multiplies, within its forward and that of what it is made of.

    LoRA is one product more: [h, s·A(h)] @ [W, B]ᵀ. Added to W, in bf16, most of a small s·B@A would be rounded away.
    """
    if not hasattr(head, "base_layer"):
        return function(hidden, head.weight, head.bias)
    if head.disable_adapters and head.merged:
        head.unmerge()  # as its own forward does
    skips = head.disable_adapters or head.merged
    adapters = [] if skips else [name for name in head.active_adapters if name in head.lora_A]

    def run(hidden: Tensor) -> Any:
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

    modules = (head.base_layer, *(head.lora_B[name] for name in adapters))
    return functools.reduce(lambda inner, module: functools.partial(_within, module, inner), modules, run)(hidden)


def _within(module: nn.Module, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    with _forward(module, function):
        return module(hidden)


class _Call:
    """One scored call of a model: what stands in for its head's forward, and what the head was given and gave."""

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        # Imported on use: the operators are not needed to attach.
        from fastpref.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs

        refused = [name for name in _REFUSED if name in kwargs]
        if refused:
            raise ValueError(f"with fastpref=True every label is scored, as the config says; got {', '.join(refused)}")
        self.labels = kwargs.pop("labels", None)
        if self.labels is None:
            raise ValueError("fastpref=True scores labels: pass labels=, aligned with input_ids; got none")
        reduction = kwargs.pop("reduction", None) or "none"
        options = {name: kwargs.pop(name) for name in (*_SCORING, *_SEQUENCE) if name in kwargs}
        if reduction != "none":
            options["reduction"] = reduction
        elif any(options.get(name) is not None for name in _SEQUENCE):
            raise ValueError(f'{", ".join(_SEQUENCE)} are of sequences, and need reduction="sum" or "mean"; got none')
        else:
            options = {name: value for name, value in options.items() if name not in _SEQUENCE}
        self.transform = _transform(model.config)
        function = linear_token_logprobs if reduction == "none" else linear_sequence_logprobs
        self.function = functools.partial(function, **options, **self.transform)
        self.patch, self.head, self.outermost = model._fastpref, _head(model), model.get_output_embeddings()
        # What dropout draws cannot be held against another draw.
        drops = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in self.head.modules())
        self.verifies = self.patch.verify and not drops
        self.seen: list[tuple[Tensor, Any]] = []

    def run(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own forward, with log-probs where its logits were."""
        with ExitStack() as stack:
            self.own_head = stack.enter_context(_forward(self.head, self.score))
            # The last hook, so that every other, those of FSDP and ZeRO among them, is given the log-probs.
            stack.callback(self.outermost.register_forward_hook(self.take).remove)
            output = own(*args, **kwargs)
        if not hasattr(output, "logits"):
            raise ValueError(f"fastpref=True needs the model's named outputs, return_dict=True; got {type(output)}")
        if len(self.seen) != 1:
            raise NotImplementedError(f"a head must be called once to be scored; this one was {len(self.seen)} times")
        if self.verifies:
            self.check(output.logits[0])
            self.patch.verify = False
        (hidden, scored), *_ = self.seen
        values = {"logprobs": scored} if isinstance(scored, Tensor) else scored._asdict()
        values["last_hidden_state"] = hidden
        for name in (field.name for field in dataclasses.fields(output)):
            if name not in ("loss", "logits"):
                values.setdefault(name, getattr(output, name))
        # A named tuple, because DDP and FSDP look for tensors in tuples and dicts, and in no other object.
        return _output_type(tuple(values))(*values.values())

    def score(self, hidden: Tensor) -> Any:
        """In place of the head's forward: log-probs."""
        if self.verifies:
            with torch.no_grad():
                # Not scored rows: every rank of a sharded model must run the head as often as the others.
                self.rows = self.own_head(hidden.reshape(-1, hidden.shape[-1])[:8])
        return _multiply(self.head, hidden, self.multiply)

    def multiply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        if hasattr(weight, "__tensor_flatten__"):
            raise NotImplementedError(f"the head's weight must be a plain tensor; got a {type(weight).__name__}")
        if self.verifies:
            with torch.no_grad():
                self.expected = F.linear(hidden.reshape(-1, hidden.shape[-1])[:8], weight, bias)
        scored = self.function(hidden, weight, self.labels.to(hidden.device), bias)
        # No views: writing to one would drop the hooks that FSDP puts on outputs to gather the weight again.
        return scored.clone() if isinstance(scored, Tensor) else scored._make(value.clone() for value in scored)

    def take(self, head: nn.Module, args: tuple[Any, ...], scored: Any) -> Tensor:
        """The hook that keeps the log-probs, and gives the model a row or a few to go on with as its logits."""
        self.seen.append((args[0], scored))
        if not self.verifies:
            return args[0].new_zeros(1, 1, getattr(self.head, "base_layer", self.head).out_features)
        ramp = torch.linspace(-1000, 1000, self.rows.shape[-1], dtype=self.rows.dtype, device=self.rows.device)
        self.expected = torch.cat([self.expected, ramp[None]])
        return torch.cat([self.rows, ramp[None]])[None]

    def check(self, own: Tensor) -> None:
        """Raise unless the model's own logits of a few rows are those its weight and config give."""
        scale, softcap = self.transform["logit_scale"], self.transform["softcap"]
        z = self.expected.double() * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        allowed = max(1e-2, 4 * torch.finfo(self.rows.dtype).eps)
        if own.shape == z.shape:
            off = (own.double() - z).abs().amax(-1) / z.abs().amax(-1).clamp(min=1e-30)
            # A padded row may be NaN in both; what becomes of the last, the one between −1000 and 1000, may not.
            if off[-1] <= allowed and not (off > allowed).any():
                return
        raise NotImplementedError(
            f"this model's logits are not hidden @ weight.T, times {scale}, capped at {softcap}, as its config has it: "
            "its forward makes something else of them, and fastpref cannot score it"
        )


@functools.cache
def _output_type(fields: tuple[str, ...]) -> Any:
    return namedtuple("ScoredOutput", fields)
