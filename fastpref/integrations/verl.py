"""verl's scoring, losses and advantages on fastpref, under verl's names and signatures: those of 0.9.1.

`patch()` makes its FSDP engines score through fastpref, from logits and, where fused kernels are on with the "torch"
backend, from hidden states; and its trainers take advantages from `gae`. `compute_policy_loss_vanilla` is for
`register_policy_loss("fastpref")`. `kl_penalty` and `agg_loss` are a few operations on (B, T) tensors and stay verl's.
So does `linear_cross_entropy`, the "triton" backend: of it Megatron expects a rank's part of the hidden states'
gradient, and fastpref gives all of it.

Not run end to end: verl trains with Ray and a rollout engine, on GPUs. Tests hold every function against its formula in
plain PyTorch, and `patch` against modules that stand in for verl's; 0.9.1's own functions, and its fused forward under
`patch`, agreed on a CPU. Ray's workers are processes of their own: name a module that calls `patch` in
`VERL_USE_EXTERNAL_MODULES`, which each of them imports with verl.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastpref._checks import check_choice, check_finite
from fastpref.integrations._seam import Seam
from fastpref.linear_logprobs import linear_token_logprobs
from fastpref.logprobs import token_logprobs
from fastpref.losses.rlhf import gae, masked_whiten, ppo_policy_loss, ppo_value_loss
from fastpref.reference.losses.rlhf import bounded_log_ratio, check_tokens, counted, masked_mean

SUPPORTED = ">=0.9,<0.10"
"""The versions of verl whose scoring is known."""

_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """`token_logprobs` of aligned logits (B, T, V) or (N, V) and labels; float32 (float64 for float64).

    With `inplace_backward` the gradient is written over the logits, unless they are a leaf. Raises as `token_logprobs`.
    """
    return token_logprobs(logits, labels, shift=False, inplace_backward=inplace_backward and not logits.is_leaf)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of every row of logits (B, T, V) or (N, V), nats, differentiable; float32 (float64 for float64)."""
    any_labels = logits.new_zeros(logits.shape[:-1], dtype=torch.long)
    return token_logprobs(logits, any_labels, shift=False, stats=("entropy",)).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """`entropy_from_logits`, which makes nothing as large as the logits that chunks would keep small."""
    return entropy_from_logits(logits)


