"""The options of TRL's DPOTrainer as those of `dpo_loss`, and what of them has no such form."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Any

import torch
import transformers
from packaging.version import Version
from trl.trainer.dpo_config import DPOConfig

from fastpref.losses.preference import dpo_loss

SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
"""The loss types that TRL gives `label_smoothing`."""
BY_LENGTH = {"ipo", "sigmoid_norm"}
"""The loss types that TRL divides by lengths."""

_DIVERGENCES = {
    "reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha",
}  # fmt: skip
# Before 1.10 TRL's divergences lack their constants, which cancel in these types alone.
_CANCELLING = {"sigmoid", "hinge", "exo_pair", "robust", "discopop", "sft"}
# Of another field, in a TRL to come, it is not known what it does to the loss.
_FIELDS = {
    "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "disable_dropout", "dataset_num_proc",
    "pad_token", "max_length", "truncation_mode", "padding_free", "pad_to_multiple_of", "precompute_ref_log_probs",
    "precompute_ref_batch_size", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type",
    "f_alpha_divergence_coef", "label_smoothing", "beta", "use_weighting", "discopop_tau", "activation_offloading",
    "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
}  # fmt: skip


def options(trainer: Any) -> dict[str, Any]:
    """`dpo_loss`'s options for a trainer's, without lengths, weights and references."""
    types, divergence = trainer.loss_types, _DIVERGENCES[trainer.f_divergence_type]
    found = {
        "beta": trainer.beta, "loss_type": types, "loss_weights": trainer.loss_weights, "f_divergence": divergence,
        "label_smoothing": trainer.label_smoothing if SMOOTHED & set(types) else 0.0,
        "length_normalize": "ipo" in types,
    }  # fmt: skip
    if divergence == "alpha":
        found["f_alpha"] = trainer.f_alpha_divergence_coef
    if "discopop" in types:
        found["discopop_tau"] = trainer.args.discopop_tau
    return found


def unexpressed(trainer: Any) -> list[str]:
    """What `linear_dpo_loss` could not compute as the installed TRL does."""
    types, left = set(trainer.loss_types), []
    names = ", ".join(trainer.loss_types)
    if trainer._is_vision_dataset:
        left.append("a dataset with images")
    if getattr(trainer, "use_liger_kernel", False):  # from 1.15 on, of the layers alone
        left.append("use_liger_kernel=True")
    general = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for field in dataclasses.fields(DPOConfig):
        value = getattr(trainer.args, field.name)
        if field.name not in general | _FIELDS and value != field.default:
            left.append(f"{field.name}={value!r}, which TRL had not in 1.16")
    if trainer.label_smoothing and "sigmoid" in types and types & SMOOTHED:
        left.append(f"label_smoothing={trainer.label_smoothing!r} of {names}, of which TRL gives sigmoid none")
    if "ipo" in types and types - BY_LENGTH:
        left.append(f"ipo by lengths beside others in {names}")
    if "sft" in types:
        for name, given in (
            ("ld_alpha", trainer.ld_alpha is not None), ("use_weighting", trainer.use_weighting),
            ("lengths", types & BY_LENGTH),
        ):  # fmt: skip
            if given:
                left.append(f"{name} with the loss type sft in {names}")
    if trainer.f_divergence_type not in _DIVERGENCES:
        return [*left, f"f_divergence_type={trainer.f_divergence_type!r}"]
    if trainer.f_divergence_type != "reverse_kl" and types - _CANCELLING and Version(version("trl")) < Version("1.10"):
        left.append(
            f"f_divergence_type={trainer.f_divergence_type!r} of {names}, which before 1.10 TRL computed otherwise"
        )
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    tensors = {"weights": one} if trainer.use_weighting else {}
    try:
        dpo_loss(*[one] * 4, chosen_lengths=one, rejected_lengths=one, **tensors, **options(trainer))
    except (TypeError, ValueError) as error:
        left.append(str(error))
    return left
