"""Compare our versions of verl's losses and advantages with its signatures in 0.9.1, and with plain PyTorch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref.integrations import verl as ours
from tests.fastpref.integrations.imitations import MASK, assert_alike, randn, signature

# From utils/torch_functional.py, utils/experimental/torch_functional.py and trainer/ppo/core_algos.py in the wheel of
# 0.9.1.
SIGNATURES = {
    "logprobs_from_logits": "(logits, labels, inplace_backward=True)",
    "entropy_from_logits": "(logits)",
    "entropy_from_logits_with_chunking": "(logits, chunk_size=2048)",
    "FusedLinearForPPO": "(chunk_size=512, impl_backend='torch')",
    "FusedLinearForPPO.forward": "(self, hidden_states, vocab_weights, input_ids, temperature=1.0)",
    "compute_gae_advantage_return": "(token_level_rewards, values, response_mask, gamma, lam)",
    "compute_policy_loss": (
        "(old_log_prob, log_prob, advantages, response_mask, cliprange=None, cliprange_low=None, cliprange_high=None, "
        "clip_ratio_c=3.0, loss_agg_mode='token-mean')"
    ),
    "compute_policy_loss_vanilla": (
        "(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode='token-mean', config=None, "
        "rollout_is_weights=None)"
    ),
    "compute_value_loss": (
        "(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode='token-mean', dp_size=1, "
        "batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    function: Any = ours
    for part in name.split("."):
        function = getattr(function, part)
    assert signature(function) == SIGNATURES[name]


MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
TOTALS: list[dict[str, Any]] = [
    {},
    {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9, "loss_scale_factor": 7},
]


def aggregated(
    losses: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> Tensor:
    rows, lengths = (losses * MASK).sum(1), MASK.sum(1)
    tokens, sequences = batch_num_tokens or lengths.sum(), global_batch_size or (lengths > 0).sum()
    return (
        dp_size
        * {
            "token-mean": rows.sum() / tokens,
            "token-sum": rows.sum(),
            "seq-mean-token-sum": rows.sum() / sequences,
            "seq-mean-token-sum-norm": rows.sum() / sequences / (loss_scale_factor or 5),
            "seq-mean-token-mean": (rows / lengths.clamp(min=1)).sum() / sequences,
        }[mode]
    )


def mean(x: Tensor) -> Tensor:
    return ((x * MASK).sum() / MASK.sum()).detach()


def surrogate(
    logps: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, dual: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the losses of tokens by verl's formula, and its three metrics."""
    log_ratio = (logps - old).clamp(-20, 20)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    single = torch.maximum(plain, clipped)
    losses = torch.where(advantages < 0, torch.minimum(single, -dual * advantages), single)
    return losses, [mean(clipped > plain), mean(-log_ratio), mean((single > -dual * advantages) & (advantages < 0))]


# The bounds of the ratio and the dual clip, and the options that set them beside cliprange=0.3.
CLIPS: list[tuple[tuple[float, float, float], dict[str, float]]] = [
    ((0.3, 0.3, 3.0), {}),
    ((0.3, 0.4, 3.0), {"high": 0.4}),
    ((0.1, 0.3, 10), {"low": 0.1, "dual": 10}),
    ((0.2, 0.28, 1.2), {"low": 0.2, "high": 0.28, "dual": 1.2}),
    ((1.0, 10.0, 3.0), {"low": 1.0, "high": 10.0}),
]


