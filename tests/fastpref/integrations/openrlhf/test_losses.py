"""Compare our versions of OpenRLHF's losses and advantages with its signatures in 0.11.2, and with plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.integrations import openrlhf as ours
from tests.fastpref.integrations.imitations import MASK, assert_alike, randn, signature

# From models/utils.py, models/loss.py and trainer/ppo_utils/experience_maker.py in the wheel of 0.11.2.
CLASSES = {
    "DPOLoss": [
        "(beta, label_smoothing=0.0, ipo=False)",
        "(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)",
    ],
    "PairWiseLoss": ["()", "(chosen_reward, reject_reward, margin=None)"],
    "LogExpLoss": ["()", "(chosen_reward, reject_reward, margin=None)"],
    "PolicyLoss": [
        "(clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type='ppo', "
        "is_correction_level='off', is_correction_mode='mask', is_correction_gating='ratio', "
        "is_correction_threshold=(0.5, 5.0))",
        "(log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1, "
        "batch_num_tokens=None, global_batch_size=None)",
    ],
    "ValueLoss": [
        "(clip_eps=None, token_level_loss=True)",
        "(values, old_values, returns, action_mask=None, dp_size=1, batch_num_tokens=None, global_batch_size=None)",
    ],
}
FUNCTIONS = {
    "log_probs_from_logits": "(logits, labels, temperature=1.0)",
    "compute_entropy": "(logits)",
    "get_advantages_and_returns": "(values, rewards, action_mask, gamma, lambd)",
}


def test_signatures() -> None:
    for name, wanted in FUNCTIONS.items():
        assert signature(getattr(ours, name)) == wanted
    for name, (init, forward) in CLASSES.items():
        cls = getattr(ours, name)
        assert signature(cls) == init
        assert signature(cls.forward) == forward.replace("(", "(self, ", 1)


@pytest.mark.parametrize("options", [{"beta": 0.3}, {"beta": 0.3, "label_smoothing": 0.1}, {"beta": 0.3, "ipo": True}])
def test_dpo(options: dict[str, Any]) -> None:
    chosen, rejected = randn(6, grad=True), randn(6, grad=True)
    ref = randn(6), randn(6)
    gap = (chosen - rejected) - (ref[0] - ref[1])
    epsilon = options.get("label_smoothing", 0.0)
    wanted = -(1 - epsilon) * F.logsigmoid(0.3 * gap) - epsilon * F.logsigmoid(-0.3 * gap)
    if "ipo" in options:
        wanted = (gap - 1 / (2 * 0.3)) ** 2
    loss, *rewards = ours.DPOLoss(**options)(chosen, rejected, *ref)
    assert_alike(loss, wanted.mean(), chosen, rejected)
    for found, logps, base in zip(rewards, (chosen, rejected), ref, strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, (0.3 * (logps - base)).detach())


def test_an_option_of_dpo_that_openrlhf_leaves_out_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        ours.DPOLoss(0.1, 0.1, ipo=True)


def test_reward_losses() -> None:
    chosen, rejected, margin = randn(6, grad=True), randn(6, grad=True), torch.arange(6)
    wanted = -F.logsigmoid(chosen - rejected)
    assert_alike(ours.PairWiseLoss()(chosen, rejected), wanted.mean(), chosen, rejected)
    assert_alike(ours.LogExpLoss()(chosen, rejected), (1 + (rejected - chosen).exp()).log().mean(), chosen, rejected)
    wanted = -F.logsigmoid(chosen - rejected - margin)
    assert_alike(ours.PairWiseLoss()(chosen, rejected, margin), wanted.mean(), chosen, rejected)
    with pytest.raises(ValueError, match="no margin"):
        ours.LogExpLoss()(chosen, rejected, margin)


TOTALS = [{}, {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 9.0}]


def aggregated(losses: Tensor, mask: Tensor, by_token: bool, totals: dict[str, float]) -> Tensor:
    rows, lengths = (losses * mask).sum(1), mask.sum(1)
    if by_token:
        return rows.sum() / (totals.get("batch_num_tokens") or mask.sum()) * totals.get("dp_size", 1)
    means = rows / lengths.clamp(min=1)
    return means.sum() / (totals.get("global_batch_size") or (lengths > 0).sum()) * totals.get("dp_size", 1)


def surrogate(
    logps: Tensor, old: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return the losses of tokens by OpenRLHF's formula, and where they are clipped."""
    ratio = (logps - old).clamp(-20, 20).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    gains = torch.min(plain, clipped)
    if dual_clip is not None:
        gains = torch.where(advantages < 0, torch.max(gains, dual_clip * advantages), gains)
    return -gains, clipped < plain


CLIPS = [(0.3, 0.3, None), (0.1, 0.4, None), (0.4, 0.1, None), (0.2, 0.28, 1.5), (1.0, 10.0, 3.0), (0.0, 0.3, 1.1)]


