"""TRL's trainers on fastpref: `FastDPOTrainer` and `FastRewardTrainer`; and `patch()`, for all the others.

DPO, KTO, SFT, GRPO and RLOO score tokens in one place, the forward that `trl.trainer.utils.add_fused_lm_head` gives
their models: it takes the backbone's hidden states and the head's weight to one autograd Function, which gives
log-probs and statistics. That Function is what `patch` replaces. Losses, metrics and options stay TRL's. The two
trainers are subclasses of TRL's, and replace the loss as a whole.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from fastpref._checks import MODES, check_choice
from fastpref.integrations._seam import used_names
from fastpref.linear_logprobs import linear_token_logprobs

if TYPE_CHECKING:
    from fastpref.integrations._trl_dpo import FastDPOTrainer as FastDPOTrainer
    from fastpref.integrations._trl_reward import FastRewardTrainer as FastRewardTrainer

SUPPORTED = ">=1.15,<1.17"
"""The versions of TRL whose scoring is known."""

_FUNCTION, _COMPACTS, _GATHER = "_ChunkedLogProbFunction", "_use_triton", "maybe_gather_lm_head_ctx"
_ARGUMENTS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order of TRL's results

_patched: dict[str, tuple[Any, Any]] = {}  # name in TRL's module: TRL's object, and ours


def patch(*, mode: str = "auto") -> AbstractContextManager[Any]:
    """Make TRL's trainers score through `linear_token_logprobs`, those that exist and those to come.

    Every trainer whose model has TRL's fused head: `DPOTrainer`, `KTOTrainer`, `SFTTrainer`, `GRPOTrainer` and
    `RLOOTrainer`. Logits are then float32 sums, where TRL rounds them to the dtype they are multiplied in, and on a CPU
    positions that no label scores are not multiplied. Temperature, softcap, scale of the logits, autocast, a float32
    head and ZeRO-3 are as in TRL, which also decides what is scored: LoRA on the head it refuses.

    Args:
        mode: how a backward gets its probabilities, as in `linear_token_logprobs`; "recompute" is the leanest.

    Returns:
        A context manager whose exit undoes this call, and nothing where TRL was patched already: then the call did
        nothing. Without `with`, the patch stays until `unpatch`.

    Raises:
        ImportError: TRL is not installed.
        ValueError: an unknown mode; or another one than TRL is patched with.
        NotImplementedError: the installed TRL scores in another way than those of `SUPPORTED`.
    """
    check_choice("mode", mode, MODES)
    undo = ExitStack()
    if _patched and _patched[_FUNCTION][1].mode != mode:
        raise ValueError(f"TRL is patched with mode={_patched[_FUNCTION][1].mode!r}: unpatch first; got {mode!r}")
    if not _patched:
        utils = _checked_utils()
        _patched[_FUNCTION] = getattr(utils, _FUNCTION), _Logprobs(mode)
        if hasattr(utils, _COMPACTS):
            _patched[_COMPACTS] = getattr(utils, _COMPACTS), _compacts(getattr(utils, _COMPACTS))
        for name, (_, ours) in _patched.items():
            setattr(utils, name, ours)
        undo.callback(unpatch)
    return undo


def unpatch() -> None:
    """Give TRL its own objects back; where it is not patched, do nothing.

    Raises:
        RuntimeError: something else replaced them after `patch`, and would be lost.
    """
    if not _patched:
        return
    from trl.trainer import utils

    for name, (_, ours) in _patched.items():
        if getattr(utils, name) is not ours:
            raise RuntimeError(f"trl.trainer.utils.{name} was replaced again after patch: undo that first")
    for name, (own, _) in _patched.items():
        setattr(utils, name, own)
    _patched.clear()


class _Logprobs:
    """In place of TRL's Function: called as it is, with the same five results."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def apply(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        stats = tuple(name for name in _OUTPUTS if name in outputs)
        # Cast as TRL casts them: the head may be float32 beside hidden states that are not.
        scored = linear_token_logprobs(
            hidden, weight.to(hidden.dtype), targets, None if bias is None else bias.to(hidden.dtype), mode=self.mode,
            shift=False, temperature=temperature, logit_scale=logit_scale, softcap=final_logit_softcapping, stats=stats,
        )  # fmt: skip
        values = scored._asdict() if stats else {"logprobs": scored}
        if hasattr(weight, "ds_id") and values["logprobs"].requires_grad:
            _gather_in_backward(values["logprobs"], weight, bias)
        found = (values.get(name) for name in ("logprobs", *_OUTPUTS))
        return tuple(x.float() if x is not None and x.dtype == torch.float64 else x for x in found)


def _gather_in_backward(logprobs: Tensor, *head: Any) -> None:
    """ZeRO-3 gathers the head for TRL's call alone, and its backward multiplies by it again."""
    from trl.trainer import utils

    node: Any = logprobs.grad_fn
    while not node.name().startswith("_LinearLogprobs"):
        node = node.next_functions[0][0]
    gathered = ExitStack()

    def gather(grads: Any) -> None:
        gathered.enter_context(utils.maybe_gather_lm_head_ctx(*head))

    node.register_prehook(gather)
    node.register_hook(lambda *grads: gathered.close())


def _compacts(own: Any) -> Any:
    """Whether the scored positions are selected: where TRL selects them, and on a CPU, which compiles no shapes."""
    return lambda device: device.type == "cpu" or own(device)


def _checked_utils() -> Any:
    """`trl.trainer.utils`. `NotImplementedError` unless it scores as it is known to: ours might never be called."""
    from packaging.specifiers import SpecifierSet

    installed = version("trl")

    def refuse(found: str) -> NoReturn:
        raise NotImplementedError(f"fastpref knows how trl{SUPPORTED} scores tokens; installed is {installed}, {found}")

    if not SpecifierSet(SUPPORTED).contains(installed, prereleases=True):
        refuse("another version")
    from trl.trainer import utils

    function, fused = getattr(utils, _FUNCTION, None), getattr(utils, "add_fused_lm_head", None)
    forward = getattr(function, "forward", None)
    if forward is None or fused is None:
        refuse(f"whose trl.trainer.utils lacks {'add_fused_lm_head' if fused is None else _FUNCTION}")
    parameters = inspect.signature(forward).parameters
    if tuple(parameters) != _ARGUMENTS:
        refuse(f"whose {_FUNCTION} takes {', '.join(parameters)}")
    if parameters["outputs"].default != _OUTPUTS:
        refuse(f"whose {_FUNCTION} gives {parameters['outputs'].default}")
    used = {_FUNCTION, _GATHER}
    if not SpecifierSet("<1.16").contains(installed, prereleases=True):  # before, TRL always selected what is scored
        used.add(_COMPACTS)
    missing = used - set(used_names(inspect.unwrap(fused).__code__))
    if missing:
        refuse(f"whose add_fused_lm_head does not use {', '.join(sorted(missing))}")
    return utils


def __getattr__(name: str) -> Any:
    """The trainers, imported when asked for: their base classes are TRL's."""
    if name not in ("FastDPOTrainer", "FastRewardTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastpref.integrations._trl_seams import trainer

    return trainer(name)
