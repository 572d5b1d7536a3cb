"""The oracle of every row of `fastpref.losses.TABLE` and `RLHF`, by name, as a function of the row's own arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.oracles import preference, reward, rlhf
from tests.oracles.precision import mp, numbers


def _dpo(kind: str, *logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, **options: Any) -> Tensor:
    # A type without a reference is given none.
    columns = [numbers(x) for x in (*logps, *(torch.zeros_like(logps[0]) for _ in range(4 - len(logps))))]
    del options["loss_type"]
    return _tensor(
        preference.dpo_losses(kind, columns, [chosen_lengths.tolist(), rejected_lengths.tolist()], **options)
    )


def _kto(policy: Tensor, ref: Tensor, desirable: Tensor, *, kl: Tensor, **options: Any) -> Tensor:
    mean = mp.fsum(numbers(kl)) / len(kl)
    return _tensor(preference.kto_losses(numbers(policy), numbers(ref), desirable.tolist(), kl=mean, **options))


def _pairwise(chosen: Tensor, rejected: Tensor, *, margin: Tensor, center_weight: float) -> Tensor:
    pairs = zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True)
    return _tensor([reward.pairwise(*pair, center_weight) for pair in pairs])


def _best_of_k(rewards: Tensor, best: Tensor) -> Tensor:
    return _tensor([reward.best_of_k(*row) for row in zip(rewards.tolist(), best.tolist(), strict=True)])


def _ranked(loss: Callable[..., Any], rewards: Tensor, ranks: Tensor, *, mask: Tensor) -> Tensor:
    return _tensor([loss(*row) for row in zip(rewards.tolist(), ranks.tolist(), mask.tolist(), strict=True)])


def _tensor(values: list[Any]) -> Tensor:
    return torch.tensor([float(x) for x in values], dtype=torch.float64)


# The losses (B,) of a row of `TABLE`.
LOSSES: dict[str, Callable[..., Tensor]] = {
    **{f"dpo_loss:{kind}": partial(_dpo, kind) for kind in preference.LOSS_TYPES},
    "kto_loss": _kto,
    "pairwise_reward_loss": _pairwise,
    "best_of_k_loss": _best_of_k,
    "ranking_loss": partial(_ranked, reward.ranking),
    "plackett_luce_loss": partial(_ranked, reward.plackett_luce),
}
# What a row of `RLHF` returns: a tensor, or numbers, in the order of its fields.
RLHF: dict[str, Callable[..., Any]] = {
    "kl_shaped_rewards": rlhf.kl_shaped_rewards,
    "gae": rlhf.gae,
    "masked_whiten": rlhf.masked_whiten,
    "ppo_policy_loss": rlhf.policy_loss,
    "ppo_value_loss": rlhf.value_loss,
    "ppo_loss": rlhf.ppo_loss,
    "ptx_loss": rlhf.ptx_loss,
}
