"""Train with verl on fastpref's scoring, losses and advantages, with the names and signatures of version 0.9.1.

`patch()` makes verl's FSDP engines compute log-probs and entropy by fastpref: from logits, and from hidden states where
fused kernels are on with the "torch" backend. It also makes its trainers compute advantages by `gae`. Register
`compute_policy_loss_vanilla` with `register_policy_loss("fastpref")`. verl's `kl_penalty` and `agg_loss` are a few
operations on (B, T) tensors and are not replaced. Neither is `linear_cross_entropy`, the "triton" backend: Megatron
expects each rank's part of the gradient of hidden states from it, and fastpref returns the whole gradient.

verl has not been run end to end with this, because it needs Ray and a rollout engine on GPUs. Tests compare every
function with its formula in plain PyTorch, and run `patch` on modules that imitate verl's. On a CPU, verl 0.9.1
returned the same values for the functions, and for its fused forward under `patch`. Ray's workers are separate
processes: name a module that calls `patch` in `VERL_USE_EXTERNAL_MODULES`, which each worker imports with verl.
"""

from fastpref.integrations.verl._losses import (
    compute_gae_advantage_return,
    compute_policy_loss,
    compute_policy_loss_vanilla,
    compute_value_loss,
)
from fastpref.integrations.verl._patch import SUPPORTED, patch, unpatch
from fastpref.integrations.verl._scoring import (
    FusedLinearForPPO,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    logprobs_from_logits,
)

__all__ = [
    "SUPPORTED",
    "FusedLinearForPPO",
    "compute_gae_advantage_return",
    "compute_policy_loss",
    "compute_policy_loss_vanilla",
    "compute_value_loss",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "logprobs_from_logits",
    "patch",
    "unpatch",
]
