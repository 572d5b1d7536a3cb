"""List the peers that fastpref is measured beside, and call each as its users do. No other file names a peer.

An entry imports its peer when it is loaded, so that a peer that is not installed gives a row that says so.
`fastpref bench --peer-file FILE` adds the entries in the lists `LOGPROBS` and `LINEAR` of a file.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Entry:
    """One row of a subject.

    Attributes:
        name: the name of the row.
        load: imports and returns the function; if it raises, the row states the reason.
        package: the distribution whose version the row states.
        answers: what the function returns: "logps" of every position or of the scored ones in order, their "sum", or
            the DPO "loss" of the two halves of a batch with β = 0.1 and no reference.
        in_place: whether the function overwrites the logits.
        compiles: whether the function is compiled for the shapes that it is called with.
        devices: the devices that the function runs on.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    package: str = "torch"
    answers: str = "logps"
    in_place: bool = False
    compiles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def ours(self) -> bool:
        """Whether this is fastpref, which has tighter limits and fails the run beyond them."""
        return self.package == "fastpref"


def process(name: str, package: str) -> Entry:
    """Return an entry that a process measures by its name, without a function to load."""

    def load() -> Callable[..., Tensor]:
        raise TypeError(f"{name} runs in a process of its own and has no function to load")

    return Entry(name, load, package)


# From logits (B, T, V) and labels (B, T), aligned, with −100 where nothing is scored. Values returned there do not
# count, and their upstream gradient is 0.


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


def _compiled() -> Callable[..., Tensor]:
    return torch.compile(eager)


def _trl() -> Callable[..., Tensor]:
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, labels: selective_log_softmax(logits, labels.clamp(min=0))


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # Without a reduction its backward needs another pass, so the sum is its fastest form.
    return lambda logits, labels: -liger_cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")  # type: ignore[operator]


def _fla() -> Callable[..., Tensor]:
    from fla.modules.fused_cross_entropy import cross_entropy_loss  # type: ignore[import-not-found]

    return lambda logits, labels: -cross_entropy_loss(logits.flatten(0, -2), labels.flatten())[0].view_as(labels)


def _quack(in_place: bool) -> Callable[..., Tensor]:
    from quack.cross_entropy import cross_entropy  # type: ignore[import-not-found]

    def logprobs(logits: Tensor, labels: Tensor) -> Tensor:
        rows = logits.flatten(0, -2)
        losses = cross_entropy(rows, labels.flatten(), reduction="none", inplace_backward=in_place)
        return -losses.view_as(labels)

    return logprobs


GPU = ("cuda",)
LOGPROBS = [
    Entry("log_softmax + gather", lambda: eager),
    Entry("F.cross_entropy", lambda: _cross_entropy),
    Entry("torch.compile of eager", _compiled, compiles=True),
    Entry("TRL selective_log_softmax", _trl, "trl"),
    Entry("Liger cross_entropy", _liger, "liger-kernel", "sum", in_place=True, devices=GPU),
    Entry("flash-linear-attention cross_entropy", _fla, "fla-core", devices=GPU),
    Entry("quack cross_entropy", lambda: _quack(False), "quack-kernels", devices=GPU),
    Entry("quack cross_entropy, in place", lambda: _quack(True), "quack-kernels", in_place=True, devices=GPU),
]


# From hidden (B, T, H), weight (V, H) and labels (B, T), aligned.


