"""Train with OpenRLHF on fastpref's scoring, losses and advantages, with the names and signatures of version 0.11.2.

`patch()` makes OpenRLHF's actors compute log-probs and entropy by `token_logprobs`, from logits that are not copied.
The losses go into the attributes of its trainers: `trainer.loss_fn = DPOLoss(beta)`. OpenRLHF's `compute_approx_kl`,
`compute_reward` and `masked_mean` are a few operations on (B, T) tensors and are not replaced. For the `KTOLoss` that
OpenRLHF had up to 0.9.5, use `fastpref.nn.KTOSplitLoss`.

OpenRLHF has not been run end to end with this, because it needs DeepSpeed, Ray and vLLM on a GPU. Tests compare every
function with its formula in plain PyTorch, and run `patch` on modules that imitate OpenRLHF's. On a CPU, OpenRLHF
0.11.2 returned the same values for all functions but `get_advantages_and_returns`, and for its actor's forward under
`patch`. Ray's workers are separate processes: call `patch` in each of them, through `worker_process_setup_hook` of
Ray's `runtime_env`.
"""

from fastpref.integrations.openrlhf._losses import (
    DPOLoss,
    LogExpLoss,
    PairWiseLoss,
    PolicyLoss,
    ValueLoss,
    get_advantages_and_returns,
)
from fastpref.integrations.openrlhf._patch import SUPPORTED, patch, unpatch
from fastpref.integrations.openrlhf._scoring import compute_entropy, log_probs_from_logits

__all__ = [
    "SUPPORTED",
    "DPOLoss",
    "LogExpLoss",
    "PairWiseLoss",
    "PolicyLoss",
    "ValueLoss",
    "compute_entropy",
    "get_advantages_and_returns",
    "log_probs_from_logits",
    "patch",
    "unpatch",
]