class FusedLinearForPPO(nn.Module):
    """Log-probs and entropy from hidden states, by `linear_token_logprobs`; both options are of verl's own forms."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy), of input_ids' shape, float32 (float64 for float64), both differentiable.

        hidden_states (B, T, H) or (T, H) score the aligned input_ids, vocab_weights are (V, H). Raises as
        `linear_token_logprobs`.
        """
        scored = linear_token_logprobs(
            hidden_states, vocab_weights, input_ids, shift=False, temperature=temperature, stats=("entropy",)
        )
        return scored.logprobs, scored.entropy


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae` (arXiv 1506.02438), (advantages, returns), the advantages whitened by verl's, the unbiased, variance.

    Tensors are (B, T); a token whose response_mask is 0 is stepped over. Results are detached, and 0 there, where
    verl's hold what is left. A single token has the advantage 0, where verl raises. Raises as `gae`.
    """
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam))
    count = mask.sum().clamp(min=1)
    return masked_whiten(advantages, mask) * ((count - 1) / count).sqrt(), returns


def _mean(
    mask: Tensor, loss_agg_mode: str, dp_size: int = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """verl's aggregation as our `reduction` and `denominator`."""
    check_choice("loss_agg_mode", loss_agg_mode, _MODES)
    tokens, total = loss_agg_mode == "token-mean", 1
    if loss_agg_mode != "token-sum":
        total = batch_num_tokens if tokens else global_batch_size
        if total is None and dp_size > 1:
            raise ValueError(f"{'batch_num_tokens' if tokens else 'global_batch_size'} is needed with {dp_size=}")
    if loss_agg_mode.startswith("seq-mean-token-sum"):
        total = mask.any(1).sum() if total is None else total
        if loss_agg_mode.endswith("norm"):
            total = total * (mask.shape[1] if loss_scale_factor is None else loss_scale_factor)
    reduction = "sequence" if loss_agg_mode == "seq-mean-token-mean" else "token"
    return {"reduction": reduction, "denominator": None if total is None else total / dp_size}


def _policy_loss(
    old: Tensor, logps: Tensor, advantages: Tensor, mask: Tensor, clips: tuple[Any, Any, Any], dual: float,
    mean: dict[str, Any], weights: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the loss, the share of tokens clipped, the mean of log π_old − log π, and the share beyond the dual clip.

    As in verl, a log-ratio beyond ±20 is taken as ±20, without a gradient.
    """
    check_tokens(mask, log_prob=logps, old_log_prob=old, advantages=advantages)
    dual = check_finite("clip_ratio_c", dual, least=1.0, exclusive=True)
    clip, low, high = clips
    options = {"clip": (clip if low is None else low, clip if high is None else high), "dual_clip": dual}
    log_ratio = bounded_log_ratio(logps, old)
    old = torch.zeros_like(log_ratio)
    weighted = advantages if weights is None else advantages * weights
    loss = ppo_policy_loss(log_ratio, old, weighted, mask, **options, **mean).loss
    with torch.no_grad():
        reported = ppo_policy_loss(log_ratio, old, advantages, mask, **options)
        gaps, held = counted(mask, -log_ratio, ((advantages < 0) & (log_ratio.exp() > dual)).float())
        return loss, reported.clip_fraction, *(masked_mean(x, mask, "token", None) for x in (gaps, held))


def compute_policy_loss(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float | None = None,
    cliprange_low: float | None = None, cliprange_high: float | None = None, clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute `ppo_policy_loss` with a dual clip: (loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower), scalars.

    Tensors are (B, T), and a token whose response_mask is 0 does not count. pg_clipfrac is the share of tokens where
    the clipped branch is the larger, ppo_kl the mean of log π_old − log π, and pg_clipfrac_lower the share of tokens
    with a negative advantage and a ratio above clip_ratio_c. Raises as `ppo_policy_loss` does.
    """
    mask = response_mask.bool()
    clips, mean = (cliprange, cliprange_low, cliprange_high), _mean(mask, loss_agg_mode)
    return _policy_loss(old_log_prob, log_prob, advantages, mask, clips, clip_ratio_c, mean)


def compute_policy_loss_vanilla(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
    loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """`compute_policy_loss` as verl's registry calls it: its options from `config`, and its numbers as metrics.

    rollout_is_weights (B, T), 0 or more, multiply the tokens' losses. Raises as `compute_policy_loss`.
    """
    mask = response_mask.bool()
    clips = config.clip_ratio, config.clip_ratio_low, config.clip_ratio_high
    mean, dual = _mean(mask, loss_agg_mode, **config.global_batch_info), config.get("clip_ratio_c", 3.0)
    loss, *means = _policy_loss(old_log_prob, log_prob, advantages, mask, clips, dual, mean, rollout_is_weights)
    names = "pg_clipfrac", "ppo_kl", "pg_clipfrac_lower"
    return loss, {f"actor/{name}": value.item() for name, value in zip(names, means, strict=True)}


def compute_value_loss(
    vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
    loss_agg_mode: str = "token-mean", dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`ppo_value_loss` (arXiv 1909.08593) of (B, T): (loss, clipped fraction of tokens), scalars; and its errors."""
    mask = response_mask.bool()
    mean = _mean(mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    loss = ppo_value_loss(vpreds, values, returns, mask, clip=cliprange_value, **mean).loss
    return loss, ppo_value_loss(vpreds.detach(), values, returns, mask, clip=cliprange_value).clip_fraction


_seam = Seam(
    "verl", SUPPORTED,
    {
        "verl.utils.torch_functional": (logprobs_from_logits, entropy_from_logits, entropy_from_logits_with_chunking),
        "verl.utils.experimental.torch_functional": (FusedLinearForPPO,),
        "verl.trainer.ppo.core_algos": (compute_gae_advantage_return,),
    },
    {
        "verl.utils.torch_functional:log_probs_from_logits_response": ("logprobs_from_logits",),
        "verl.models.transformers.dense_common:forward_with_torch_backend": ("FusedLinearForPPO",),
    },
)  # fmt: skip


def patch() -> AbstractContextManager[Any]:
    """Make verl score through fastpref, in this process; call it before engines are built, which keep functions.

    Returns a context manager whose exit undoes this call, which does nothing where verl is patched already.

    Raises:
        ImportError: verl is not installed.
        NotImplementedError: the installed verl scores in another way than those of `SUPPORTED`.
    """
    return _seam.patch()


def unpatch() -> None:
    """Give verl its own functions back; `RuntimeError` where something else replaced them after `patch`."""
    _seam.unpatch()
