"""OpenRLHF's functions of logits, computed by `token_logprobs`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.logprobs import token_logprobs


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probs of labels that are aligned with the logits, by `token_logprobs`.

    OpenRLHF's own function divides the logits by the temperature in place; this one leaves them unchanged.

    Args:
        logits: (B, T, V) or (T, V), any floating dtype.
        labels: (B, T) or (T,), int64 or int32.
        temperature: divides the logits, above 0.

    Returns:
        Log-probs in the shape of `labels`, float32 (float64 for float64 logits). OpenRLHF returns the logits' dtype.

    Raises:
        TypeError: wrong dtype.
        ValueError: wrong shape, device or temperature.
        IndexError: a label is outside [0, V), on a CPU.
    """
    return token_logprobs(logits, labels, shift=False, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row of logits (B, T, V) or (T, V), in nats, with its gradient.

    The result is float32 (float64 for float64 logits).
    """
    labels = logits.new_zeros(logits.shape[:-1], dtype=torch.long)  # any labels: the entropy does not depend on them
    return token_logprobs(logits, labels, shift=False, stats=("entropy",)).entropy
