"""The way to the trainers that are subclasses of TRL's, open where TRL is such as they know it."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

KNOWN = ">=0.29"
"""The versions of TRL whose trainers have the methods that are overridden. The newest that was read is 1.16."""


class _Seam(NamedTuple):
    ours: str  # our module
    theirs: str  # TRL's
    names: tuple[str, ...]  # what is used of it, the trainer first
    methods: dict[str, tuple[str, ...]]  # what is overridden or called of the trainer, and its parameters


_SEAMS = {
    "FastDPOTrainer": _Seam(
        "_trl_dpo",
        "dpo_trainer",
        ("DPOTrainer", "DPOConfig", "is_peft_model", "use_adapter", "disable_gradient_checkpointing"),
        {"_compute_loss": ("self", "model", "inputs", "return_outputs")},
    ),
    "FastRewardTrainer": _Seam(
        "_trl_reward",
        "reward_trainer",
        ("RewardTrainer", "DataCollatorForPreference"),
        {
            "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
            "_prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
            "_set_signature_columns_if_needed": ("self",),
        },
    ),
}


def trainer(name: str) -> Any:
    """Our trainer of that name.

    Raises:
        ImportError: TRL is not installed.
        NotImplementedError: it is, and a method that the trainer overrides is missing or has other parameters. An
            override that TRL never calls would do nothing, in silence.
    """
    try:
        installed = version("trl")
    except PackageNotFoundError:
        raise ImportError(f"{name} is a subclass of TRL's trainer: pip install 'trl{KNOWN}'; found no trl") from None
    from packaging.specifiers import SpecifierSet

    wanted = f"{name} knows trl{KNOWN}, up to 1.16; installed is {installed}"
    if not SpecifierSet(KNOWN).contains(installed, prereleases=True):
        raise NotImplementedError(wanted)
    seam = _SEAMS[name]
    module = importlib.import_module(f"trl.trainer.{seam.theirs}")
    lacking = [used for used in seam.names if not hasattr(module, used)]
    for method, parameters in seam.methods.items():
        found = getattr(getattr(module, seam.names[0], None), method, None)
        if found is None or tuple(inspect.signature(found).parameters) != parameters:
            lacking.append(f"{method}({', '.join(parameters)})")
    if lacking:
        raise NotImplementedError(f"{wanted}, whose {module.__name__} has no {', no '.join(lacking)}")
    return getattr(importlib.import_module(f"fastpref.integrations.{seam.ours}"), name)
