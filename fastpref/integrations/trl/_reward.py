"""TRL's RewardTrainer with fastpref's reward losses, for pairs as in TRL and for rankings of K answers."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer import reward_trainer

from fastpref.integrations.trl._rankings import RankingCollator, fits, ranked_row
from fastpref.losses.reward import best_of_k_loss, pairwise_reward_loss, plackett_luce_loss, ranking_loss

LOSS_TYPES = ("pairwise", "ranking", "plackett_luce", "best_of_k")


class FastRewardTrainer(reward_trainer.RewardTrainer):
    """Train like TRL's `RewardTrainer`, with fastpref's losses, on pairs or on rankings of K answers.

    The arguments are those of `RewardTrainer`, and `loss_type`. A dataset with the columns `chosen` and `rejected` is
    trained on as in TRL, `margin` and `center_rewards_coefficient` included, by `pairwise_reward_loss`. A dataset of
    rankings has the columns `prompt`, `completions` (two or more answers, strings or messages, as many as the prompt
    has), and `scores` (numbers, higher is better) or `ranks` (integers, 0 is best). Each answer is scored once, so K
    answers cost K sequences, not K(K − 1). As in TRL, a row with a sequence of more than `max_length` tokens is left
    out, text gets the EOS token, and messages go through the chat template.

    The logged metrics are TRL's; for rankings, `accuracy` and `margin` are means over all pairs of unequal rank.

    Args:
        loss_type: "pairwise" for pairs; for rankings "ranking" (all pairs of the ranking, arXiv 2203.02155),
            "plackett_luce" (the ranking as a whole) or "best_of_k" (the best of all, arXiv 1909.08593). None chooses
            "pairwise" or "ranking", depending on the dataset.

    Raises:
        NotImplementedError: at the import, if the installed TRL has other methods.
        ValueError: `loss_type` is unknown, or does not fit the dataset; a row lacks completions, scores or ranks, or
            has ties that the loss does not support; an option of pairs is given with rankings.
    """

    args: Any
    model: Any
    accelerator: Any

    def __init__(self, *args: Any, loss_type: str | None = None, **kwargs: Any) -> None:
        if loss_type not in (None, *LOSS_TYPES):
            raise ValueError(f"loss_type must be one of {', '.join(map(repr, LOSS_TYPES))}; got {loss_type!r}")
        self.loss_type: Any = loss_type  # read while TRL's constructor prepares the datasets
        super().__init__(*args, **kwargs)
        if self.loss_type == "pairwise":
            return
        if self.args.center_rewards_coefficient is not None:
            coefficient = self.args.center_rewards_coefficient
            raise ValueError(
                f"center_rewards_coefficient is supported for pairs only; got {coefficient!r} with loss_type "
                f"{self.loss_type!r}"
            )
        own: Any = self.data_collator
        if isinstance(own, reward_trainer.DataCollatorForPreference):
            self.data_collator = RankingCollator(own.pad_token_id, own.pad_to_multiple_of)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        columns = list(next(iter(dataset)))
        ranked = "completions" in columns or "completion_ids" in columns
        if self.loss_type is None:
            self.loss_type = "ranking" if ranked else "pairwise"
        if ranked is (self.loss_type == "pairwise"):
            wanted = "chosen and rejected" if ranked else "prompt, completions, and scores or ranks"
            raise ValueError(
                f"loss_type {self.loss_type!r} needs a dataset with the columns {wanted}; {dataset_name} has "
                f"{', '.join(columns)}"
            )
        if not ranked:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if "margin" in columns:
            raise ValueError(
                f"a margin is supported for pairs only; {dataset_name} has margin and completions: remove one"
            )
        options: dict[str, Any] = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        with args.main_process_first():
            given = {"processing_class": processing_class, "loss_type": self.loss_type}
            # A prepared dataset may be passed to evaluate, which prepares it again: leave it ranks, and no scores.
            used = [name for name in columns if name in ("completions", "scores")]
            dataset = dataset.map(ranked_row, fn_kwargs=given, remove_columns=used, **options)
            if args.max_length is not None:
                dataset = dataset.filter(fits, fn_kwargs={"max_length": args.max_length}, **options)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self.loss_type == "pairwise":
            super()._set_signature_columns_if_needed()
        elif self._signature_columns is None:
            self._signature_columns = ["completion_ids", "ranks"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        ranks, mask, margin = (inputs.pop(name, None) for name in ("ranks", "mask", "margin"))
        outputs = model(**inputs, use_cache=False)
        rewards = outputs.logits.squeeze(-1)
        if ranks is None:
            better, worse = rewards.chunk(2)
            center = self.args.center_rewards_coefficient or 0.0
            loss = pairwise_reward_loss(better, worse, margin=margin, center_weight=center)
        else:
            table = rewards.new_zeros(mask.shape).masked_scatter(mask, rewards)
            loss = _ranking_loss(self.loss_type, table, ranks, mask)
            prompts, i, j = ((ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]).nonzero().T
            better, worse = table[prompts, i], table[prompts, j]
        self._record(inputs["attention_mask"], rewards.detach(), better.detach(), worse.detach())
        return (loss, outputs) if return_outputs else loss

    def _record(self, attention_mask: Tensor, rewards: Tensor, better: Tensor, worse: Tensor) -> None:
        """Log TRL's metrics, from sums and counts: processes may have different numbers of answers and pairs."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        counts = torch.stack([attention_mask.sum(), (better > worse).sum()])
        counts = torch.cat([counts, counts.new_tensor([len(better), len(rewards)])])
        sums = torch.stack([(better - worse).float().sum(), rewards.float().sum()])
        counts, sums = self.accelerator.gather_for_metrics((counts[None], sums[None]))
        tokens, correct, pairs, answers = counts.sum(0).tolist()
        margin, total = sums.sum(0).tolist()
        ends = self.accelerator.gather(torch.stack([rewards.min(), rewards.max()])[None])
        if self.model.training:
            self._total_train_tokens += tokens // getattr(self, "_tp_size", 1)
        metrics["num_tokens"] = [self._total_train_tokens]
        values = {
            "min_reward": ends[:, 0].min().item(),
            "mean_reward": total / answers,
            "max_reward": ends[:, 1].max().item(),
            "accuracy": correct / max(pairs, 1),
            "margin": margin / max(pairs, 1),
        }
        for name, value in values.items():
            metrics[name].append(value)


def _ranking_loss(loss_type: str, table: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    if loss_type == "ranking":
        return ranking_loss(table, ranks, mask=mask)
    if loss_type == "plackett_luce":
        return plackett_luce_loss(table, ranks, mask=mask)
    return best_of_k_loss(table.masked_fill(~mask, torch.finfo(table.dtype).min), ranks.argmin(1))