@pytest.mark.parametrize("totals", TOTALS, ids=["local", "global"])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("clips", CLIPS, ids=str)
def test_policy_loss(clips: tuple[Any, ...], by_token: bool, totals: dict[str, float]) -> None:
    logps, old, advantages = randn(3, 5, grad=True), randn(3, 5), randn(3, 5)
    advantages[0, 3] = 0
    losses, clipped = surrogate(logps, old, advantages, *clips)
    loss_fn = ours.PolicyLoss(*clips, token_level_loss=by_token)
    loss, clip_ratio, kl, *rest = loss_fn(logps, old, advantages, MASK, None, **totals)
    assert_alike(loss, aggregated(losses, MASK, by_token, totals), logps)
    torch.testing.assert_close(clip_ratio, (clipped * MASK).sum() / MASK.sum(), check_dtype=False)
    torch.testing.assert_close(kl, (((old - logps) * MASK).sum() / MASK.sum()).detach())
    assert rest == [None, None]
    _, _, kl, *_ = loss_fn(logps, old, advantages)
    torch.testing.assert_close(kl, (old - logps).mean().detach())


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss_of_far_policies(dual_clip: float | None) -> None:
    """A log-ratio beyond ±20 counts as ±20 and has no gradient, except in ppo_kl."""
    logps = torch.tensor([[30.0, 30.0, -30.0, -30.0, 1.0]]).double().requires_grad_()
    old, advantages = torch.zeros(1, 5).double(), torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0]]).double()
    losses, _ = surrogate(logps, old, advantages, 0.2, 0.28, dual_clip)
    loss, _, kl, *_ = ours.PolicyLoss(0.2, 0.28, dual_clip)(logps, old, advantages)
    assert_alike(loss, losses.mean(), logps)
    assert kl == -logps.detach().mean()
    old[0, 0] = float("-inf")
    assert ours.PolicyLoss(0.2, 0.28, dual_clip)(logps, old, advantages)[0] == loss


def test_policy_loss_reads_no_masked_token() -> None:
    logps, old, advantages = randn(3, 5, grad=True), randn(3, 5), randn(3, 5)
    loss_fn, results = ours.PolicyLoss(0.1, 0.4, 1.5), []
    for harm in (False, True):
        tensors = [x.masked_fill(MASK == 0, float("nan")) if harm else x for x in (logps, old, advantages)]
        loss, clip_ratio, kl, *_ = loss_fn(*tensors, MASK)
        results.append([loss, clip_ratio, kl, *torch.autograd.grad(loss, logps)])
    for clean, harmed in zip(*results, strict=True):
        assert torch.equal(clean, harmed)


@pytest.mark.parametrize("option", [{"policy_loss_type": "gspo"}, {"is_correction_level": "token"}], ids=str)
def test_a_policy_loss_that_is_not_computed_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        ours.PolicyLoss(**option)


@pytest.mark.parametrize(
    ("option", "error", "words"),
    [
        ({"clip_eps_low": -0.1}, ValueError, r"^clip must be .*pair \(low, high\).*\(-0\.1, 0\.2\)"),
        ({"clip_eps_high": "0.28"}, TypeError, r"^clip must be .*pair \(low, high\).*\(0\.2, '0\.28'\)"),
        ({"dual_clip": 1.0}, ValueError, r"^dual_clip must be .*1\.0"),
    ],
    ids=str,
)
def test_a_clip_out_of_range_is_refused(option: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ours.PolicyLoss(**option)


def test_what_is_refused_has_openrlhfs_name() -> None:
    x = randn(3, 5)
    with pytest.raises(ValueError, match=r"^old_log_probs must be \(B, T\) = \(3, 5\), like log_probs; .*\(3, 4\)"):
        ours.PolicyLoss()(x, x[:, :4], x, MASK)
    with pytest.raises(TypeError, match=r"^log_probs must be .*list"):
        ours.PolicyLoss()([[0.0]], x, x)


@pytest.mark.parametrize("totals", TOTALS, ids=["local", "global"])
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("by_token", [True, False])
def test_value_loss(by_token: bool, clip: float | None, totals: dict[str, float]) -> None:
    values, old, returns = randn(3, 5, grad=True), randn(3, 5), 3 * randn(3, 5)
    wanted = (values - returns) ** 2
    if clip is not None:
        wanted = torch.max(wanted, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    found = ours.ValueLoss(clip, by_token)(values, old, returns, MASK, **totals)
    assert_alike(found, 0.5 * aggregated(wanted, MASK, by_token, totals), values)


@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK.double()], ids=["none", "int", "bool", "float"])
def test_advantages(mask: Tensor | None) -> None:
    values, rewards = randn(3, 5, grad=True), randn(3, 5)
    found = ours.get_advantages_and_returns(values, rewards, mask, 0.9, 0.8)
    v, r = (x if mask is None else x * mask for x in (values.detach(), rewards))
    advantages, advantage = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(5)):
        following = v[:, t + 1] if t < 4 else 0.0
        advantage = r[:, t] + 0.9 * following - v[:, t] + 0.9 * 0.8 * advantage
        advantages[:, t] = advantage
    assert not found[0].requires_grad
    torch.testing.assert_close(found, (advantages, advantages + v))
