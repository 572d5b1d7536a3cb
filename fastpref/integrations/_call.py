"""One scored call of an attached model: its options, and the copy of the model that runs with another head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref._checks import INTEGER, check_tensor, describe
from fastpref._results import run_time_tuple
from fastpref._sharding import is_dtensor, whole
from fastpref.integrations import _head
from fastpref.integrations._rebind import rebind
from fastpref.integrations._stand_in import (
    forward_name,
    graft,
    keep_attributes,
    leads_to,
    paths_to,
    run_users_hooks,
    stand_in,
    users_hooks,
)
from fastpref.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs

_SCORING = ("ignore_index", "shift", "temperature", "stats", "mode", "chunk_rows", "filter_eps", "scored_rows")
_SEQUENCE = ("cu_seqlens", "ld_alpha", "shared_lengths")
# Keywords of models' forwards and of these functions that a scored call cannot follow, and why.
_REFUSED = {
    "logit_scale": "attach takes it, once for the model",
    "softcap": "attach takes it, once for the model",
    "inplace_backward": "no logits exist",
    "logits_to_keep": "every label is scored",
    "num_logits_to_keep": "every label is scored",
    "skip_logits": "no logits exist",
    "num_items_in_batch": "it divides a loss, and a scored call returns log-probs or what its function makes of them",
}


def _labels(kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Take the labels that a call scores from `kwargs`, and whether they are shifted already."""
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    if shifted is not None:  # as a transformers model, which then does not look at labels
        if kwargs.get("shift"):
            raise ValueError("shift_labels are shifted already; got shift=True too")
        labels = shifted
    if labels is None:
        raise ValueError("fastpref scores labels: pass labels=, aligned with input_ids, or shift_labels=; got none")
    name = "labels" if shifted is None else "shift_labels"
    check_tensor(name, labels, INTEGER, "an int64 or int32 tensor of input_ids' shape")
    return labels, shifted is not None


