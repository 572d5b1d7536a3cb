"""The adapters against the signatures of OpenRLHF 0.11.2, and against what it computes, in plain PyTorch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref.integrations import _seam
from fastpref.integrations import openrlhf as ours

# As its models/utils.py, models/loss.py and trainer/ppo_utils/experience_maker.py have them, in the wheel of 0.11.2.
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


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    return f"({', '.join(str(x.replace(annotation=inspect.Parameter.empty)) for x in parameters)})"


def test_signatures() -> None:
    for name, wanted in FUNCTIONS.items():
        assert signature(getattr(ours, name)) == wanted
    for name, (init, forward) in CLASSES.items():
        cls = getattr(ours, name)
        assert signature(cls) == init
        assert signature(cls.forward) == forward.replace("(", "(self, ", 1)


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def assert_alike(found: Tensor, wanted: Tensor, *inputs: Tensor) -> None:
    """Values, and the gradients of a weighted sum."""
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    grads = [torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 5), (9,)])
def test_scoring(shape: tuple[int, ...]) -> None:
    logits, labels = randn(*shape, 11, grad=True), torch.randint(11, shape)
    before = logits.detach().clone()
    z = F.log_softmax(logits / 0.7, -1)
    found = ours.log_probs_from_logits(logits, labels, 0.7)
    assert_alike(found, z.gather(-1, labels[..., None])[..., 0], logits)
    z = F.log_softmax(logits, -1)
    assert_alike(ours.compute_entropy(logits), -(z.exp() * z).sum(-1), logits)
    assert torch.equal(logits, before)


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


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
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
    """OpenRLHF's formula: the losses of tokens, and where they are clipped."""
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
    """A log-ratio beyond ±20 is taken as ±20, without a gradient; but not in ppo_kl."""
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


@pytest.mark.parametrize(("option", "error", "words"), [
    ({"clip_eps_low": -0.1}, ValueError, r"^clip must be .*pair \(low, high\).*\(-0\.1, 0\.2\)"),
    ({"clip_eps_high": "0.28"}, TypeError, r"^clip must be .*pair \(low, high\).*\(0\.2, '0\.28'\)"),
    ({"dual_clip": 1.0}, ValueError, r"^dual_clip must be .*1\.0"),
], ids=str)  # fmt: skip
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


def stand_in(monkeypatch: pytest.MonkeyPatch, installed: str = "0.11.2") -> tuple[Any, Any]:
    """What OpenRLHF's models.utils and models.actor are to us: the names, and who uses them."""
    utils, actor = ModuleType("openrlhf.models.utils"), ModuleType("openrlhf.models.actor")
    source = """
def log_probs_from_logits(logits, labels, temperature=1.0):
    raise AssertionError
def compute_entropy(logits):
    raise AssertionError
"""
    exec(source, vars(utils))
    actor.nn = nn
    actor.log_probs_from_logits, actor.compute_entropy = utils.log_probs_from_logits, utils.compute_entropy
    source = """
class Actor(nn.Module):
    def forward(self, logits, labels):
        return compute_entropy(logits), log_probs_from_logits(logits, labels)
"""
    exec(source, vars(actor))
    for module in (ModuleType("openrlhf"), ModuleType("openrlhf.models"), utils, actor):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_seam, "version", lambda name: installed)
    return utils, actor


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    assert not ours._seam.replaced


def test_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    utils, actor = stand_in(monkeypatch)
    own = dict(vars(actor))
    logits, labels = randn(2, 5, 11), torch.randint(11, (2, 5))
    with ours.patch():
        entropy, logps = actor.Actor()(logits, labels)
        assert utils.compute_entropy is ours.compute_entropy
        with ours.patch():
            pass
        assert utils.log_probs_from_logits is actor.log_probs_from_logits is ours.log_probs_from_logits
    assert vars(actor) == own
    assert utils.compute_entropy is own["compute_entropy"]
    z = F.log_softmax(logits, -1)
    torch.testing.assert_close(logps, z.gather(-1, labels[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(z.exp() * z).sum(-1))


def test_what_is_replaced_again_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    utils, _ = stand_in(monkeypatch)
    ours.patch()
    utils.compute_entropy = print
    with pytest.raises(RuntimeError, match="compute_entropy was replaced again"):
        ours.unpatch()
    utils.compute_entropy = ours.compute_entropy
    ours.unpatch()


def wrong_signature(utils: Any, actor: Any) -> None:
    def log_probs_from_logits(logits: Any, labels: Any, temperature: float = 1.0, chunk: int = 0) -> None: ...

    utils.log_probs_from_logits = actor.log_probs_from_logits = log_probs_from_logits


def missing(utils: Any, actor: Any) -> None:
    del utils.compute_entropy


def unused(utils: Any, actor: Any) -> None:
    actor.Actor.forward = lambda self, logits, labels: actor.log_probs_from_logits(logits, labels)


@pytest.mark.parametrize(("change", "match"), [
    (wrong_signature, r"chunk=0"), (missing, "lacks openrlhf.models.utils.compute_entropy"),
    (unused, "does not use compute_entropy"),
])  # fmt: skip
def test_another_seam_is_refused(change: Any, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(*stand_in(monkeypatch))
    with pytest.raises(NotImplementedError, match=match) as error:
        ours.patch()
    assert ours.SUPPORTED in str(error.value)
    assert "installed is 0.11.2" in str(error.value)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "0.12.0")
    with pytest.raises(NotImplementedError, match=r"openrlhf>=0.9.3,<0.12 .* installed is 0.12.0"):
        ours.patch()
