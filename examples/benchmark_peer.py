"""Your own peer in the benchmarks: fastpref bench --peer-file examples/benchmark_peer.py

The function of an entry takes the inputs of its subject, and is checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import Entry


def _from_logits() -> Callable[..., Tensor]:
    def logprobs(logits: Tensor, labels: Tensor) -> Tensor:  # (B, T, V), (B, T) -> (B, T)
        logps = logits.float().log_softmax(-1)
        return -F.nll_loss(logps.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)

    return logprobs


def _from_hidden_states() -> Callable[..., Tensor]:
    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:  # (B, T, H), (V, H), (B, T) -> scored rows
        scored = labels != -100
        logits = hidden[scored] @ weight.T
        return -F.cross_entropy(logits.float(), labels[scored], reduction="none")

    return logprobs


LOGPROBS = [Entry("widened log_softmax + nll_loss", _from_logits)]
LINEAR = [Entry("cross_entropy of the scored rows", _from_hidden_states)]
