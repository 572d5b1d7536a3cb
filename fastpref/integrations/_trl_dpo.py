"""TRL's DPOTrainer with the loss and its gradients made by `linear_dpo_loss`, inside the model's own forward."""

from __future__ import annotations

import contextlib
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor
from trl.trainer import dpo_trainer

from fastpref.integrations import _trl_options as to_ours
from fastpref.integrations.transformers import attach
from fastpref.linear_logprobs import linear_token_logprobs
from fastpref.linear_preference import linear_dpo_loss
from fastpref.losses.preference import wpo_weights

_NOT_THE_MODELS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_STATS = ("entropy", "mean_logits", "is_top1")
_theirs: Any = dpo_trainer  # what it imports itself, from wherever this TRL has it
logger = get_logger(__name__)


class FastDPOTrainer(dpo_trainer.DPOTrainer):
    """TRL's `DPOTrainer`, of the same arguments, with its loss and gradients by `linear_dpo_loss`, logits never made.

    Every loss type of TRL's (arXiv 2305.18290 and what followed), lists of them, and every option is computed as the
    installed TRL computes it, and every metric logged under TRL's name with its value. The loss is made where the
    head's product would be, in the forward of the model as it is wrapped, so that DDP, FSDP and ZeRO see what they
    must. LoRA on the head is trained, where TRL lets it through. What `linear_dpo_loss` cannot express is left to TRL's
    own path, and one warning names it.

    Over several processes the logged entropy is the mean over all tokens, as it is in TRL from 1.5 on.

    Raises:
        NotImplementedError: when imported, a TRL whose internals are not known; at the first step, a model that makes
            something else of its logits than its config says.
    """

    args: Any
    model: Any
    accelerator: Any
    _truncate_inputs: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._said: set[str] = set()
        super().__init__(*args, **kwargs)
        _ = self._left  # so that it is said before training starts

    @cached_property
    def _left(self) -> bool:
        """Whether all is left to TRL; if not, both models are attached."""
        left = to_ours.unexpressed(self)
        if not left:
            try:
                for model in (self.model, self.ref_model):
                    if model is not None:
                        attach(self.accelerator.unwrap_model(model))
            except (TypeError, NotImplementedError) as error:
                left = [str(error)]
        if left:
            self._say_left("; ".join(left))
        elif self.label_smoothing and not to_ours.SMOOTHED & set(self.loss_types):
            logger.warning(f"TRL's {', '.join(self.loss_types)} ignores label_smoothing, and so it does here")
        return bool(left)

    def _say_left(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(
                f"FastDPOTrainer leaves to the own path of TRL {version('trl')} what it cannot express: {what}"
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if return_outputs and not self._left:
            self._say_left("return_outputs=True, the logits that compute_metrics is given")
        if return_outputs or self._left:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self._reference_logps(self.model if self.ref_model is None else self.ref_model, inputs)
        kwargs, labels, mask = self._scored(inputs)
        balances = getattr(self, "aux_loss_enabled", False)
        if balances:
            kwargs["output_router_logits"] = True
        options = {**to_ours.options(self), "ld_alpha": self.ld_alpha}
        if to_ours.BY_LENGTH & set(self.loss_types):
            chosen, rejected = mask.sum(1).clamp(min=1).chunk(2)  # before the shift
            options |= {"chosen_lengths": chosen, "rejected_lengths": rejected}
        function = partial(_pairs_loss, reference=reference, weighs=self.use_weighting, **options)
        scored = model(**kwargs, labels=labels, fastpref=function)
        metrics = self._metrics["train" if self.model.training else "eval"]
        self._record(metrics, inputs["attention_mask"], mask[:, 1:], scored, reference)
        if not balances:
            return scored.loss
        metrics["aux_loss"].append(self.accelerator.gather_for_metrics(scored.aux_loss).mean().item())
        return scored.loss + self.router_aux_loss_coef * scored.aux_loss

    def compute_ref_log_probs(self, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The reference's log-probs of a batch, (B,) and (B,). TRL calls it with the inputs, or the model and those."""
        if self._left:
            return super().compute_ref_log_probs(*args)
        own = self.model if self.ref_model is None else self.ref_model
        return self._reference_logps(args[0] if len(args) == 2 else own, args[-1])

    def _reference_logps(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        adapter: Any = contextlib.nullcontext()
        if self.ref_model is None and _theirs.is_peft_model(self.model):
            inner: Any = self.accelerator.unwrap_model(self.model)
            adapter = _theirs.use_adapter(inner, adapter_name="ref" if "ref" in inner.peft_config else None)
        plain = _theirs.disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        kwargs, labels, _ = self._scored(inputs)
        # What is precomputed comes from a model that nothing has wrapped in autocast yet.
        with torch.no_grad(), plain, adapter, self.accelerator.autocast():
            scored = model(**kwargs, labels=labels, fastpref=True, reduction="sum", ld_alpha=self.ld_alpha)
        chosen, rejected = scored.logprobs.chunk(2)
        return chosen, rejected

    def _scored(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
        """The model's inputs, the labels and the completions' mask, (2B, T)."""
        if hasattr(self, "_truncate_inputs"):  # 0.29, whose collator does not
            names = ("input_ids", "attention_mask", "completion_mask")
            cut = self._truncate_inputs(*(inputs[name] for name in names))
            inputs = {**inputs, **dict(zip(names, cut, strict=True))}
        mask = inputs["completion_mask"]
        kwargs = {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
        return {**kwargs, "use_cache": False}, inputs["input_ids"].masked_fill(mask == 0, -100), mask

    def _record(
        self, metrics: Any, attended: Tensor, mask: Tensor, scored: Any, reference: tuple[Tensor, Tensor]
    ) -> None:
        """Log what TRL logs, with two gathers in place of one a number."""
        chosen, rejected = mask.chunk(2)
        right, _ = scored.is_top1.chunk(2)
        counts = torch.stack([x.sum() for x in (attended, chosen, rejected, right)])
        sums = torch.stack([x.sum() for x in (scored.entropy, *scored.mean_logits.chunk(2))])
        counts, sums = self.accelerator.gather_for_metrics((counts[None], sums[None]))
        given, n_chosen, n_rejected, n_right = counts.sum(0).tolist()
        entropy, mean_chosen, mean_rejected = sums.sum(0).tolist()
        if self.model.training:
            self._total_train_tokens += given // getattr(self, "_tp_size", 1)
        metrics["num_tokens"] = [self._total_train_tokens]
        for name, total, count in (
            ("entropy", entropy, n_chosen + n_rejected), ("mean_token_accuracy", n_right, n_chosen),
            ("logits/chosen", mean_chosen, n_chosen), ("logits/rejected", mean_rejected, n_rejected),
        ):  # fmt: skip
            metrics[name].append(total / count if count else 0.0)
        # Not the loss's own rewards: those of a type without a reference are against zeros.
        logps = {"chosen": scored.chosen_logps, "rejected": scored.rejected_logps}
        won, lost = (self.beta * (policy - ref) for policy, ref in zip(logps.values(), reference, strict=True))
        rewards = {"chosen": won, "rejected": lost, "margins": won - lost, "accuracies": (won > lost).to(won.dtype)}
        pairs = {f"rewards/{name}": x for name, x in rewards.items()} | {
            f"logps/{name}": x for name, x in logps.items()
        }
        means = self.accelerator.gather(torch.stack([*pairs.values()], 1)).mean(0)
        for name, value in zip(pairs, means.tolist(), strict=True):
            metrics[name].append(value)


def _pairs_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *, reference: tuple[Tensor, Tensor],
    weighs: bool, logit_scale: float, softcap: float | None, **options: Any,
) -> Any:  # fmt: skip
    """What the model's head is replaced by."""
    transform: dict[str, Any] = {"logit_scale": logit_scale, "softcap": softcap}
    if weighs:  # by what the policy itself makes of each token
        with torch.no_grad():
            token = linear_token_logprobs(hidden, weight, labels, bias, stats=("log_sum_sq_probs",), **transform)
        options["weights"] = wpo_weights(token.logprobs, token.log_sum_sq_probs, labels[:, 1:] != -100)
    return linear_dpo_loss(hidden, weight, labels, *reference, bias=bias, stats=_STATS, **options, **transform)