def linear_eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probs of the scored rows from the logits of all rows, in float32."""
    logps = (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps[labels != IGNORED]


def _linear_compacted(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    scored = labels != IGNORED
    return (hidden[scored] @ weight.T).float().log_softmax(-1).gather(-1, labels[scored][:, None])[:, 0]


def _linear_trl() -> Callable[..., Tensor]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        scored = labels != IGNORED
        arguments = (hidden[scored], weight, None, labels[scored], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        return ChunkedLogProbFunction.apply(*arguments)[0]  # type: ignore[index]

    return logprobs


def _linear_pytorch() -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ModuleNotFoundError("this torch has no linear_cross_entropy")

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        scored = labels != IGNORED
        return -F.linear_cross_entropy(hidden[scored], weight, labels[scored], reduction="none")

    return logprobs


def _linear_liger() -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False)
    return lambda hidden, weight, labels: loss(weight, hidden, labels)[0]


def _linear_cce(filter_eps: float | str | None) -> Callable[..., Tensor]:
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        scored = labels != IGNORED
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=filter_eps)
        return -losses[scored]

    return logprobs


def _linear_fla() -> Callable[..., Tensor]:
    from fla.modules.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        fused_linear_cross_entropy_loss,
    )

    def total(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -fused_linear_cross_entropy_loss(hidden.flatten(0, 1), labels.flatten(), weight, reduction="sum")

    return total


def _linear_quack() -> Callable[..., Tensor]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # type: ignore[import-not-found]

    def total(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -chunked_linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), reduction="sum")

    return total


LINEAR = [
    Entry("eager", lambda: linear_eager),
    Entry("eager, scored rows", lambda: _linear_compacted),
    Entry("TRL chunked log-probs, scored rows", _linear_trl, "trl"),
    Entry("F.linear_cross_entropy, scored rows", _linear_pytorch),
    Entry("Liger linear DPO loss", _linear_liger, "liger-kernel", "loss", compiles=True),
    Entry("CCE", lambda: _linear_cce("high"), "cut-cross-entropy", devices=GPU),
    Entry("CCE, exact", lambda: _linear_cce(None), "cut-cross-entropy", devices=GPU),
    Entry("flash-linear-attention linear CE", _linear_fla, "fla-core", "sum", devices=GPU),
    Entry("quack linear CE", _linear_quack, "quack-kernels", "sum", devices=GPU),
]


# Functions on small tensors.


def trl_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns as TRL's PPO trainer did up to 1.12; masks with holes are not supported."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    last: Tensor | float = 0.0
    reverse = []
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
        reverse.append(last)
    advantages = torch.stack(reverse[::-1], 1)
    return advantages, advantages + values


def joined(file: Path | None) -> dict[str, list[Entry]]:
    """Return the peers of each subject, with those in the lists LOGPROBS and LINEAR of a Python file."""
    found = {"logprobs": list(LOGPROBS), "linear": list(LINEAR)}
    if file is None:
        return found
    given = runpy.run_path(str(file))
    for subject, entries in found.items():
        entries += given.get(subject.upper(), [])
    return found


def dpo_trainer(
    fast: bool, model: Any, reference: Any, tokenizer: Any, pairs: dict[str, list[str]], folder: str, **settings: Any
) -> Any:
    """Return TRL's DPO trainer, or fastpref's if `fast`, on the columns prompt, chosen and rejected."""
    import datasets
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from fastpref.integrations.trl import FastDPOTrainer

    arguments = DPOConfig(
        output_dir=folder,
        gradient_checkpointing=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **settings,
    )
    return (FastDPOTrainer if fast else DPOTrainer)(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )


@dataclass(frozen=True)
class Kernels:
    """The Triton kernels of a peer on logits; `launch(dtype, V, target)` calls them as the peer does."""

    name: str
    launch: Callable[[torch.dtype, int, str], Any]
    passes: int = 1  # how often a kernel reads the logits; each of these main loops is a row


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
    outputs = ("entropy", "mean_logits", "is_top1")  # those of its DPO trainer
    # It uses PyTorch instead of Triton on CPU tensors.
    with mock.patch.object(chunked_logprob, "_use_triton", return_value=True):
        arguments = (hidden, weight, None, labels, 1.0, V, None, 1.0, outputs)
        logprobs, *_ = chunked_logprob.ChunkedLogProbFunction.apply(*arguments)
        logprobs.sum().backward()


def _liger_cross_entropy(dtype: torch.dtype, V: int, target: str) -> None:
    from liger_kernel.ops import cross_entropy

    logits, labels = _batch(dtype, V)
    with ExitStack() as stack:
        # It chooses the number of warps by the GPU that it finds.
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
