"""The losses as modules, for trainers that hold a loss as an object: options at construction, tensors at the call.

A module is its function with keywords bound: `DPOLoss(beta=0.2)(*logps)` is `dpo_loss(*logps, beta=0.2)`. The keywords
are those of the function, which checks them at construction. No module has parameters or state.

`trainer.loss_fn = fastpref.nn.DPOLoss(beta=0.2)` serves OpenRLHF, and `_component_: fastpref.nn.DPOLoss` a torchtune
config: both call these modules, and unpack their results, as they do with their own.
"""

from fastpref.nn.preference import DPOLoss, KTOLoss, KTOSplitLoss
from fastpref.nn.preference import KTOSplit as KTOSplit
from fastpref.nn.reward import BestOfKLoss, PairwiseRewardLoss, PlackettLuceLoss, RankingLoss
from fastpref.nn.rlhf import PPOPolicy as PPOPolicy
from fastpref.nn.rlhf import PPOPolicyLoss, PPOValueLoss
from fastpref.nn.rlhf import bool_mask as bool_mask

__all__ = [
    "BestOfKLoss",
    "DPOLoss",
    "KTOLoss",
    "KTOSplitLoss",
    "PPOPolicyLoss",
    "PPOValueLoss",
    "PairwiseRewardLoss",
    "PlackettLuceLoss",
    "RankingLoss",
]
