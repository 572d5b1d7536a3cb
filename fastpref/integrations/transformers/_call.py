"""Run one scored call of an attached model: read its options, and run a copy of the model with another head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref._core.checks import INTEGER, check_tensor, describe
from fastpref._core.results import run_time_tuple
from fastpref._core.sharding import is_dtensor, whole
from fastpref.integrations.transformers import _head
from fastpref.integrations.transformers._copies import (
    copy_with_forward,
    copy_with_module,
    forward_name,
    keep_attributes,
    leads_to,
    paths_to,
    run_users_hooks,
    users_hooks,
)
from fastpref.integrations.transformers._rebind import rebind
from fastpref.linear_logprobs import linear_sequence_logprobs, linear_token_logprobs

TOKEN_OPTIONS = ("ignore_index", "shift", "temperature", "stats", "mode", "chunk_rows", "filter_eps", "scored_rows")
SEQUENCE_OPTIONS = ("cu_seqlens", "ld_alpha", "shared_lengths")
# Keywords of models' forwards, or of the functions that score, that a scored call does not support, and why.
UNSUPPORTED = {
    "logit_scale": "pass it to attach, once for the model",
    "softcap": "pass it to attach, once for the model",
    "inplace_backward": "there are no logits",
    "logits_to_keep": "every label is scored",
    "num_logits_to_keep": "every label is scored",
    "skip_logits": "there are no logits",
    "num_items_in_batch": "it divides a loss, and a scored call returns log-probs or the result of the given function",
}


@dataclasses.dataclass
class Attachment:
    """The state that `attach` keeps on a model.

    Args:
        paths: where the model holds its head.
        own: a forward that was set on the instance before `attach`, such as accelerate's. None: the class's forward.
        owner: the model that `own` holds.
        verify: whether the next scored call checks the head's product and the logits' transform.
        transform: the parts of the logits' transform that were passed to `attach`, in place of the config's.
    """

    paths: tuple[tuple[str, ...], ...]
    own: Callable[..., Any] | None = None
    owner: Any = None
    verify: bool = True
    transform: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """The options of a scored call.

    Args:
        labels: the labels to score.
        function: computes the result from hidden states, weight, labels, bias and the logits' transform.
        name: the name of the result if it is one tensor.
    """

    labels: Tensor
    function: Callable[..., Any]
    name: str

    @classmethod
    def take(cls, fastpref: object, kwargs: dict[str, Any]) -> CallOptions:
        """Read the options from the call's `fastpref` and `kwargs`, and remove them from `kwargs`."""
        labels, is_shifted = _take_labels(kwargs)
        for name, reason in UNSUPPORTED.items():
            value = kwargs.get(name)
            if value is not None and not (isinstance(value, int) and value == 0):  # 0 and False ask for nothing
                raise ValueError(f"a scored call takes no {name}: {reason}; got {name}={describe(value)}")
        shift = {"shift": False} if is_shifted else {}
        if callable(fastpref):
            options = [name for name in (*TOKEN_OPTIONS, *SEQUENCE_OPTIONS, "reduction") if name in kwargs]
            if options:
                raise ValueError(
                    "with a function as fastpref=, bind options of scoring to the function (functools.partial); got "
                    f"{', '.join(options)} at the call"
                )
            return cls(labels, functools.partial(fastpref, **shift) if shift else fastpref, "scored")
        if fastpref is not True:
            raise TypeError(f"fastpref must be a bool, or a function to score with; got {describe(fastpref)}")
        return cls(labels, _take_function(kwargs, shift), "logprobs")


