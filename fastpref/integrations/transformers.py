"""Log-probs of a transformers causal LM without its logits: `attach(model)`, then `model(..., fastpref=True)`.

A scored call runs the model's own forward, and with it whatever hooks into it: DDP, FSDP, ZeRO, accelerate. It runs on
a shallow copy of the model, whose head, the output embeddings, has another forward: it makes log-probs from the weight,
or what a function given as `fastpref` makes of it, such as a loss. The copy goes on with one row of zeros for logits.
A head used outside its module's call would miss the hooks that gather its weight.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

from fastpref._checks import check_bool, check_positive
from fastpref.integrations import _head
from fastpref.integrations._call import Call
from fastpref.integrations._stand_in import paths_to

_WRAPPERS = ("module", "_fsdp_wrapped_module", "_orig_mod")  # where DDP and DeepSpeed, FSDP, and compile keep a model


def attach(model: Any, *, verify: bool = True, logit_scale: float | None = None, softcap: float | None = None) -> Any:
    """Teach a transformers causal LM to return log-probs in place of logits, which it then never makes.

    `model(input_ids, ..., labels=labels, fastpref=True)` returns a named tuple: `logprobs`, the statistics asked for,
    `last_hidden_state` (what the head was given), and the model's own outputs except `loss` and `logits`: `aux_loss`,
    `past_key_values`, `hidden_states` and so on. It also takes `linear_token_logprobs`' ignore_index, shift,
    temperature, stats, mode, chunk_rows, filter_eps and scored_rows; and with `reduction="sum"` or "mean", which makes
    log-probs of sequences, `linear_sequence_logprobs`' cu_seqlens, ld_alpha and shared_lengths. `shift_labels`, which
    transformers passes under context parallelism, are scored as they are. All other arguments go to the model, and a
    call without `fastpref` behaves as before. No call changes what calls share, so threads may use one model.

    `fastpref` may also be a function, called where the head's product would be: `fastpref(hidden, weight, labels,
    bias=..., logit_scale=..., softcap=...)` with hidden (B, T, H), weight (V, H), labels (B, T), and bias (V,) or None;
    with `shift_labels` also `shift=False`. It returns a named tuple of tensors, whose fields are the first of what the
    model returns, or one tensor, which the model returns as `scored`. The function says how to score, and the options
    above are refused. So a loss that makes its gradients in the forward stays where DDP, FSDP and ZeRO expect it,
    inside the model's: `fastpref=functools.partial(linear_preference_loss, loss_fn=loss_fn, group_size=2)`.

    The head may be an `nn.Linear`, LoRA on one (with dropout), or one that PEFT trains through `modules_to_save` or
    `trainable_token_indices`. Forward hooks on the head may cast its output, and may not change it: that is checked at
    every call, which waits for the device, and in a compiled model breaks the graph. The documentation's page on
    `attach` lists all that is refused, and why.

    Training LoRA on the head costs as much as training the head: one more product of it in the backward, 2·N·V·(H + r)
    flops for N scored rows, and its V × (H + r) sums while it runs; also a copy of the weight, kept for the backward.

    The model's class becomes a subclass of it, of the same name, so a copy, pickle or replica of the model scores too.

    Args:
        model: a causal LM, or a PEFT model of one. Attach before DDP, FSDP or compile wrap it. A `forward` that was put
            on it before must be a method, a partial or a function.
            `torch.compile` traces plain and scored calls whole, but for the check of the first scored one: with
            `fullgraph=True`, score once before compiling, or attach with `verify=False`. Before torch 2.12 a scored
            call breaks the graph, and `fullgraph=True` raises.
        verify: whether to check at the first scored call, on eight rows of the batch and one row from −1000 to 1000,
            that the model's logits are `hidden @ weight.T`, scaled and capped as stated here or by its config.
        logit_scale: what the model multiplies its logits by, above 0. None: as its config says.
        softcap: what it then caps them at, above 0; inf: no cap. None: as its config says.

    Returns:
        `model`, its class replaced. Attaching again changes only a `logit_scale` or `softcap` that is given, and then
        `verify` holds for the next scored call. `detach` undoes it.

    Raises:
        TypeError: not a decoder with a head, already wrapped, or an option of a wrong type.
        ValueError: `logit_scale` or `softcap` is out of range; at a scored call, labels are missing, or a keyword is
            given that it cannot follow.
        NotImplementedError: the head is not one that can be computed; at a scored call, the model makes something else
            of its logits, a hook of the head does more than to cast them, the forward was replaced before by what is no
            function, or PEFT's `adapter_names` choose adapters of the head by the sequence.
    """
    check_bool("verify", verify)
    transform = _stated(logit_scale, softcap)
    inner = _causal_lm(model)
    _head.find(inner)
    if not isinstance(inner, _Attached):
        own = inner.__dict__.pop("forward", None)
        paths = paths_to(inner, inner.get_output_embeddings())
        inner._fastpref = _Patch(paths, own, None if own is None else inner, verify, transform)
        inner.__class__ = _attached(type(inner))
    elif transform:
        transform = {**inner._fastpref.transform, **transform}
        inner._fastpref = dataclasses.replace(inner._fastpref, verify=verify, transform=transform)
    return model


def _stated(logit_scale: float | None, softcap: float | None) -> dict[str, Any]:
    """Return the parts of the logits' transform that are not left to the config."""
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
    """Undo `attach`: the model's class is its own again, and `fastpref` no longer one of its arguments.

    Args:
        model: what `attach` was given, not yet wrapped; one that is not attached is left as it is.

    Returns:
        `model`.

    Raises:
        TypeError: not a decoder with a head, or wrapped.
        ValueError: the model's forward was patched, or its class replaced, after `attach`, which would be lost.
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


@dataclasses.dataclass
class _Patch:
    paths: tuple[tuple[str, ...], ...]  # where the model holds its head
    own: Callable[..., Any] | None = None  # an instance's own forward, such as accelerate's; None: the class's
    owner: Any = None  # the model that `own` holds
    verify: bool = True
    transform: dict[str, Any] = dataclasses.field(default_factory=dict)  # stated to attach, in place of the config's


class _Attached:
    """What an attached model's class adds to the model's own: a `forward` of its own, and how to pickle it."""

    _own_class: type
    _fastpref: _Patch
    forward: Callable[..., Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # of type(model)(config) or type(model).from_pretrained
        super().__init__(*args, **kwargs)
        model: Any = self
        self._fastpref = _Patch(paths_to(model, model.get_output_embeddings()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "_own_class" not in vars(type(self)):  # a class made of this one, such as FSDP2's
            return super().__reduce_ex__(protocol)
        _, _, *state = super().__reduce_ex__(2)
        return _blank, (self._own_class,), *state


def _blank(cls: type) -> Any:
    attached: Any = _attached(cls)
    return attached.__new__(attached)


@functools.cache
def _attached(cls: Any) -> type:
    # A class, as FSDP2 makes one, and no forward of the instance: that would be bound to this model in a replica of
    # DataParallel, and replaced unseen by whatever patches forward next.
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, fastpref: bool | Callable[..., Any] = False, **kwargs: Any) -> Any:
        if fastpref is False:
            return (self._fastpref.own or functools.partial(cls.forward, self))(*args, **kwargs)
        return Call(self, fastpref, kwargs).run(cls.forward, args, kwargs)

    # Its signature stays the model's, because trainers choose a batch's columns by it. What follows __wrapped__, as
    # accelerate's unwrap_model does, would lose this forward.
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
        raise TypeError(f"model must be a decoder alone; got an encoder-decoder, a {type(inner).__name__}")
    return inner
