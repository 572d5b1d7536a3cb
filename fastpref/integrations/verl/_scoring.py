"""verl's log-probs and entropy, computed by `token_logprobs` and `linear_token_logprobs`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpref.linear_logprobs import linear_token_logprobs
from fastpref.logprobs import token_logprobs


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Return the log-probs of labels aligned with logits (B, T, V) or (N, V), by `token_logprobs`.

    With `inplace_backward`, the backward writes the gradient over the logits, unless they are a leaf. The result is
    float32 (float64 for float64 logits). The errors are those of `token_logprobs`.
    """
    return token_logprobs(logits, labels, shift=False, inplace_backward=inplace_backward and not logits.is_leaf)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Return the entropy of each row of logits (B, T, V) or (N, V), in nats, with its gradient.

    The result is float32 (float64 for float64 logits).
    """
    labels = logits.new_zeros(logits.shape[:-1], dtype=torch.long)  # any labels: the entropy does not depend on them
    return token_logprobs(logits, labels, shift=False, stats=("entropy",)).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Return `entropy_from_logits(logits)`, which needs no chunks: it allocates nothing as large as the logits."""
    return entropy_from_logits(logits)


class FusedLinearForPPO(nn.Module):
    """Compute log-probs and entropy from hidden states, by `linear_token_logprobs`.

    The options choose between verl's own implementations, and have no effect here.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return (log_probs, entropy) in the shape of `input_ids`, float32 (float64 for float64), both differentiable.

        Hidden states (B, T, H) or (T, H) score the aligned `input_ids`; `vocab_weights` are (V, H). The errors are
        those of `linear_token_logprobs`.
        """
        scored = linear_token_logprobs(
            hidden_states, vocab_weights, input_ids, shift=False, temperature=temperature, stats=("entropy",)
        )
        return scored.logprobs, scored.entropy