def _take_labels(kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Return the labels to score, and whether they are shifted already. Remove them from `kwargs`."""
    labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    if shifted is not None:  # labels are then ignored, as in a transformers model
        if kwargs.get("shift"):
            raise ValueError("shift_labels are shifted already; got shift=True too")
        labels = shifted
    if labels is None:
        raise ValueError("fastpref scores labels: pass labels=, aligned with input_ids, or shift_labels=; got none")
    name = "labels" if shifted is None else "shift_labels"
    check_tensor(name, labels, INTEGER, "an int64 or int32 tensor of input_ids' shape")
    return labels, shifted is not None


def _take_function(kwargs: dict[str, Any], shift: dict[str, bool]) -> Callable[..., Any]:
    """Return fastpref's function for the call's options, with `shift` over theirs. Remove them from `kwargs`."""
    reduction = kwargs.pop("reduction", None)
    options = {name: kwargs.pop(name) for name in TOKEN_OPTIONS if name in kwargs} | shift
    given = {name: kwargs.pop(name) for name in SEQUENCE_OPTIONS if name in kwargs}
    if reduction not in (None, "none"):
        return functools.partial(linear_sequence_logprobs, reduction=reduction, **given, **options)
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        raise ValueError(
            f'{", ".join(SEQUENCE_OPTIONS)} need reduction="sum" or "mean"; got {", ".join(given)} with '
            f"reduction={describe(reduction)}"
        )
    return functools.partial(linear_token_logprobs, **options)


def _unsliced(hidden: Tensor) -> Tensor:
    """Return the tensor of which `hidden` is a full slice, because FSDP warns about outputs that are views."""
    if torch.compiler.is_compiling() or not hidden._is_view():
        return hidden
    base, wanted = hidden._base, (hidden.shape, hidden.stride(), hidden.dtype)
    return base if base is not None and (base.shape, base.stride(), base.dtype) == wanted else hidden


class Call:
    """One scored call of a model.

    `run` runs a copy of the model whose head has `enter` as its forward. `enter` leads to `score`, which computes the
    result from what the head's product would multiply, and `take` keeps it and returns rows in place of the logits.
    """

    def __init__(self, model: Any, options: CallOptions) -> None:
        self.options, self.model, self.attachment = options, model, model._fastpref
        self.transform = {**_head.logit_transform(model.config), **self.attachment.transform}
        self.head, self.outermost = _head.find(model), model.get_output_embeddings()
        # The head runs twice for the check, and dropout draws anew each time.
        drops = any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in self.head.modules())
        self.verifies = self.attachment.verify and not drops
        self.calls, self.seen = 0, []

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `forward`, the forward of the model's class, and return a named tuple with the result first."""
        paths = self.attachment.paths
        if not paths or not all(leads_to(self.model, path, self.outermost) for path in paths):
            paths = paths_to(self.model, self.outermost)
        copied = copy_with_module(self.model, paths, copy_with_forward(self.outermost, self.enter, self.take))
        if self.attachment.own is None:
            output = forward(copied, *args, **kwargs)
        else:
            output = rebind(self.attachment.own, self.attachment.owner, copied)(*args, **kwargs)
        keep_attributes(copied, self.model, paths)
        result = self.result(output)
        if self.verifies:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg="the first scored call is checked: score once before fullgraph=True")
            _head.check_transform(output.logits[0], self.products, **self.transform)
            self.attachment.verify = False
        return result

    def result(self, output: Any) -> Any:
        """Return the result and the model's other outputs, after checking how the model treated its head."""
        if not hasattr(output, "logits"):
            raise ValueError(
                f"a scored call needs the model's named outputs: pass return_dict=True; got {type(output)}"
            )
        if self.calls == 0 and self.attachment.own is not None:
            raise NotImplementedError(
                f"the model's forward was replaced before attach by a {type(self.attachment.own).__name__}, whose "
                "references to the model cannot be found; attach first, and then replace the forward"
            )
        if self.calls != 1 or len(self.seen) != 1:
            raise NotImplementedError(
                f"a scored call needs a model that calls its head once; this one called it {self.calls} times"
            )
        (hidden, scored), *_ = self.seen
        values = {self.options.name: scored} if isinstance(scored, Tensor) else scored._asdict()
        values.setdefault("last_hidden_state", hidden)
        for name in (field.name for field in dataclasses.fields(output)):
            if name not in ("loss", "logits"):
                values.setdefault(name, getattr(output, name))
        # A named tuple, because DDP and FSDP look for tensors in tuples and dicts, and in no other object.
        return run_time_tuple("Scored", tuple(values))(*values.values())

    def enter(self, hidden: Tensor, **kwargs: Any) -> Any:
        """Run in place of the forward of the model's head, which may be a wrapper of PEFT around the linear head."""
        if kwargs:  # PEFT's, which choose an adapter for each sequence
            raise NotImplementedError(
                f"a scored call cannot pass {', '.join(kwargs)} to the head; call the model without fastpref for these"
            )
        if self.head is self.outermost:
            return self.score(hidden)
        return copy_with_forward(self.head, self.score, _head.check_hooks)(hidden)

    def score(self, hidden: Tensor) -> Any:
        """Run in place of the linear head's forward."""
        self.calls += 1
        if self.verifies:
            own = getattr(self.head, forward_name(self.head))
            with torch.no_grad():
                # These are the first rows, scored or not: every rank of a sharded model must run the head equally
                # often.
                self.rows = whole(own(hidden.flatten(0, -2)[:8]))
        return _head.multiply(self.head, hidden, self.compute)

    def compute(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        """Call the function that scores, with the operands of the head's product."""
        if hasattr(weight, "__tensor_flatten__") and not is_dtensor(weight):
            raise NotImplementedError(f"the head's weight must be a plain tensor; got a {type(weight).__name__}")
        if self.verifies:
            with torch.no_grad():
                self.products = whole(F.linear(hidden.flatten(0, -2)[:8], weight, bias))
        labels = self.options.labels.to(hidden.device)
        scored = self.options.function(hidden, weight, labels, bias=bias, **self.transform)
        # The results are no views: writing to one would drop the hooks that FSDP registers on outputs to gather the
        # weight again.
        if isinstance(scored, Tensor):
            return scored.clone()
        if not hasattr(scored, "_make") or not all(isinstance(value, Tensor) for value in scored):
            raise TypeError(
                "the function given as fastpref must return a tensor, or a named tuple of tensors; got "
                f"{describe(scored)}"
            )
        return scored._make(value.clone() for value in scored)

    def take(self, head: Any, args: tuple[Any, ...], scored: Any) -> Tensor:
        """Keep the result, and return a few rows that the model continues with as its logits."""
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
