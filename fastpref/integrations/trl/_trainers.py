"""Import the trainers that are subclasses of TRL's, after checking the classes that they build on."""

from __future__ import annotations

import importlib
from typing import Any

from fastpref.integrations._replace import Known

_VERSIONS, _TESTED = ">=0.29", ">=0.29,<1.17"

_DPO, _REWARD = "trl.trainer.dpo_trainer", "trl.trainer.reward_trainer"
_LOSS = ("self", "model", "inputs", "return_outputs=...")
_DATASET = ("self", "dataset", "processing_class", "args", "dataset_name")

# For each trainer: our module, and what it needs from TRL. The methods are those that it overrides, because an override
# that TRL never calls would silently do nothing.
_TRAINERS = {
    "FastDPOTrainer": (
        "_dpo",
        {
            f"{_DPO}:DPOTrainer._compute_loss": _LOSS,
            f"{_DPO}:DPOConfig": None,
            f"{_DPO}:is_peft_model": None,
            f"{_DPO}:use_adapter": None,
            f"{_DPO}:disable_gradient_checkpointing": None,
        },
    ),
    "FastRewardTrainer": (
        "_reward",
        {
            f"{_REWARD}:RewardTrainer.compute_loss": (*_LOSS, "num_items_in_batch=..."),
            f"{_REWARD}:RewardTrainer._prepare_dataset": _DATASET,
            f"{_REWARD}:RewardTrainer._set_signature_columns_if_needed": ("self",),
            f"{_REWARD}:DataCollatorForPreference": None,
        },
    ),
}


def load(name: str) -> Any:
    """Return our trainer of this name.

    Raises:
        ImportError: TRL is not installed.
        NotImplementedError: the installed TRL lacks something that the trainer uses, or a method that the trainer
            overrides has other parameters.
    """
    module, parameters = _TRAINERS[name]
    Known(name, "trl", _VERSIONS, parameters, tested=_TESTED).check()
    return getattr(importlib.import_module(f"fastpref.integrations.trl.{module}"), name)