@pytest.mark.parametrize("totals", TOTALS, ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("clips", CLIPS, ids=lambda clips: str(clips[0]))
def test_policy_losses(clips: Any, mode: str, totals: dict[str, Any], weighted: bool) -> None:
    bounds, given = clips
    logps, old, advantages = randn(3, 5, grad=True), randn(3, 5), randn(3, 5)
    weights = torch.rand(3, 5, dtype=torch.float64).masked_fill(torch.rand(3, 5) < 0.3, 0.0) if weighted else None
    with torch.no_grad():
        logps[0, 0], advantages[0, 0] = old[0, 0] + 3, -1.0  # beyond the dual clip
        logps[1, 1], logps[1, 2] = old[1, 1] + 30, old[1, 2] - 30
        advantages[0, 1] = 0.0
    losses, reported = surrogate(logps, old, advantages, *bounds)
    assert reported[2] > 0
    losses = losses if weights is None else losses * weights
    config = SimpleNamespace(
        clip_ratio=0.3,
        clip_ratio_low=given.get("low"),
        clip_ratio_high=given.get("high"),
        global_batch_info=totals,
        get=lambda name, default: given.get({"clip_ratio_c": "dual"}[name], default),
    )
    loss, metrics = ours.compute_policy_loss_vanilla(
        old_log_prob=old,
        log_prob=logps,
        advantages=advantages,
        response_mask=MASK.bool(),
        loss_agg_mode=mode,
        config=config,
        rollout_is_weights=weights,
    )
    assert_alike(loss, aggregated(losses, mode, **totals), logps)
    names = ["actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"]
    assert list(metrics) == names
    assert list(metrics.values()) == pytest.approx([x.item() for x in reported], rel=1e-6)
    if not weighted and not totals:
        names = {"low": "cliprange_low", "high": "cliprange_high", "dual": "clip_ratio_c"}
        options = {names[name]: value for name, value in given.items()}
        loss, *means = ours.compute_policy_loss(old, logps, advantages, MASK, 0.3, **options, loss_agg_mode=mode)
        assert_alike(loss, aggregated(losses, mode), logps)
        torch.testing.assert_close(means, reported, check_dtype=False)


def test_policy_loss_reads_no_masked_token() -> None:
    logps, old, advantages = randn(3, 5, grad=True), randn(3, 5), randn(3, 5)
    results = []
    for harm in (False, True):
        new, *rest = (x.masked_fill(MASK == 0, float("nan")) if harm else x for x in (logps, old, advantages))
        loss, *means = ours.compute_policy_loss(rest[0], new, rest[1], MASK, 0.2, cliprange_high=0.28)
        results.append([loss, *means, *torch.autograd.grad(loss, logps)])
    for clean, harmed in zip(*results, strict=True):
        assert torch.equal(clean, harmed)


def test_what_is_not_computed_is_refused() -> None:
    x = randn(3, 5)
    with pytest.raises(TypeError, match=r"^clip must be .*pair \(low, high\).*\(None, 0\.28\)"):
        ours.compute_policy_loss(x, x, x, MASK, cliprange_high=0.28)
    with pytest.raises(ValueError, match=r"^clip_ratio_c must be .*above 1; got float 1\.0"):
        ours.compute_policy_loss(x, x, x, MASK, 0.3, clip_ratio_c=1.0)
    with pytest.raises(TypeError, match=r"^clip_ratio_c must be .*above 1; got NoneType None"):
        ours.compute_policy_loss(x, x, x, MASK, 0.3, clip_ratio_c=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^old_log_prob must be .*, like log_prob;"):
        ours.compute_policy_loss(x[:, :4], x, x, MASK, 0.2)
    with pytest.raises(ValueError, match="loss_agg_mode"):
        ours.compute_policy_loss(x, x, x, MASK, 0.2, loss_agg_mode="mean")
    with pytest.raises(ValueError, match="batch_num_tokens is needed"):
        ours.compute_value_loss(x, x, x, MASK, 0.2, dp_size=2)


@pytest.mark.parametrize("totals", TOTALS, ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_value_loss(mode: str, totals: dict[str, Any]) -> None:
    values, old, returns = randn(3, 5, grad=True), randn(3, 5), 3 * randn(3, 5)
    plain, clipped = (values - returns) ** 2, (values.clamp(old - 0.2, old + 0.2) - returns) ** 2
    loss, fraction = ours.compute_value_loss(values, returns, old, MASK, 0.2, mode, **totals)
    assert_alike(loss, 0.5 * aggregated(torch.maximum(plain, clipped), mode, **totals), values)
    torch.testing.assert_close(fraction, mean(clipped > plain), check_dtype=False)


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), torch.ones(3, 5)], ids=["holes", "bool", "whole"])
def test_advantages(mask: Tensor) -> None:
    rewards, values = randn(3, 5), randn(3, 5)
    found = ours.compute_gae_advantage_return(rewards, values, mask, torch.tensor(0.9), 0.8)
    raw, counts = torch.zeros(3, 5, dtype=torch.float64), mask.bool()
    for row in range(3):
        following = advantage = 0.0
        for t in reversed(range(5)):
            if counts[row, t]:
                delta = rewards[row, t] + 0.9 * following - values[row, t]
                advantage, following = delta + 0.9 * 0.8 * advantage, values[row, t]
                raw[row, t] = advantage
    scored = raw[counts]
    wanted = (scored - scored.mean()) / (scored.var() + 1e-8).sqrt()
    torch.testing.assert_close(found[0][counts], wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][counts], (raw + values)[counts], rtol=1e-6, atol=1e-6)
    assert not found[0][~counts].any()
    alone = torch.zeros(3, 5).index_fill(1, torch.tensor(0), 1) * torch.tensor([[1], [0], [0]])
    assert not ours.compute_gae_advantage_return(rewards, values, alone, 0.9, 0.8)[0].any()
