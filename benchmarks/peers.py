"""What we are measured against, and how each is called. The one file that names a peer.

A function imports its peer when it is called, so that one which is not installed is a row that says so.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGES = ("torch", "triton", "trl", "liger-kernel", "quack-kernels")


def provenance() -> dict[str, str]:
    """What a figure depends on: commit, processor, threads, allocator and the version of every package."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "commit": described.stdout.strip() or "unknown",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# Log-probs of logits (B, T, V) and labels (B, T), aligned: (B, T), or their sum where a peer is at its best so.
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """`load` imports and returns the function; ImportError makes it a row that says what is missing."""

    name: str
    load: Callable[[], Function]
    in_place: bool = False  # overwrites the logits
    compiles: bool = False  # is compiled for the shape it is first called with


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


def _compiled() -> Function:
    return torch.compile(eager)


def _trl() -> Function:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def _liger() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # Without a reduction its backward is a pass of its own, so the sum is its best.
    return lambda logits, labels: -liger_cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")  # type: ignore[operator]


def _quack(in_place: bool) -> Function:
    from quack.cross_entropy import cross_entropy  # type: ignore[import-not-found]

    def logprobs(logits: Tensor, labels: Tensor) -> Tensor:
        losses = cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction="none", inplace_backward=in_place
        )  # fmt: skip
        return -losses.view_as(labels)

    return logprobs


PYTORCH = (
    Entry("log_softmax + gather", lambda: eager),
    Entry("F.cross_entropy", lambda: _cross_entropy),
    Entry("torch.compile", _compiled, compiles=True),
)
TRL = Entry("TRL selective_log_softmax", _trl)
CPU = (*PYTORCH, TRL)
GPU = (
    *PYTORCH,
    TRL,
    Entry("Liger cross_entropy", _liger, in_place=True),
    Entry("quack cross_entropy", lambda: _quack(False)),
    Entry("quack cross_entropy, in place", lambda: _quack(True), in_place=True),
)


# From hidden (B, T, H), weight (V, H) and labels (B, T), aligned: log-probs of the scored rows, in order; or, a scalar,
# the DPO loss of the two halves, β = 0.1, without a reference.
LinearFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LinearEntry:
    """`load` imports and returns the function; ImportError makes it a row that says what is missing."""

    name: str
    load: Callable[[], LinearFunction]
    compiles: bool = False  # is compiled for the shape it is first called with


def linear_eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits of every position, as a model's head gives them, widened before the log-sum."""
    logps = (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps[labels != -100]


def _linear_compacted(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    scored = labels != -100
    return (hidden[scored] @ weight.T).float().log_softmax(-1).gather(-1, labels[scored][:, None])[:, 0]


def _linear_trl() -> LinearFunction:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        scored = labels != -100
        arguments = (hidden[scored], weight, None, labels[scored], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*arguments)[0]  # type: ignore[index]

    return logprobs


def _linear_pytorch() -> LinearFunction:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("this torch has no linear_cross_entropy")

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        scored = labels != -100
        return -F.linear_cross_entropy(hidden[scored], weight, labels[scored], reduction="none")

    return logprobs


def _linear_liger() -> LinearFunction:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False)
    return lambda hidden, weight, labels: loss(weight, hidden, labels)[0]


LINEAR = (
    LinearEntry("eager", lambda: linear_eager),
    LinearEntry("eager, scored rows", lambda: _linear_compacted),
    LinearEntry("TRL chunked log-probs, scored rows", _linear_trl),
    LinearEntry("F.linear_cross_entropy, scored rows", _linear_pytorch),
    LinearEntry("Liger linear DPO loss", _linear_liger, compiles=True),
)


def dpo_trainer(
    fast: bool, model: Any, reference: Any, tokenizer: Any, pairs: dict[str, list[str]], folder: str, **settings: Any
) -> Any:
    """TRL's DPO trainer, or ours, on columns prompt, chosen and rejected; what is not given is its default."""
    import datasets
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from fastpref.integrations.trl import FastDPOTrainer

    arguments = DPOConfig(
        output_dir=folder, use_cpu=True, gradient_checkpointing=False, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    return (FastDPOTrainer if fast else DPOTrainer)(
        model=model, ref_model=reference, args=arguments, train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )  # fmt: skip


@dataclass(frozen=True)
class Kernels:
    """A peer's Triton kernels on logits. `launch(dtype, V, target)` calls them as the peer does."""

    name: str
    launch: Callable[[torch.dtype, int, str], Any]
    passes: int = 1  # how often a kernel goes over the logits: its that many main loops are each a row


def _batch(dtype: torch.dtype, V: int) -> tuple[Tensor, Tensor]:
    logits = torch.zeros(8, V, dtype=dtype, requires_grad=True)
    return logits, torch.zeros(8, dtype=torch.int64)


def _trl_logits(dtype: torch.dtype, V: int, target: str) -> None:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    logprobs, _ = selective_log_softmax_and_entropy(*_batch(dtype, V))
    logprobs.sum().backward()


def _trl_chunked(dtype: torch.dtype, V: int, target: str) -> None:
    from trl.kernels import chunked_logprob

    hidden = torch.zeros(8, 16, dtype=dtype, requires_grad=True)
    weight = torch.zeros(V, 16, dtype=dtype)
    labels = torch.zeros(8, dtype=torch.int64)
    outputs = ("entropy", "mean_logits", "is_top1")  # what its DPO asks for
    # On CPU tensors it would fold its tiles in PyTorch.
    with mock.patch.object(chunked_logprob, "_use_triton", return_value=True):
        logprobs, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, V, None, 1.0, outputs
        )  # fmt: skip
        logprobs.sum().backward()


def _liger_cross_entropy(dtype: torch.dtype, V: int, target: str) -> None:
    from liger_kernel.ops import cross_entropy

    logits, labels = _batch(dtype, V)
    with ExitStack() as stack:
        # It picks its number of warps by the machine it finds.
        arch = "blackwell" if target.startswith("sm_10") else "hopper"
        stack.enter_context(mock.patch.object(cross_entropy, "infer_device_arch", return_value=arch))
        stack.enter_context(mock.patch.object(cross_entropy, "is_hip", return_value=target.startswith("gfx")))
        cross_entropy.LigerCrossEntropyFunction.apply(logits, labels, None)


def _liger_logprobs(dtype: torch.dtype, V: int, target: str) -> None:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    fused_selective_log_softmax(torch.zeros(2, 5, V, dtype=dtype), torch.zeros(2, 5, dtype=torch.int64), 1.0)


KERNELS = (
    Kernels("TRL from logits", _trl_logits),
    Kernels("TRL chunked fold", _trl_chunked),
    Kernels("Liger cross_entropy", _liger_cross_entropy, passes=2),
    Kernels("Liger GRPO log-probs", _liger_logprobs),
)
