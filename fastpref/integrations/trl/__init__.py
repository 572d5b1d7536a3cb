"""Train with TRL on fastpref: `patch()` for its trainers, or `FastDPOTrainer` and `FastRewardTrainer`.

TRL's DPO, KTO, SFT, GRPO and RLOO trainers score tokens in one place: the forward that
`trl.trainer.utils.add_fused_lm_head` gives their models. It passes hidden states and the head's weight to one autograd
Function, which returns log-probs and statistics. `patch` replaces that Function; losses, metrics and options stay
TRL's. The two trainers are subclasses of TRL's, and replace the whole loss.
"""

from typing import TYPE_CHECKING, Any

from fastpref.integrations.trl._patch import SUPPORTED, patch, unpatch

if TYPE_CHECKING:
    from fastpref.integrations.trl._dpo import FastDPOTrainer
    from fastpref.integrations.trl._reward import FastRewardTrainer

__all__ = ["SUPPORTED", "FastDPOTrainer", "FastRewardTrainer", "patch", "unpatch"]


def __getattr__(name: str) -> Any:
    """Import a trainer when it is asked for, because its base class is TRL's."""
    if name not in ("FastDPOTrainer", "FastRewardTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastpref.integrations.trl._trainers import load

    return load(name)
