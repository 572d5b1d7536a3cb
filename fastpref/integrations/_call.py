"""One call of an attached model that is to be scored: its options, and what stands in for its head meanwhile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref._checks import describe
from fastpref._results import run_time_tuple
from fastpref._sharding import is_dtensor, whole
from fastpref.integrations import _head
from fastpref.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs

_SCORING = ("ignore_index", "shift", "temperature", "stats", "mode", "chunk_rows", "filter_eps")
_SEQUENCE = ("cu_seqlens", "ld_alpha", "shared_lengths")
# What a model's config says, and what would leave out logits that labels score.
_REFUSED = ("logit_scale", "softcap", "inplace_backward", "logits_to_keep", "num_logits_to_keep")


def _scoring_function(fastpref: object, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The function of hidden states, weight, labels and bias that a call asks for; takes its options from `kwargs`."""
    refused = [name for name in _REFUSED if name in kwargs]
    if refused:
        raise ValueError(f"with fastpref every label is scored, as the config says; got {', '.join(refused)}")
    if callable(fastpref):
        options = [name for name in (*_SCORING, *_SEQUENCE, "reduction") if name in kwargs]
        if options:
            raise ValueError(f"how to score is what the function given as fastpref says; got {', '.join(options)} too")
        return fastpref
    if fastpref is not True:
        raise TypeError(f"fastpref must be a bool, or a function to score with; got {describe(fastpref)}")
    reduction = kwargs.pop("reduction", None) or "none"
    options = {name: kwargs.pop(name) for name in _SCORING if name in kwargs}
    given = {name: kwargs.pop(name) for name in _SEQUENCE if name in kwargs}
    if reduction != "none":
        return functools.partial(linear_sequence_logprobs, reduction=reduction, **given, **options)
    if any(value is not None for value in given.values()):
        raise ValueError(f'{", ".join(_SEQUENCE)} are of sequences, and need reduction="sum" or "mean"; got none')
    return functools.partial(linear_token_logprobs, **options)


def _unsliced(hidden: Tensor) -> Tensor:
    """What models slice, `hidden[:, -n:]`, where the slice is all of it: FSDP warns of outputs that are views."""
    if torch.compiler.is_compiling() or not hidden._is_view():
        return hidden
    base = hidden._base
    same = base is not None and (base.shape, base.stride(), base.dtype) == (
        hidden.shape, hidden.stride(), hidden.dtype
    )  # fmt: skip
    return base if same and base is not None else hidden


class Call:
    """One scored call of a model: what stands in for its head's forward, and what the head was given and gave."""

    def __init__(self, model: Any, fastpref: object, kwargs: dict[str, Any]) -> None:
        self.function = _scoring_function(fastpref, kwargs)
        self.name = "logprobs" if fastpref is True else "scored"  # of what is one tensor
        self.labels = kwargs.pop("labels", None)
        if self.labels is None:
            raise ValueError("fastpref scores labels: pass labels=, aligned with input_ids; got none")
        self.transform = _head.logit_transform(model.config)
        self.patch, self.head, self.outermost = model._fastpref, _head.find(model), model.get_output_embeddings()
        # What dropout draws cannot be held against another draw.
        drops = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in self.head.modules())
        self.verifies = self.patch.verify and not drops
        self.calls, self.seen = 0, []

    def run(self, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own forward, with what its labels score where its logits were."""
        # The last hook, so that every other, those of FSDP and ZeRO among them, is given what is scored.
        with (
            _head.replaced_forward(self.head, self.score) as self.own_head,
            _head.replaced_forward(self.outermost, self.enter) as self.inside,
            _head.last_hook(self.outermost, self.take),
        ):
            output = own(*args, **kwargs)
        if not hasattr(output, "logits"):
            raise ValueError(f"fastpref needs the model's named outputs, return_dict=True; got {type(output)}")
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
        """In place of the outermost head's forward: that, or `score` if there is no other inside."""
        if kwargs:  # PEFT's, that choose an adapter for each sequence
            raise NotImplementedError(f"a head that is called with {', '.join(kwargs)} cannot be scored")
        return self.inside(hidden)

    def score(self, hidden: Tensor) -> Any:
        """In place of the head's forward: what its product would have been scored to."""
        self.calls += 1
        if self.verifies:
            with torch.no_grad():
                # Not scored rows: every rank of a sharded model must run the head as often as the others.
                self.rows = whole(self.own_head(hidden.flatten(0, -2)[:8]))
        return _head.multiply(self.head, hidden, self.of_weight)

    def of_weight(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
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

    def take(self, head: nn.Module, args: tuple[Any, ...], scored: Any) -> Tensor:
        """The hook that keeps what was scored, and gives the model a row or a few to go on with as its logits."""
        hidden = whole(args[0])
        self.seen.append((_unsliced(hidden), scored))
        if self.verifies:
            return _head.with_ramp(self.rows)[None]
        return hidden.new_zeros(1, 1, getattr(self.head, "base_layer", self.head).out_features)
