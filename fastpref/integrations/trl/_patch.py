"""Replace the function that scores tokens in TRL's trainers by `linear_token_logprobs`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastpref._core.checks import MODES, check_choice
from fastpref.integrations._replace import Known, Replacement
from fastpref.linear_logprobs import linear_token_logprobs

SUPPORTED = ">=1.15,<1.17"
"""The supported versions of TRL."""

FUNCTION, SELECTS = "trl.trainer.utils:_ChunkedLogProbFunction", "trl.trainer.utils:_use_triton"
_STATS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order of TRL's results
_PARAMETERS = (
    "ctx",
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping=...",
    "logit_scale=...",
    f"outputs={_STATS!r}",
)

replacement = Replacement(everywhere=False)  # TRL's own kernels also use _use_triton


def patch(*, mode: str = "auto") -> AbstractContextManager[Any]:
    """Make TRL's trainers score tokens by `linear_token_logprobs`, in this process.

    This applies to every trainer whose model has TRL's fused head, whether it exists already or not: `DPOTrainer`,
    `KTOTrainer`, `SFTTrainer`, `GRPOTrainer` and `RLOOTrainer`. Logits are then summed in float32, where TRL rounds
    them to the dtype of the product; on a CPU, positions without a label are skipped. Temperature, softcap and scale of
    the logits, autocast, a float32 head and ZeRO-3 work as in TRL. TRL still decides what is scored, and still refuses
    LoRA on the head.

    Args:
        mode: how the backward gets probabilities, as in `linear_token_logprobs`. "recompute" needs the least memory.

    Returns:
        A context manager whose exit undoes this call. If TRL is patched already, the call and the exit do nothing.
        Without `with`, the patch stays until `unpatch`.

    Raises:
        ImportError: TRL is not installed.
        ValueError: `mode` is unknown, or TRL is patched already with another mode.
        NotImplementedError: the installed TRL is not a version in `SUPPORTED`, or scores tokens in another way.
    """
    check_choice("mode", mode, MODES)
    current = replacement.ours(FUNCTION)
    if current is not None and current.mode != mode:
        raise ValueError(f"TRL is patched already with mode={current.mode!r}; got mode={mode!r}: unpatch first")
    known = _known()
    return replacement.apply(known, partial(_objects, known, mode))


def unpatch() -> None:
    """Put TRL's own objects back. If TRL is not patched, do nothing.

    Raises:
        RuntimeError: one of them was replaced again after `patch`, and that replacement would be lost.
    """
    replacement.undo()


def _known() -> Known:
    parameters = {f"{FUNCTION}.forward": _PARAMETERS}
    known = Known("fastpref.integrations.trl.patch()", "trl", SUPPORTED, parameters)
    names = ["_ChunkedLogProbFunction", "maybe_gather_lm_head_ctx"]
    if known.installed().release >= (1, 16):  # before, TRL always selected the scored positions
        names.append("_use_triton")
    return dataclasses.replace(known, uses={"trl.trainer.utils:add_fused_lm_head": tuple(names)})


def _objects(known: Known, mode: str) -> dict[str, Any]:
    from trl.trainer import utils

    objects: dict[str, Any] = {FUNCTION: _Logprobs(mode)}
    if hasattr(utils, "_use_triton"):
        objects[SELECTS] = _selects(known.find(SELECTS))
    return objects


class _Logprobs:
    """Stand in for TRL's autograd Function: the same arguments and the same five results."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _STATS,
    ) -> tuple[Tensor | None, ...]:
        stats = tuple(name for name in _STATS if name in outputs)
        scored: Any = linear_token_logprobs(
            hidden,
            weight.to(hidden.dtype),  # as TRL does: the head may be float32 when hidden states are not
            targets,
            None if bias is None else bias.to(hidden.dtype),
            mode=self.mode,
            shift=False,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            stats=stats,
        )
        values = scored._asdict() if stats else {"logprobs": scored}
        if hasattr(weight, "ds_id") and values["logprobs"].requires_grad:
            _gather_in_backward(values["logprobs"], weight, bias)
        found = (values.get(name) for name in ("logprobs", *_STATS))
        return tuple(x.float() if x is not None and x.dtype == torch.float64 else x for x in found)


def _gather_in_backward(logprobs: Tensor, *head: Any) -> None:
    """Gather a head that ZeRO-3 sharded when the backward multiplies by it; TRL gathers it in the forward."""
    from trl.trainer import utils

    node: Any = logprobs.grad_fn
    while not node.name().startswith("_LinearLogprobs"):
        node = node.next_functions[0][0]
    gathered = ExitStack()

    def gather(grads: Any) -> None:
        gathered.enter_context(utils.maybe_gather_lm_head_ctx(*head))

    node.register_prehook(gather)
    node.register_hook(lambda *grads: gathered.close())


def _selects(own: Callable[[torch.device], bool]) -> Callable[[torch.device], bool]:
    """Return whether scored positions are selected on a device: as in TRL, and always on a CPU."""
    return lambda device: device.type == "cpu" or own(device)
