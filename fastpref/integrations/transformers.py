"""Log-probs of a transformers causal LM without its logits: `attach(model)`, then `model(..., fastpref=True)`.

The model's own forward runs, and with it whatever hooks into it: DDP, FSDP, ZeRO, accelerate. Only the forward of its
head, the output embeddings, is another for that call: it makes log-probs from the weight. The model then goes on with
one row of zeros for logits. A head used outside its module's call would miss the hooks that gather its weight.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref._results import result_type
from fastpref.integrations import _head
from fastpref.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs

_SCORING = ("ignore_index", "shift", "temperature", "stats", "mode", "chunk_rows", "filter_eps")
_SEQUENCE = ("cu_seqlens", "ld_alpha", "shared_lengths")
# What a model's config says, and what would leave out logits that labels score.
_REFUSED = ("logit_scale", "softcap", "inplace_backward", "logits_to_keep", "num_logits_to_keep")
_WRAPPERS = ("module", "_fsdp_wrapped_module", "_orig_mod")  # where DDP and DeepSpeed, FSDP, and compile keep a model


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
    _head.find(inner)
    if not _is_attached(inner):
        inner._fastpref = _Patch(inner.__dict__.get("forward"), verify)
        inner.forward = MethodType(_patched(type(inner)), inner)
    return model


def detach(model: Any) -> Any:
    """Undo `attach`: the model's forward is its own again, and `fastpref` no longer one of its arguments.

    Args:
        model: what `attach` was given, not yet wrapped; one that is not attached is left as it is.

    Returns:
        `model`.

    Raises:
        TypeError: not a decoder with a head, or wrapped.
        ValueError: the model's forward was patched again after `attach`, and that patch would be lost.
    """
    inner = _causal_lm(model)
    if _is_attached(inner):
        del inner.forward
        if inner._fastpref.own is not None:
            inner.forward = inner._fastpref.own
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


def _scoring_function(kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The function of hidden states, weight, labels and bias that a call asks for; takes its options from `kwargs`."""
    refused = [name for name in _REFUSED if name in kwargs]
    if refused:
        raise ValueError(f"with fastpref=True every label is scored, as the config says; got {', '.join(refused)}")
    reduction = kwargs.pop("reduction", None) or "none"
    options = {name: kwargs.pop(name) for name in _SCORING if name in kwargs}
    given = {name: kwargs.pop(name) for name in _SEQUENCE if name in kwargs}
    if reduction != "none":
        return functools.partial(linear_sequence_logprobs, reduction=reduction, **given, **options)
    if any(value is not None for value in given.values()):
        raise ValueError(f'{", ".join(_SEQUENCE)} are of sequences, and need reduction="sum" or "mean"; got none')
    return functools.partial(linear_token_logprobs, **options)


class _Call:
    """One scored call of a model: what stands in for its head's forward, and what the head was given and gave."""

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        self.function = _scoring_function(kwargs)
        self.labels = kwargs.pop("labels", None)
        if self.labels is None:
            raise ValueError("fastpref=True scores labels: pass labels=, aligned with input_ids; got none")
        self.transform = _head.logit_transform(model.config)
        self.patch, self.head, self.outermost = model._fastpref, _head.find(model), model.get_output_embeddings()
        # What dropout draws cannot be held against another draw.
        drops = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in self.head.modules())
        self.verifies = self.patch.verify and not drops
        self.seen: list[tuple[Tensor, Any]] = []

    def run(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own forward, with log-probs where its logits were."""
        # The last hook, so that every other, those of FSDP and ZeRO among them, is given the log-probs.
        last_hook = self.outermost.register_forward_hook(self.take)
        with last_hook, _head.replaced_forward(self.head, self.score) as self.own_head:
            output = own(*args, **kwargs)
        if not hasattr(output, "logits"):
            raise ValueError(f"fastpref=True needs the model's named outputs, return_dict=True; got {type(output)}")
        if len(self.seen) != 1:
            raise NotImplementedError(f"a head must be called once to be scored; this one was {len(self.seen)} times")
        if self.verifies:
            _head.check_transform(output.logits[0], self.products, **self.transform)
            self.patch.verify = False
        (hidden, scored), *_ = self.seen
        values = {"logprobs": scored} if isinstance(scored, Tensor) else scored._asdict()
        values["last_hidden_state"] = hidden
        for name in (field.name for field in dataclasses.fields(output)):
            if name not in ("loss", "logits"):
                values.setdefault(name, getattr(output, name))
        # A named tuple, because DDP and FSDP look for tensors in tuples and dicts, and in no other object.
        return result_type(tuple(values)[1:])(*values.values())

    def score(self, hidden: Tensor) -> Any:
        """In place of the head's forward: log-probs."""
        if self.verifies:
            with torch.no_grad():
                # Not scored rows: every rank of a sharded model must run the head as often as the others.
                self.rows = self.own_head(hidden.flatten(0, -2)[:8])
        return _head.multiply(self.head, hidden, self.logprobs)

    def logprobs(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        if hasattr(weight, "__tensor_flatten__"):
            raise NotImplementedError(f"the head's weight must be a plain tensor; got a {type(weight).__name__}")
        if self.verifies:
            with torch.no_grad():
                self.products = F.linear(hidden.flatten(0, -2)[:8], weight, bias)
        scored = self.function(hidden, weight, self.labels.to(hidden.device), bias, **self.transform)
        # No views: writing to one would drop the hooks that FSDP puts on outputs to gather the weight again.
        return scored.clone() if isinstance(scored, Tensor) else scored._make(value.clone() for value in scored)

    def take(self, head: nn.Module, args: tuple[Any, ...], scored: Any) -> Tensor:
        """The hook that keeps the log-probs, and gives the model a row or a few to go on with as its logits."""
        self.seen.append((args[0], scored))
        if self.verifies:
            return _head.with_ramp(self.rows)[None]
        return args[0].new_zeros(1, 1, getattr(self.head, "base_layer", self.head).out_features)
