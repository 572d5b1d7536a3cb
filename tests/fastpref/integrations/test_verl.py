"""The adapters against the signatures of verl 0.9.1, and against what it computes, in plain PyTorch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.integrations import _seam
from fastpref.integrations import verl as ours

# As utils/torch_functional.py, utils/experimental/torch_functional.py and trainer/ppo/core_algos.py have them, in the
# wheel of 0.9.1.
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
    parameters = inspect.signature(function).parameters.values()
    found = ", ".join(str(x.replace(annotation=inspect.Parameter.empty)) for x in parameters)
    assert f"({found})" == SIGNATURES[name]


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


def assert_alike(found: Tensor, wanted: Tensor, *inputs: Tensor) -> None:
    """Values, and the gradients of a weighted sum."""
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    grads = [torch.autograd.grad((x * weights).sum(), inputs, retain_graph=True) for x in (wanted, found)]
    for b, a in zip(*grads, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 5), (9,)])
def test_scoring_of_logits(shape: tuple[int, ...]) -> None:
    leaf, labels = randn(*shape, 11, grad=True), torch.randint(11, shape)
    z = F.log_softmax(leaf, -1)
    wanted = z.gather(-1, labels[..., None])[..., 0]
    assert_alike(ours.logprobs_from_logits(leaf, labels), wanted, leaf)
    assert_alike(ours.logprobs_from_logits(leaf * 1, labels, False), wanted, leaf)
    entropy = -(z.exp() * z).sum(-1)
    assert_alike(ours.entropy_from_logits(leaf), entropy, leaf)
    assert_alike(ours.entropy_from_logits_with_chunking(leaf, chunk_size=2), entropy, leaf)
    logits = leaf * 1
    assert_alike(ours.logprobs_from_logits(logits, labels), wanted, leaf)
    # Over the logits: each row of the gradient adds up to 0.
    torch.testing.assert_close(logits.detach().sum(-1), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 5), (9,)])
def test_scoring_of_hidden_states(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, own = [], torch.ops.fastpref.linear_logprobs
    monkeypatch.setattr(torch.ops.fastpref, "linear_logprobs", lambda *args: (calls.append(0), own(*args))[1])
    hidden, weight, ids = randn(*shape, 7, grad=True), randn(11, 7, grad=True), torch.randint(11, shape)
    logps, entropy = ours.FusedLinearForPPO()(hidden, weight, ids, 0.7)
    assert len(calls) == 1
    z = F.log_softmax(hidden @ weight.T / 0.7, -1)
    assert_alike(logps, z.gather(-1, ids[..., None])[..., 0], hidden, weight)
    assert_alike(entropy, -(z.exp() * z).sum(-1), hidden, weight)


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
TOTALS: list[dict[str, Any]] = [
    {}, {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 9, "loss_scale_factor": 7}
]  # fmt: skip


def aggregated(
    losses: Tensor, mode: str, dp_size: int = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> Tensor:  # fmt: skip
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
    """verl's formula: the losses of tokens, and its three means."""
    log_ratio = (logps - old).clamp(-20, 20)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    single = torch.maximum(plain, clipped)
    losses = torch.where(advantages < 0, torch.minimum(single, -dual * advantages), single)
    return losses, [mean(clipped > plain), mean(-log_ratio), mean((single > -dual * advantages) & (advantages < 0))]


# The bounds, and the options that say so beside a clip of 0.3.
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
        clip_ratio=0.3, clip_ratio_low=given.get("low"), clip_ratio_high=given.get("high"), global_batch_info=totals,
        get=lambda name, default: given.get({"clip_ratio_c": "dual"}[name], default),
    )  # fmt: skip
    loss, metrics = ours.compute_policy_loss_vanilla(
        old_log_prob=old, log_prob=logps, advantages=advantages, response_mask=MASK.bool(), loss_agg_mode=mode,
        config=config, rollout_is_weights=weights,
    )  # fmt: skip
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


SOURCES = {
    "verl": "", "verl.utils": "", "verl.utils.experimental": "", "verl.models": "", "verl.models.transformers": "",
    "verl.trainer": "", "verl.trainer.ppo": "",
    "verl.utils.torch_functional": """
def logprobs_from_logits(logits, labels, inplace_backward=True): ...
def entropy_from_logits(logits): ...
def entropy_from_logits_with_chunking(logits, chunk_size=2048): ...
def log_probs_from_logits_response(logits, labels): return logprobs_from_logits(logits=logits, labels=labels)
""",
    "verl.utils.experimental.torch_functional": """
class FusedLinearForPPO:
    def __init__(self, chunk_size=512, impl_backend="torch"): ...
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0): ...
""",
    "verl.models.transformers.dense_common": """
def forward_with_torch_backend(hidden, weight, ids):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    return FusedLinearForPPO(impl_backend="torch").forward(hidden, weight, ids, temperature=1.0)
""",
    "verl.trainer.ppo.core_algos": """
def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam): ...
""",
    "verl.engine": "from verl.utils.torch_functional import logprobs_from_logits",
}  # fmt: skip


def stand_in(monkeypatch: pytest.MonkeyPatch, installed: str = "0.9.1") -> dict[str, Any]:
    """Modules with verl's names, of which the last holds a function that it imported."""
    modules: dict[str, Any] = {}
    for name, source in SOURCES.items():
        modules[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
        exec(source, vars(modules[name]))
    monkeypatch.setattr(_seam, "version", lambda name: installed)
    return modules


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    assert not ours._seam.replaced


def test_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = stand_in(monkeypatch)
    own = {name: dict(vars(module)) for name, module in modules.items()}
    hidden, weight, ids = randn(2, 5, 7), randn(11, 7), torch.randint(11, (2, 5))
    wanted = F.log_softmax(hidden @ weight.T, -1).gather(-1, ids[..., None])[..., 0]
    with ours.patch():
        scored = [
            modules["verl.utils.torch_functional"].log_probs_from_logits_response(hidden @ weight.T, ids),
            modules["verl.engine"].logprobs_from_logits(hidden @ weight.T, ids),
            modules["verl.models.transformers.dense_common"].forward_with_torch_backend(hidden, weight, ids)[0],
        ]
        core = modules["verl.trainer.ppo.core_algos"]
        assert core.compute_gae_advantage_return is ours.compute_gae_advantage_return
    for found in scored:
        torch.testing.assert_close(found, wanted)
    assert {name: dict(vars(module)) for name, module in modules.items()} == own


@pytest.mark.parametrize(("name", "before", "after", "match"), [
    ("verl.utils.torch_functional", "inplace_backward=True", "inplace_backward=False", "inplace_backward=False"),
    ("verl.utils.experimental.torch_functional", "temperature=1.0", "temperature=1.0, bias=None", "bias=None"),
    ("verl.utils.torch_functional", "def entropy_from_logits(", "def entropy(", r"lacks .*entropy_from_logits$"),
    ("verl.models.transformers.dense_common", "FusedLinearForPPO", "Fused", "does not use FusedLinearForPPO"),
], ids=["default", "parameter", "missing", "unused"])  # fmt: skip
def test_another_seam_is_refused(
    name: str, before: str, after: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, name, SOURCES[name].replace(before, after))
    stand_in(monkeypatch)
    with pytest.raises(NotImplementedError, match=match) as error:
        ours.patch()
    assert f"verl{ours.SUPPORTED}" in str(error.value)
    assert "installed is 0.9.1" in str(error.value)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "0.10.0")
    with pytest.raises(NotImplementedError, match=r"verl>=0.9,<0.10 .* installed is 0.10.0"):
        ours.patch()
