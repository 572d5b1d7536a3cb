"""TRL's DPOTrainer with the loss and its gradients computed by `linear_dpo_loss`, inside the model's own forward."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import cached_property
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from torch import Tensor
from trl.trainer import dpo_trainer

from fastpref.integrations.transformers import attach
from fastpref.integrations.trl._dpo_options import BY_LENGTH, SMOOTHED, DPOOptions, unsupported
from fastpref.linear_logprobs import linear_token_logprobs
from fastpref.linear_preference import linear_dpo_loss
from fastpref.losses.preference import wpo_weights

_NOT_THE_MODELS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_STATS = ("entropy", "mean_logits", "is_top1")
_trl: Any = dpo_trainer  # some names that this module imports are in different places in different versions of TRL
logger = get_logger(__name__)


class FastDPOTrainer(dpo_trainer.DPOTrainer):
    """Train like TRL's `DPOTrainer`, with the loss and its gradients computed by `linear_dpo_loss`, without logits.

    The arguments are those of `DPOTrainer`. Every loss type of TRL (arXiv 2305.18290 and later ones), lists of them,
    and every option are computed as the installed TRL computes them; every metric is logged under TRL's name with TRL's
    value. The loss is computed inside the forward of the wrapped model, in place of the head's product, so DDP, FSDP
    and ZeRO work as usual. LoRA on the head is trained, where TRL accepts it. If `linear_dpo_loss` does not support an
    option, the trainer uses TRL's own loss, and a warning names the option.

    With several processes, the logged entropy is the mean over all tokens, as in TRL from 1.5 on.

    Raises:
        NotImplementedError: at the import, if the installed TRL has other methods; at the first step, if the model does
            not scale and cap its logits as its config states.
    """

    args: Any
    model: Any
    accelerator: Any
    _truncate_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._warned: set[str] = set()
        super().__init__(*args, **kwargs)
        _ = self._uses_trls_loss  # to warn before training starts

    @cached_property
    def _uses_trls_loss(self) -> bool:
        """Return whether TRL's own loss is used for this training; if not, attach to both models."""
        reasons = unsupported(self)
        if not reasons:
            try:
                for model in (self.model, self.ref_model):
                    if model is not None:
                        attach(self.accelerator.unwrap_model(model))
            except (TypeError, NotImplementedError) as error:
                reasons = [str(error)]
        if reasons:
            self._warn_unsupported("; ".join(reasons))
        elif self.label_smoothing and not SMOOTHED & set(self.loss_types):
            logger.warning(
                f"label_smoothing={self.label_smoothing!r} has no effect: TRL ignores label_smoothing in loss_type "
                f"{', '.join(self.loss_types)}, and so does FastDPOTrainer"
            )
        return bool(reasons)

    def _warn_unsupported(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning(f"FastDPOTrainer uses the loss of TRL {version('trl')}, because it does not support: {what}")

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs and not self._uses_trls_loss:
            self._warn_unsupported("return_outputs=True, which passes logits to compute_metrics")
        if return_outputs or self._uses_trls_loss:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self._reference_logps(self.model if self.ref_model is None else self.ref_model, inputs)
        batch = self._batch(inputs)
        has_aux_loss = getattr(self, "aux_loss_enabled", False)
        if has_aux_loss:
            batch.kwargs["output_router_logits"] = True
        scored = model(**batch.kwargs, labels=batch.labels, fastpref=self._pair_loss(batch.mask, reference))
        metrics = self._metrics["train" if self.model.training else "eval"]
        self._record(metrics, inputs["attention_mask"], batch.mask[:, 1:], scored, reference)
        if not has_aux_loss:
            return scored.loss
        metrics["aux_loss"].append(self.accelerator.gather_for_metrics(scored.aux_loss).mean().item())
        return scored.loss + self.router_aux_loss_coef * scored.aux_loss

    def _pair_loss(self, mask: Tensor, reference: tuple[Tensor, Tensor]) -> _PairLoss:
        options = {**DPOOptions.of(self).keywords(), "ld_alpha": self.ld_alpha}
        if BY_LENGTH & set(self.loss_types):
            chosen, rejected = mask.sum(1).clamp(min=1).chunk(2)  # before the shift
            options |= {"chosen_lengths": chosen, "rejected_lengths": rejected}
        return _PairLoss(reference, self.use_weighting, options)

    def compute_ref_log_probs(self, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the reference's log-probs of a batch, (B,) and (B,).

        TRL passes the inputs, or a model and the inputs, depending on its version.
        """
        if self._uses_trls_loss:
            return super().compute_ref_log_probs(*args)
        own = self.model if self.ref_model is None else self.ref_model
        return self._reference_logps(args[0] if len(args) == 2 else own, args[-1])

    def _reference_logps(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        adapter: Any = contextlib.nullcontext()
        if self.ref_model is None and _trl.is_peft_model(self.model):
            inner: Any = self.accelerator.unwrap_model(self.model)
            adapter = _trl.use_adapter(inner, adapter_name="ref" if "ref" in inner.peft_config else None)
        plain = _trl.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        batch = self._batch(inputs)
        # When log-probs are precomputed, nothing has wrapped the model in autocast yet.
        with torch.no_grad(), plain, adapter, self.accelerator.autocast():
            scored = model(**batch.kwargs, labels=batch.labels, fastpref=True, reduction="sum", ld_alpha=self.ld_alpha)
        chosen, rejected = scored.logprobs.chunk(2)
        return chosen, rejected

    def _batch(self, inputs: dict[str, Any]) -> _Batch:
        if hasattr(self, "_truncate_inputs"):  # in TRL 0.29, whose collator does not truncate
            names = ("input_ids", "attention_mask", "completion_mask")
            cut = self._truncate_inputs(*(inputs[name] for name in names))
            inputs = {**inputs, **dict(zip(names, cut, strict=True))}
        mask = inputs["completion_mask"]
        kwargs = {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
        return _Batch({**kwargs, "use_cache": False}, inputs["input_ids"].masked_fill(mask == 0, -100), mask)

    def _record(
        self, metrics: Any, attended: Tensor, mask: Tensor, scored: Any, reference: tuple[Tensor, Tensor]
    ) -> None:
        """Log TRL's metrics, gathered together rather than one by one."""
        chosen, rejected = mask.chunk(2)
        correct, _ = scored.is_top1.chunk(2)
        counts = torch.stack([x.sum() for x in (attended, chosen, rejected, correct)])
        sums = torch.stack([x.sum() for x in (scored.entropy, *scored.mean_logits.chunk(2))])
        counts, sums = self.accelerator.gather_for_metrics((counts[None], sums[None]))
        n_tokens, n_chosen, n_rejected, n_correct = counts.sum(0).tolist()
        entropy, chosen_logits, rejected_logits = sums.sum(0).tolist()
        if self.model.training:
            self._total_train_tokens += n_tokens // getattr(self, "_tp_size", 1)
        metrics["num_tokens"] = [self._total_train_tokens]
        means = {
            "entropy": (entropy, n_chosen + n_rejected),
            "mean_token_accuracy": (n_correct, n_chosen),
            "logits/chosen": (chosen_logits, n_chosen),
            "logits/rejected": (rejected_logits, n_rejected),
        }
        for name, (total, count) in means.items():
            metrics[name].append(total / count if count else 0.0)
        # scored.chosen_rewards would be wrong: for a loss type without a reference, they are relative to zeros.
        logps = {"chosen": scored.chosen_logps, "rejected": scored.rejected_logps}
        won, lost = (self.beta * (policy - ref) for policy, ref in zip(logps.values(), reference, strict=True))
        rewards = {"chosen": won, "rejected": lost, "margins": won - lost, "accuracies": (won > lost).to(won.dtype)}
        pairs = {f"rewards/{name}": x for name, x in rewards.items()}
        pairs |= {f"logps/{name}": x for name, x in logps.items()}
        gathered = self.accelerator.gather(torch.stack([*pairs.values()], 1)).mean(0)
        for name, value in zip(pairs, gathered.tolist(), strict=True):
            metrics[name].append(value)


class _Batch(NamedTuple):
    kwargs: dict[str, Any]  # of the model
    labels: Tensor  # (2B, T), -100 outside completions
    mask: Tensor  # (2B, T), of completions


@dataclasses.dataclass(frozen=True)
class _PairLoss:
    """Compute the loss of a batch from hidden states, when the model calls it in place of its head."""

    reference: tuple[Tensor, Tensor]
    use_weighting: bool
    options: dict[str, Any]

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, **transform: Any) -> Any:
        weights: dict[str, Tensor] = {}
        if self.use_weighting:  # by the policy's own probabilities
            with torch.no_grad():
                token = linear_token_logprobs(hidden, weight, labels, bias, stats=("log_sum_sq_probs",), **transform)
            weights["weights"] = wpo_weights(token.logprobs, token.log_sum_sq_probs, labels[:, 1:] != -100)
        options = {**self.options, **weights, **transform}
        return linear_dpo_loss(hidden, weight, labels, *self.reference, bias=bias, stats=_STATS, **options)