def _scoring_function(fastpref: object, shifted: bool, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Return the function of hidden states, weight, labels and bias that a call asks for.

    It takes its options from `kwargs`. Whether the labels are `shifted` already is one of them.
    """
    for name, reason in _REFUSED.items():
        value = kwargs.get(name)
        if value is not None and not (isinstance(value, int) and value == 0):  # 0 and False ask for nothing
            raise ValueError(f"a scored call takes no {name}: {reason}; got {name}={describe(value)}")
    if callable(fastpref):
        options = [name for name in (*_SCORING, *_SEQUENCE, "reduction") if name in kwargs]
        if options:
            raise ValueError(
                "with a function as fastpref=, bind options of scoring to the function (functools.partial); got "
                f"{', '.join(options)} at the call"
            )
        return functools.partial(fastpref, shift=False) if shifted else fastpref
    if fastpref is not True:
        raise TypeError(f"fastpref must be a bool, or a function to score with; got {describe(fastpref)}")
    reduction = kwargs.pop("reduction", None)
    options = {name: kwargs.pop(name) for name in _SCORING if name in kwargs}
    if shifted:
        options["shift"] = False
    given = {name: kwargs.pop(name) for name in _SEQUENCE if name in kwargs}
    if reduction not in (None, "none"):
        return functools.partial(linear_sequence_logprobs, reduction=reduction, **given, **options)
    if any(value is not None for value in given.values()):
        raise ValueError(f'{", ".join(_SEQUENCE)} are of sequences, and need reduction="sum" or "mean"; got none')
    return functools.partial(linear_token_logprobs, **options)


def _unsliced(hidden: Tensor) -> Tensor:
    """Return the tensor of which `hidden` is a slice that leaves nothing out: FSDP warns of outputs that are views."""
    if torch.compiler.is_compiling() or not hidden._is_view():
        return hidden
    base = hidden._base
    same = base is not None and (base.shape, base.stride(), base.dtype) == (
        hidden.shape, hidden.stride(), hidden.dtype
    )  # fmt: skip
    return base if same and base is not None else hidden


class Call:
    """One scored call of a model: the forwards of its head's copy, and what the head was given and gave."""

    def __init__(self, model: Any, fastpref: object, kwargs: dict[str, Any]) -> None:
        self.labels, shifted = _labels(kwargs)
        self.function = _scoring_function(fastpref, shifted, kwargs)
        self.name = "logprobs" if fastpref is True else "scored"  # of what is one tensor
        self.model, self.patch = model, model._fastpref
        self.transform = {**_head.logit_transform(model.config), **self.patch.transform}
        self.head, self.outermost = _head.find(model), model.get_output_embeddings()
        # What dropout draws cannot be held against another draw.
        drops = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in self.head.modules())
        self.verifies = self.patch.verify and not drops
        self.calls, self.seen = 0, []

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `forward`, the one of the model's class, and return what its labels score where its logits were."""
        paths = self.patch.paths
        if not paths or not all(leads_to(self.model, path, self.outermost) for path in paths):
            paths = paths_to(self.model, self.outermost)
        made = graft(self.model, paths, stand_in(self.outermost, self.enter, self.take))
        if self.patch.own is None:
            output = forward(made, *args, **kwargs)
        else:
            output = rebind(self.patch.own, self.patch.owner, made)(*args, **kwargs)
        keep_attributes(made, self.model, paths)
        if not hasattr(output, "logits"):
            raise ValueError(f"fastpref needs the model's named outputs, return_dict=True; got {type(output)}")
        if self.calls == 0 and self.patch.own is not None:
            raise NotImplementedError(
                f"the model's forward was replaced before attach by a {type(self.patch.own).__name__}, which holds the "
                "model in a way that cannot be followed; attach first, and replace it then"
            )
        if self.calls != 1 or len(self.seen) != 1:
            raise NotImplementedError(f"a head must be called once to be scored; this one was {self.calls} times")
        (hidden, scored), *_ = self.seen
        values = {self.name: scored} if isinstance(scored, Tensor) else scored._asdict()
        values.setdefault("last_hidden_state", hidden)
        for name in (field.name for field in dataclasses.fields(output)):
            if name not in ("loss", "logits"):
                values.setdefault(name, getattr(output, name))
        # A named tuple, because DDP and FSDP look for tensors in tuples and dicts, and in no other object.
        result = run_time_tuple("Scored", tuple(values))(*values.values())
        if self.verifies:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg="the first scored call is checked: score once before fullgraph=True")
            _head.check_transform(output.logits[0], self.products, **self.transform)
            self.patch.verify = False
        return result

    def enter(self, hidden: Tensor, **kwargs: Any) -> Any:
        """Run in place of the outermost head's forward, around `score`."""
        if kwargs:  # PEFT's, that choose an adapter for each sequence
            raise NotImplementedError(f"a head that is called with {', '.join(kwargs)} cannot be scored")
        if self.head is self.outermost:
            return self.score(hidden)
        return stand_in(self.head, self.score, _head.check_hooks)(hidden)

    def score(self, hidden: Tensor) -> Any:
        """Score what the head is given, in place of its forward."""
        self.calls += 1
        if self.verifies:
            own = getattr(self.head, forward_name(self.head))
            with torch.no_grad():
                # Not scored rows: every rank of a sharded model must run the head as often as the others.
                self.rows = whole(own(hidden.flatten(0, -2)[:8]))
        return _head.multiply(self.head, hidden, self.of_weight)

    def of_weight(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        """Return what the labels score with these hidden states, weight and bias."""
        if hasattr(weight, "__tensor_flatten__") and not is_dtensor(weight):
            raise NotImplementedError(f"the head's weight must be a plain tensor; got a {type(weight).__name__}")
        if self.verifies:
            with torch.no_grad():
                self.products = whole(F.linear(hidden.flatten(0, -2)[:8], weight, bias))
        scored = self.function(hidden, weight, self.labels.to(hidden.device), bias=bias, **self.transform)
        # No views: writing to one would drop the hooks that FSDP puts on outputs to gather the weight again.
        if isinstance(scored, Tensor):
            return scored.clone()
        if not hasattr(scored, "_make") or not all(isinstance(value, Tensor) for value in scored):
            raise TypeError(f"fastpref must score to a tensor, or a named tuple of tensors; got {describe(scored)}")
        return scored._make(value.clone() for value in scored)

    def take(self, head: Any, args: tuple[Any, ...], scored: Any) -> Tensor:
        """Keep what was scored, and return a row or a few for the model to go on with as its logits."""
        hidden = whole(args[0])
        self.seen.append((_unsliced(hidden), scored))
        vocabulary = getattr(self.head, "base_layer", self.head).out_features
        if self.verifies:
            logits = _head.with_ramp(self.rows)[None]
        elif users_hooks(head._forward_hooks):
            logits = _head.with_ramp(hidden.new_zeros(0, vocabulary))[None]
        else:
            return hidden.new_zeros(1, 1, vocabulary)
        return run_users_hooks(head, args, logits)
