"""Translate the options of TRL's DPOTrainer into those of `dpo_loss`, and name those that have no counterpart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
import transformers
from packaging.version import Version
from trl.trainer.dpo_config import DPOConfig

from fastpref.losses.preference import dpo_loss

SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
"""The loss types to which TRL applies `label_smoothing`."""
BY_LENGTH = {"ipo", "sigmoid_norm"}
"""The loss types in which TRL divides by the lengths of completions."""

_DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
# Before 1.10 TRL left out the divergences' constants, which cancel in these loss types only.
_CANCELLING = {"sigmoid", "hinge", "exo_pair", "robust", "discopop", "sft"}
# The fields of DPOConfig in TRL 1.16. A field that a later TRL adds may change the loss in a way that we do not know.
_FIELDS = {
    "model_init_kwargs",
    "trust_remote_code",
    "router_aux_loss_coef",
    "disable_dropout",
    "dataset_num_proc",
    "pad_token",
    "max_length",
    "truncation_mode",
    "padding_free",
    "pad_to_multiple_of",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "loss_type",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "beta",
    "use_weighting",
    "discopop_tau",
    "activation_offloading",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
}


@dataclasses.dataclass(frozen=True)
class DPOOptions:
    """The options of `dpo_loss` that are the same for every batch. None leaves an option at its default."""

    beta: float
    loss_type: list[str]
    loss_weights: list[float] | None
    f_divergence: str
    f_alpha: float | None
    label_smoothing: float
    discopop_tau: float | None
    length_normalize: bool

    @classmethod
    def of(cls, trainer: Any) -> DPOOptions:
        """Return the options of a trainer, whose divergence must be one of `dpo_loss`'s."""
        types, divergence = trainer.loss_types, _DIVERGENCES[trainer.f_divergence_type]
        return cls(
            beta=trainer.beta,
            loss_type=types,
            loss_weights=trainer.loss_weights,
            f_divergence=divergence,
            f_alpha=trainer.f_alpha_divergence_coef if divergence == "alpha" else None,
            label_smoothing=trainer.label_smoothing if SMOOTHED & set(types) else 0.0,
            discopop_tau=trainer.args.discopop_tau if "discopop" in types else None,
            length_normalize="ipo" in types,
        )

    def keywords(self) -> dict[str, Any]:
        """Return the options as keywords of `dpo_loss`."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if value is not None}


def unsupported(trainer: Any) -> list[str]:
    """Return the options of a trainer with which `linear_dpo_loss` would not compute what the installed TRL does."""
    found = [*_unsupported_by_attach(trainer), *_unknown_fields(trainer), *_unsupported_by_loss_type(trainer)]
    types = set(trainer.loss_types)
    names, divergence = ", ".join(trainer.loss_types), trainer.f_divergence_type
    if divergence not in _DIVERGENCES:
        return [*found, f"f_divergence_type={divergence!r}"]
    if divergence != "reverse_kl" and types - _CANCELLING and Version(version("trl")) < Version("1.10"):
        found.append(
            f"f_divergence_type={divergence!r} with loss_type {names}, which TRL before 1.10 computed otherwise"
        )
    # dpo_loss itself reports the other options that it does not support.
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    tensors = {"weights": one} if trainer.use_weighting else {}
    try:
        dpo_loss(*[one] * 4, chosen_lengths=one, rejected_lengths=one, **tensors, **DPOOptions.of(trainer).keywords())
    except (TypeError, ValueError) as error:
        found.append(str(error))
    return found


def _unsupported_by_attach(trainer: Any) -> Iterator[str]:
    if trainer._is_vision_dataset:
        yield "a dataset with images"
    if getattr(trainer, "use_liger_kernel", False):  # TRL before 1.15; later ones use Liger's kernels for layers only
        yield "use_liger_kernel=True"


def _unknown_fields(trainer: Any) -> Iterator[str]:
    general = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for field in dataclasses.fields(DPOConfig):
        value = getattr(trainer.args, field.name)
        if field.name not in general | _FIELDS and value != field.default:
            yield f"{field.name}={value!r}, an option that TRL 1.16 did not have"


def _unsupported_by_loss_type(trainer: Any) -> Iterator[str]:
    types, names = set(trainer.loss_types), ", ".join(trainer.loss_types)
    if trainer.label_smoothing and "sigmoid" in types and types & SMOOTHED:
        yield (
            f"label_smoothing={trainer.label_smoothing!r} with loss_type {names}, which TRL does not apply to sigmoid"
        )
    if "ipo" in types and types - BY_LENGTH:
        yield f"ipo, which divides by lengths, in loss_type {names} with types that do not"
    if "sft" in types:
        options = {
            "ld_alpha": trainer.ld_alpha is not None,
            "use_weighting": trainer.use_weighting,
            "lengths": types & BY_LENGTH,
        }
        for option in (name for name, given in options.items() if given):
            yield f"{option} with the type sft in loss_type {names}"
