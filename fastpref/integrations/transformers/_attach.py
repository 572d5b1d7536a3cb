"""Replace the class of a transformers causal LM by a subclass whose forward takes `fastpref=`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

from fastpref._core.checks import check_bool, check_positive
from fastpref.integrations.transformers import _head
from fastpref.integrations.transformers._call import Attachment, Call, CallOptions
from fastpref.integrations.transformers._copies import paths_to

_WRAPPERS = ("module", "_fsdp_wrapped_module", "_orig_mod")  # where DDP and DeepSpeed, FSDP, and compile keep a model


def attach(model: Any, *, verify: bool = True, logit_scale: float | None = None, softcap: float | None = None) -> Any:
    """Make a transformers causal LM able to return log-probs, without computing logits.

    `model(input_ids, ..., labels=labels, fastpref=True)` returns a named tuple: `logprobs`, the requested statistics,
    `last_hidden_state` (the head's input), and the model's own outputs except `loss` and `logits`, such as `aux_loss`,
    `past_key_values` and `hidden_states`. Such a scored call also takes ignore_index, shift, temperature, stats, mode,
    chunk_rows, filter_eps and scored_rows, as `linear_token_logprobs` does. With `reduction="sum"` or "mean" it returns
    log-probs of sequences, and also takes `linear_sequence_logprobs`' cu_seqlens, ld_alpha and shared_lengths.
    `shift_labels`, which transformers passes under context parallelism, are scored without a shift. All other arguments
    go to the model. A call without `fastpref` behaves as before. Threads may share one model, because calls do not
    change it.

    `fastpref` may also be a function, which is called in place of the head's product: `fastpref(hidden, weight, labels,
    bias=..., logit_scale=..., softcap=...)` with hidden (B, T, H), weight (V, H), labels (B, T), and bias (V,) or None;
    with `shift_labels`, also `shift=False`. It returns a named tuple of tensors, whose fields come first in the model's
    output, or one tensor, which the model returns as `scored`. The options above are then errors; bind them to the
    function. A loss that computes its gradients in the forward thus runs inside the model's forward, where DDP, FSDP
    and ZeRO expect it: `fastpref=functools.partial(linear_preference_loss, loss_fn=loss_fn, group_size=2)`.

    The head may be an `nn.Linear`, LoRA on one (with dropout), or one that PEFT trains through `modules_to_save` or
    `trainable_token_indices`. Forward hooks on the head may change the dtype of its output, and nothing else. Each call
    checks this, which synchronizes with the device, and breaks the graph of a compiled model. The documentation's page
    on `attach` lists what is not supported, and why.

    Training LoRA on the head costs as much as training the head. The backward computes one more product, 2·N·V·(H + r)
    flops for N scored rows, and needs memory for its V × (H + r) result and for a copy of the weight.

    The model's class is replaced by a subclass of the same name, so copies, pickles and replicas of the model score
    too.

    Args:
        model: a causal LM, or a PEFT model of one. Attach before DDP, FSDP or compile wrap it. A `forward` that was set
            on the instance before must be a method, a partial or a function.
            `torch.compile` captures plain and scored calls without graph breaks, except the check in the first scored
            call: with `fullgraph=True`, score once before compiling, or attach with `verify=False`. Before torch 2.12,
            a scored call breaks the graph, and `fullgraph=True` raises.
        verify: whether the first scored call checks, on eight rows of the batch and on one row from −1000 to 1000, that
            the model's logits are `hidden @ weight.T`, scaled and capped as stated here or in its config.
        logit_scale: the factor by which the model multiplies its logits, above 0. None: the config's.
        softcap: the value at which the model then caps them, above 0; inf for no cap. None: the config's.

    Returns:
        `model`, with its class replaced. Attaching again changes only a `logit_scale` or `softcap` that is given, and
        `verify` then applies to the next scored call. `detach` undoes it.

    Raises:
        TypeError: the model is not a decoder with a head, or is wrapped already; an option has a wrong type.
        ValueError: `logit_scale` or `softcap` is out of range; at a scored call, labels are missing, or a keyword is
            not supported.
        NotImplementedError: the head is not supported; at a scored call, the model does something else to its logits, a
            hook of the head changes them, the forward was replaced before by an object that is not a function, or
            PEFT's `adapter_names` choose adapters of the head for each sequence.
    """
    check_bool("verify", verify)
    transform = _stated(logit_scale, softcap)
    inner = _causal_lm(model)
    _head.find(inner)
    if not isinstance(inner, _Attached):
        own = inner.__dict__.pop("forward", None)
        paths = paths_to(inner, inner.get_output_embeddings())
        inner._fastpref = Attachment(paths, own, None if own is None else inner, verify, transform)
        inner.__class__ = _attached(type(inner))
    elif transform:
        transform = {**inner._fastpref.transform, **transform}
        inner._fastpref = dataclasses.replace(inner._fastpref, verify=verify, transform=transform)
    return model


def _stated(logit_scale: float | None, softcap: float | None) -> dict[str, Any]:
    """Return the parts of the logits' transform that are given, and so not taken from the config."""
    stated: dict[str, Any] = {}
    if logit_scale is not None:
        check_positive("logit_scale", logit_scale)
        stated["logit_scale"] = float(logit_scale)
    if softcap is not None:
        if softcap != math.inf:
            check_positive("softcap", softcap)
        stated["softcap"] = None if softcap == math.inf else float(softcap)
    return stated


def detach(model: Any) -> Any:
    """Undo `attach`: give the model its own class back, whose forward does not take `fastpref`.

    Args:
        model: the model that was passed to `attach`, not wrapped yet. A model that is not attached is not changed.

    Returns:
        `model`.

    Raises:
        TypeError: the model is not a decoder with a head, or is wrapped.
        ValueError: the model's forward or class was replaced after `attach`, and that replacement would be lost.
    """
    inner = _causal_lm(model)
    if isinstance(inner, _Attached):
        cls: Any = type(inner)
        ours = MethodType(cls.forward, inner)
        if "_own_class" not in vars(cls) or inner.__dict__.get("forward", ours) != ours:
            raise ValueError("the model's forward or class was patched again after attach: undo that first")
        inner.__dict__.pop("forward", None)
        inner.__class__ = cls._own_class
        if inner._fastpref.own is not None:
            inner.forward = inner._fastpref.own
        del inner._fastpref
    return model


class _Attached:
    """Base of an attached model's class, which adds a forward and pickling to the model's own class."""

    _own_class: type
    _fastpref: Attachment
    forward: Callable[..., Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # of type(model)(config) or type(model).from_pretrained
        super().__init__(*args, **kwargs)
        model: Any = self
        self._fastpref = Attachment(paths_to(model, model.get_output_embeddings()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "_own_class" not in vars(type(self)):  # a class derived from this one, such as FSDP2's
            return super().__reduce_ex__(protocol)
        _, _, *state = super().__reduce_ex__(2)
        return _blank, (self._own_class,), *state


def _blank(cls: type) -> Any:
    """Return an attached model of this class, without attributes, to unpickle into."""
    attached: Any = _attached(cls)
    return attached.__new__(attached)


@functools.cache
def _attached(cls: Any) -> type:
    """Return the subclass of a model's class that takes `fastpref=`."""

    # This makes a class, as FSDP2 does, and sets no forward on the instance: that would be bound to this model in a
    # replica of DataParallel, and would be lost to whatever replaces forward next.
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, fastpref: bool | Callable[..., Any] = False, **kwargs: Any) -> Any:
        if fastpref is False:
            return (self._fastpref.own or functools.partial(cls.forward, self))(*args, **kwargs)
        return Call(self, CallOptions.take(fastpref, kwargs)).run(cls.forward, args, kwargs)

    # Keep the model's signature, because trainers choose a batch's columns by it. Remove __wrapped__, because whatever
    # follows it, such as accelerate's unwrap_model, would lose this forward.
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_Attached, cls), {**names, "_own_class": cls, "forward": forward})


def _causal_lm(model: Any) -> Any:
    if any(name in getattr(model, "_modules", {}) for name in _WRAPPERS):
        raise TypeError(f"attach to the model before it is wrapped; got the wrapper, a {type(model).__name__}")
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    if not hasattr(inner, "get_output_embeddings") or inner.get_output_embeddings() is None:
        raise TypeError(f"model must be a transformers causal LM, with output embeddings; got a {type(inner).__name__}")
    if getattr(inner.config, "is_encoder_decoder", False):
        raise TypeError(f"model must be a decoder without an encoder; got an encoder-decoder, a {type(inner).__name__}")
    return inner
