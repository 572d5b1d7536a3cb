"""PPO's rewards, advantages and losses against definitions in loops over Python numbers, and points worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastpref
from fastpref import (
    AdaptiveKLController,
    gae,
    kl_shaped_rewards,
    masked_whiten,
    nn,
    ppo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ptx_loss,
    reference,
)
from fastpref.integrations import openrlhf
from fastpref_kernels import gae as scan
from tests.tolerance import DTYPES, assert_accurate

any_of = settings(
    max_examples=60, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
close = torch.testing.assert_close
Rows = list[list[float]]
Mask = list[list[bool]]


# The definitions. A row of `x` is a list of Python numbers, as is its mask.


def mean_oracle(x: Rows, mask: Mask, reduction: str = "token", denominator: float | None = None) -> float:
    kept = [[value for value, counts in zip(*row, strict=True) if counts] for row in zip(x, mask, strict=True)]
    kept = [row for row in kept if row]
    if reduction == "token":
        terms = [value for row in kept for value in row]
    else:
        terms = [math.fsum(row) / len(row) for row in kept]
    return math.fsum(terms) / (denominator or len(terms) or 1)


def over(function: Callable[..., float], *tensors: Tensor) -> Rows:
    """`function` of the numbers at every place."""
    return [[function(*values) for values in zip(*rows, strict=True)] for rows in zip(*(t.tolist() for t in tensors))]  # noqa: B905


def policy_oracle(
    logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: Any = 0.2, dual_clip: float | None = None,
    **mean: Any,
) -> list[float]:  # fmt: skip
    low, high = clip if isinstance(clip, (tuple, list)) else (clip, clip)

    def branches(logp: float, old: float, advantage: float) -> tuple[float, float]:
        ratio = math.exp(logp - old)
        return -advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high)

    def loss(logp: float, old: float, advantage: float) -> float:
        single = max(branches(logp, old, advantage))
        return min(single, -advantage * dual_clip) if dual_clip is not None and advantage < 0 else single

    losses = over(loss, logps, old, advantages)
    kl = over(lambda logp, old: (logp - old) ** 2 / 2, logps, old)
    clipped = over(lambda *x: float(branches(*x)[1] > branches(*x)[0]), logps, old, advantages)
    return [mean_oracle(x, mask.tolist(), **mean) for x in (losses, kl, clipped)]


def value_oracle(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2, **mean: Any
) -> list[float]:
    def branches(value: float, old: float, target: float) -> tuple[float, float]:
        return (value - target) ** 2, (min(max(value, old - clip), old + clip) - target) ** 2

    losses = over(lambda *x: max(branches(*x)) / 2, values, old, returns)
    clipped = over(lambda *x: float(branches(*x)[1] > branches(*x)[0]), values, old, returns)
    return [mean_oracle(x, mask.tolist(), **mean) for x in (losses, clipped)]


def ppo_oracle(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor, returns: Tensor,
    mask: Tensor, clip: Any = 0.2, dual_clip: float | None = None, value_clip: float = 0.2, value_coef: float = 0.1,
    **mean: Any,
) -> list[float]:  # fmt: skip
    policy, kl, clipped = policy_oracle(logps, old_logps, advantages, mask, clip, dual_clip, **mean)
    value, _ = value_oracle(values, old_values, returns, mask, value_clip, **mean)
    return [policy + value_coef * value, policy, value, kl, clipped]


def ptx_oracle(logps: Tensor, mask: Tensor, gamma: float = 27.8, **mean: Any) -> list[float]:
    return [-gamma * mean_oracle(logps.tolist(), mask.tolist(), **mean)]


def gae_oracle(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Σ_k (γλ)^k δ over the tokens that count, each sum on its own."""
    advantages, returns = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for b, counts in enumerate(mask.tolist()):
        places = [t for t, c in enumerate(counts) if c]
        r, v = ([x[b, t].item() for t in places] for x in (rewards, values))
        deltas = [r_t + gamma * following - v_t for r_t, v_t, following in zip(r, v, [*v[1:], 0.0])]  # noqa: B905
        for i, t in enumerate(places):
            total = math.fsum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
            advantages[b, t], returns[b, t] = total, total + v[i]
    return advantages, returns


def shaped_oracle(
    scores: Tensor, logps: Tensor, ref: Tensor, mask: Tensor, kl_coef: float, estimator: str = "k1"
) -> Tensor:
    penalty = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}[estimator]
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for b, counts in enumerate(mask.tolist()):
        places = [t for t, c in enumerate(counts) if c]
        for t in places:
            out[b, t] = -kl_coef * penalty((logps[b, t] - ref[b, t]).item())
        if places:
            out[b, places[-1]] += scores[b].item()
    return out


def whiten_oracle(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    kept = x[mask].tolist()
    mean = math.fsum(kept) / (len(kept) or 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in kept) / (len(kept) or 1) + 1e-8)
    out = torch.zeros(x.shape, dtype=torch.float64)
    out[mask] = torch.tensor([(v - mean) / deviation + (0.0 if shift_mean else mean) for v in kept]).double()
    return out


def ppo_policy_loss_of_a_pair(*tensors: Tensor, **mean: Any) -> fastpref.losses.PPOPolicyLoss:
    return ppo_policy_loss(*tensors, clip=(0.1, 0.4), dual_clip=1.3, **mean)


def pair_oracle(*tensors: Tensor, **mean: Any) -> list[float]:
    return policy_oracle(*tensors, clip=(0.1, 0.4), dual_clip=1.3, **mean)


@dataclass(frozen=True)
class Loss:
    """A loss that is a masked mean: `scales` are what its (B, T) arguments are multiples of a normal of."""

    function: Callable[..., Any]
    oracle: Callable[..., list[float]]
    scales: tuple[float, ...]
    differentiable: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.function.__name__

    def example(self, B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        tensors = (s * torch.randn(B, T, generator=generator, dtype=torch.float64) for s in self.scales)
        return tuple(t.to(dtype) for t in tensors)


LOSSES = (
    Loss(ppo_policy_loss, policy_oracle, (0.3, 0.3, 1.0), (0,)),
    Loss(ppo_policy_loss_of_a_pair, pair_oracle, (0.3, 0.3, 1.0), (0,)),
    Loss(ppo_value_loss, value_oracle, (0.5, 0.5, 1.0), (0,)),
    Loss(ppo_loss, ppo_oracle, (0.3, 0.3, 1.0, 0.5, 0.5, 1.0), (0, 3)),
    Loss(ptx_loss, ptx_oracle, (2.0,), (0,)),
)
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
every_reduction = pytest.mark.parametrize("reduction", ["token", "sequence"])


def fields(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple) else (result,)


def holey(B: int, T: int, share: float = 0.7, seed: int = 1) -> Tensor:
    """A mask with holes and ragged ends; where there are several sequences, nothing of the first counts."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) < share
    mask &= torch.arange(T) < torch.randint(T + 1, (B, 1), generator=generator)
    if B > 1:
        mask[0] = False
    return mask


class TestEveryLoss:
    @every_loss
    @every_reduction
    @pytest.mark.parametrize("denominator", [None, 7, 2.5])
    def test_definition(self, loss: Loss, reduction: str, denominator: float | None) -> None:
        tensors, mask = loss.example(5, 9), holey(5, 9)
        got = fields(loss.function(*tensors, mask, reduction=reduction, denominator=denominator))
        wanted = loss.oracle(*tensors, mask, reduction=reduction, denominator=denominator)
        assert [value.item() for value in got] == pytest.approx(wanted, rel=1e-12)
        assert all(value.shape == () for value in got)

    @every_loss
    @every_reduction
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, loss: Loss, dtype: torch.dtype, reduction: str) -> None:
        """Computed in float32 whatever comes in, the gradient in the dtype that came."""
        mask, results = holey(4, 33), []
        wide = torch.promote_types(dtype, torch.float32)
        for kind in (dtype, wide, torch.float64):
            leaves = [t.to(kind) for t in loss.example(4, 33, dtype)]
            for i in loss.differentiable:
                leaves[i].requires_grad_()
            result = fields(loss.function(*leaves, mask, reduction=reduction))
            result[0].backward()
            results.append([*result, *(leaves[i].grad for i in loss.differentiable)])
        for i, (ours, eager, truth) in enumerate(zip(*results, strict=True)):
            assert_accurate(ours, eager.to(ours.dtype), truth, f"{loss.name}[{i}]")
        assert results[0][0].dtype == wide

    @every_loss
    @every_reduction
    def test_gradcheck(self, loss: Loss, reduction: str) -> None:
        tensors, mask = loss.example(4, 5), holey(4, 5)
        assert torch.autograd.gradcheck(
            lambda *x: fields(
                loss.function(*(dict(enumerate(tensors)) | dict(zip(loss.differentiable, x, strict=True))).values(),
                              mask, reduction=reduction)
            )[0],
            [tensors[i].requires_grad_() for i in loss.differentiable],
        )  # fmt: skip

    @every_loss
    def test_only_the_loss_and_only_the_policy_carry_gradients(self, loss: Loss) -> None:
        tensors = [t.requires_grad_() for t in loss.example(3, 4)]
        result = fields(loss.function(*tensors, torch.ones(3, 4, dtype=torch.bool)))
        assert [value.requires_grad for value in result] == [True] + [False] * (len(result) - 1)
        result[0].backward()
        assert [i for i, t in enumerate(tensors) if t.grad is not None] == list(loss.differentiable)

    @every_loss
    @every_reduction
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_what_is_masked_is_harmless(self, loss: Loss, reduction: str, value: float) -> None:
        mask, results = holey(4, 6), []
        for harm in (False, True):
            tensors = [t.masked_fill(~mask, value) if harm else t for t in loss.example(4, 6)]
            for i in loss.differentiable:
                tensors[i].requires_grad_()
            result = fields(loss.function(*tensors, mask, reduction=reduction))
            result[0].backward()
            results.append([*result, *(tensors[i].grad for i in loss.differentiable)])
        for clean, harmed in zip(*results, strict=True):
            assert torch.equal(clean, harmed)
        for gradient in results[1][-len(loss.differentiable) :]:
            assert (gradient[~mask] == 0).all()

    @every_loss
    @every_reduction
    @pytest.mark.parametrize("denominator", [None, 0, torch.tensor(0), 3])
    @pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0), (1, 1)])
    def test_nothing_counts(
        self, loss: Loss, shape: tuple[int, int], reduction: str, denominator: Tensor | float | None
    ) -> None:
        leaves = [t.requires_grad_() for t in loss.example(*shape)]
        mask = torch.zeros(shape, dtype=torch.bool)
        result = fields(loss.function(*leaves, mask, reduction=reduction, denominator=denominator))
        assert [value.item() for value in result] == [0] * len(result)
        result[0].backward()
        for i in loss.differentiable:
            assert leaves[i].grad is not None
            assert (leaves[i].grad == 0).all()

    @every_loss
    @pytest.mark.parametrize("kind", ["number", "integer tensor", "float64 tensor"])
    @every_reduction
    def test_parts_with_one_denominator_add_up(self, loss: Loss, reduction: str, kind: str) -> None:
        """Gradient accumulation: unequal parts, of which the means' mean would be another number."""
        tensors, mask = loss.example(6, 8, torch.float32), holey(6, 8)
        count = mask.sum() if reduction == "token" else mask.any(1).sum()
        denominator = {"number": count.item(), "integer tensor": count, "float64 tensor": count.double()}[kind]
        gradients, values = [], []
        for parts in ((slice(0, 6),), (slice(0, 2), slice(2, 6))):
            leaves = [t.clone() for t in tensors]
            for i in loss.differentiable:
                leaves[i].requires_grad_()
            results = [
                fields(loss.function(*(t[p] for t in leaves), mask[p], reduction=reduction, denominator=denominator))
                for p in parts
            ]
            for result in results:
                result[0].backward()
            values.append([sum(x[1:], x[0]) for x in zip(*results, strict=True)])
            gradients.append([leaves[i].grad for i in loss.differentiable])
        plain = fields(loss.function(*tensors, mask, reduction=reduction))
        for whole, summed, alone in zip(*values, plain, strict=True):
            assert whole.dtype == torch.float32
            close(summed, whole, rtol=1e-6, atol=1e-7)
            close(whole, alone, rtol=1e-6, atol=0)
        close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)

    @every_loss
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self, loss: Loss) -> None:
        torch.compiler.reset()
        compiled = torch.compile(loss.function, fullgraph=True, backend="aot_eager")
        mask, results = holey(3, 5), []
        for function in (loss.function, compiled):
            tensors = list(loss.example(3, 5))
            for i in loss.differentiable:
                tensors[i].requires_grad_()
            result = fields(function(*tensors, mask, reduction="sequence", denominator=mask.sum()))
            result[0].backward()
            results.append([*result, *(tensors[i].grad for i in loss.differentiable)])
        close(*results, rtol=1e-14, atol=1e-15)


@st.composite
def token_batches(draw: st.DrawFn) -> tuple[int, int, Tensor, int]:
    """B, T, a mask and a seed."""
    B, T = draw(st.integers(0, 4)), draw(st.one_of(st.integers(0, 12), st.sampled_from([31, 32, 33, 64, 100])))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    steps = torch.arange(T)
    if draw(st.booleans()):
        mask &= steps < torch.randint(T + 1, (B, 1), generator=generator)
    if draw(st.booleans()):
        mask &= steps >= torch.randint(T + 1, (B, 1), generator=generator)
    return B, T, mask, seed


class TestProperties:
    @any_of
    @given(
        batch=token_batches(), loss=st.sampled_from(LOSSES), reduction=st.sampled_from(["token", "sequence"]),
        denominator=st.sampled_from([None, 3, 0.25]), clip=st.sampled_from([0.05, 0.2, 3.0]),
        pair=st.sampled_from([None, (0.05, 0.4), [0.4, 0.05], (0.0, 0.3), (0.3, 0), (1.0, 10.0)]),
        dual_clip=st.sampled_from([None, 1.1, 3]),
    )  # fmt: skip
    def test_losses(
        self, batch: tuple[int, int, Tensor, int], loss: Loss, reduction: str, denominator: float | None, clip: float,
        pair: Any, dual_clip: float | None,
    ) -> None:  # fmt: skip
        B, T, mask, seed = batch
        tensors = loss.example(B, T, seed=seed)
        options: dict[str, Any] = {"reduction": reduction, "denominator": denominator}
        if loss.function is ppo_value_loss:
            options["clip"] = clip
        elif loss.function in (ppo_policy_loss, ppo_loss):
            options |= {"clip": pair or clip, "dual_clip": dual_clip}
        got = [value.item() for value in fields(loss.function(*tensors, mask, **options))]
        assert got == pytest.approx(loss.oracle(*tensors, mask, **options), rel=1e-10, abs=1e-13)

    @any_of
    @given(batch=token_batches(), gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]), lam=st.sampled_from([0.0, 0.95, 1.0]),
           block=st.sampled_from([2, 8, 32]), chunk=st.sampled_from([1, 50, 1 << 17]))  # fmt: skip
    def test_gae(
        self, batch: tuple[int, int, Tensor, int], gamma: float, lam: float, block: int, chunk: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Small blocks nest deep, small chunks are many."""
        B, T, mask, seed = batch
        monkeypatch.setattr(scan, "BLOCK", block)
        monkeypatch.setattr(scan, "CHUNK_TOKENS", chunk)
        scan._powers.cache_clear()
        rewards, values = torch.randn(2, B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wanted = gae_oracle(rewards, values, mask, gamma, lam)
        for function in (gae, reference.gae):
            close(function(rewards, values, mask, gamma=gamma, lam=lam), wanted, rtol=1e-11, atol=1e-11)
        scan._powers.cache_clear()

    @any_of
    @given(batch=token_batches(), estimator=st.sampled_from(["k1", "k2", "k3"]), coef=st.sampled_from([0.0, 0.1, 2.0]))
    def test_shaped_rewards(self, batch: tuple[int, int, Tensor, int], estimator: str, coef: float) -> None:
        B, T, mask, seed = batch
        generator = torch.Generator().manual_seed(seed)
        scores, (logps, ref) = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B,), (2, B, T))
        )
        got = kl_shaped_rewards(scores, logps, ref, mask, kl_coef=coef, estimator=estimator)
        close(got, shaped_oracle(scores, logps, ref, mask, coef, estimator), rtol=1e-12, atol=1e-12)

    @any_of
    @given(batch=token_batches(), shift=st.booleans(), offset=st.sampled_from([0.0, 10.0]))
    def test_whitening(self, batch: tuple[int, int, Tensor, int], shift: bool, offset: float) -> None:
        B, T, mask, seed = batch
        x = offset + torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        # A single value has a variance of 0, and what its mean is off by is divided by 1e-4.
        close(masked_whiten(x, mask, shift_mean=shift), whiten_oracle(x, mask, shift), rtol=1e-6, atol=1e-10)


def ragged(B: int, T: int, seed: int = 2) -> Tensor:
    lengths = torch.randint(T // 4, T + 1, (B, 1), generator=torch.Generator().manual_seed(seed))
    return torch.arange(T) < lengths


class TestGae:
    def test_by_hand(self) -> None:
        """γ = ½, λ = ½, V beyond the end 0; the hole is stepped over, and what is in it is never read."""
        rewards = torch.tensor([[1.0, 2.0, math.nan, 4.0, math.nan]])
        values = torch.tensor([[2.0, 4.0, math.nan, 8.0, math.nan]])
        mask = torch.tensor([[True, True, False, True, False]])
        advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
        # δ = (1 + 2 − 2, 2 + 4 − 4, ·, 4 + 0 − 8), A = δ + A_next/4.
        assert advantages.tolist() == [[1.25, 1.0, 0, -4.0, 0]]
        assert returns.tolist() == [[3.25, 5.0, 0, 4.0, 0]]

    @pytest.mark.parametrize("lam", [0.0, 1.0])
    def test_its_two_ends(self, lam: float) -> None:
        """λ = 1 is the discounted sum of rewards less the value, λ = 0 the one-step error."""
        rewards, values = torch.randn(2, 3, 70, dtype=torch.float64)
        advantages, returns = gae(rewards, values, torch.ones(3, 70, dtype=torch.bool), gamma=0.9, lam=lam)
        if lam:
            total = sum(0.9**t * rewards[:, t] for t in range(70))
            close(returns[:, 0], total)
        else:
            close(advantages[:, :-1], rewards[:, :-1] + 0.9 * values[:, 1:] - values[:, :-1])

    @pytest.mark.parametrize("holes", [False, True])
    @pytest.mark.parametrize("T", [1, 31, 33, 300, 2048])
    @pytest.mark.parametrize("decay", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.3, 0.3), (0.0, 0.5), (1.0, 0.0)])
    def test_as_exact_as_the_loop(self, decay: tuple[float, float], T: int, holes: bool) -> None:
        gamma, lam = decay
        rewards, values = torch.randn(2, 16, T)
        mask = holey(16, T) if holes else ragged(16, T)
        options = {"gamma": gamma, "lam": lam}
        ours, eager = gae(rewards, values, mask, **options), reference.gae(rewards, values, mask, **options)
        truth = reference.gae(rewards.double(), values.double(), mask, **options)
        for name, *found in zip(("advantages", "returns"), ours, eager, truth, strict=True):
            assert_accurate(*found, name)

    def test_a_very_long_sequence(self) -> None:
        """Three levels of blocks. Undiscounted rewards of 1 are counted exactly, as float32 can to 2^24."""
        T = 40_000
        rewards, values = torch.ones(1, T), torch.zeros(1, T)
        advantages, _ = gae(rewards, values, torch.ones(1, T, dtype=torch.bool), gamma=1.0, lam=1.0)
        assert torch.equal(advantages[0], torch.arange(T, 0, -1).float())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        rewards, values = torch.randn(2, 3, 40).to(dtype)
        mask = holey(3, 40)
        wide = torch.promote_types(dtype, torch.float32)
        for got, wanted in zip(gae(rewards, values, mask), gae(rewards.to(wide), values.to(wide), mask), strict=True):
            assert got.dtype == wide
            assert torch.equal(got, wanted)
        assert gae(rewards, values.double(), mask)[0].dtype == torch.float64

    def test_tiny_decays_are_not_slowed_by_denormals(self) -> None:
        powers = scan._powers(1e-3, torch.float32, torch.device("cpu"))
        assert ((powers == 0) | (powers >= torch.finfo(torch.float32).tiny)).all()

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("function", [gae, reference.gae])
    def test_what_is_masked_is_harmless(self, function: Callable[..., Any], value: float) -> None:
        rewards, values = torch.randn(2, 6, 70)
        for mask in (holey(6, 70), ragged(6, 70)):
            clean = function(rewards, values, mask)
            harmed = function(rewards.masked_fill(~mask, value), values.masked_fill(~mask, value), mask)
            for a, b in zip(clean, harmed, strict=True):
                assert torch.equal(a, b)
                assert (b[~mask] == 0).all()

    @pytest.mark.parametrize("holes", [False, True])
    def test_a_nan_that_counts_is_its_own_sequences(self, holes: bool) -> None:
        rewards, values = torch.randn(2, 5, 70)
        mask = holey(5, 70) if holes else ragged(5, 70)
        mask[2, :50] = True
        clean = gae(rewards, values, mask)
        rewards[2, 40] = math.nan
        for before, after in zip(clean, gae(rewards, values, mask), strict=True):
            assert after[2, :41].isnan().all()
            assert (after[2][~mask[2]] == 0).all()
            others = [0, 1, 3, 4]
            assert torch.equal(before[others], after[others])

    @pytest.mark.parametrize("T", [1, 20, 70, 2100])
    def test_bits_depend_on_no_other_sequence(self, T: int) -> None:
        rewards, values = torch.randn(2, 7, T)
        mask = ragged(7, T)
        mask[3, T // 8] = False
        whole = gae(rewards, values, mask)
        for part in (slice(0, 1), slice(2, 3), slice(4, 7)):
            for a, b in zip(whole, gae(rewards[part], values[part], mask[part]), strict=True):
                assert torch.equal(a[part], b)

    @pytest.mark.parametrize("function", [gae, reference.gae])
    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
    def test_empty(self, function: Callable[..., Any], shape: tuple[int, int]) -> None:
        zeros = torch.zeros(shape)
        for counts in (False, True):
            for got in function(zeros, zeros, torch.full(shape, counts)):
                assert got.shape == shape
                assert (got == 0).all()

    @pytest.mark.parametrize("function", [gae, reference.gae])
    def test_detached(self, function: Callable[..., Any]) -> None:
        rewards, values = (torch.randn(2, 3).requires_grad_() for _ in range(2))
        for got in function(rewards, values, torch.ones(2, 3, dtype=torch.bool)):
            assert not got.requires_grad

    def test_strides_and_untouched_inputs(self) -> None:
        rewards, values = torch.randn(2, 70, 4).transpose(1, 2)
        mask = holey(70, 4).T
        kept = [x.clone() for x in (rewards, values, mask)]
        got = gae(rewards, values, mask)
        wanted = gae(*(x.contiguous() for x in kept))
        assert all(map(torch.equal, got, wanted))
        assert all(map(torch.equal, (rewards, values, mask), kept))
        row = torch.randn(1, 70)
        expanded = gae(row.expand(3, 70), row.expand(3, 70), ragged(1, 70).expand(3, 70))
        assert all(torch.equal(x[0], x[2]) for x in expanded)

    def test_operator(self) -> None:
        rewards, values = torch.randn(2, 3, 40)
        for mask in (ragged(3, 40), holey(3, 40)):
            torch.library.opcheck(torch.ops.fastpref.gae, (rewards, values.bfloat16(), mask, 0.9, 0.95))

    @pytest.mark.parametrize("dynamic", [False, True])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self, dynamic: bool) -> None:
        torch.compiler.reset()

        def advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
            return masked_whiten(gae(rewards, values * 2, mask, lam=0.9)[0], mask)

        compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for T in (40, 70):
            arguments = (*torch.randn(2, 3, T, dtype=torch.float64), holey(3, T))
            close(compiled(*arguments), advantages(*arguments), rtol=1e-12, atol=1e-14)


class TestShapedRewards:
    @pytest.mark.parametrize(
        ("estimator", "penalties"),
        [("k1", [1.0, -2.0]), ("k2", [0.5, 2.0]), ("k3", [math.exp(-1), math.exp(2) - 3])],
    )
    def test_by_hand(self, estimator: str, penalties: list[float]) -> None:
        scores, logps = torch.tensor([10.0, 7.0]), torch.tensor([[0.0, math.nan, -3.0, math.nan], [math.nan] * 4])
        ref = torch.tensor([[-1.0, 0.0, -1.0, 0.0]] * 2)
        mask = torch.tensor([[True, False, True, False], [False] * 4])
        got = kl_shaped_rewards(scores, logps, ref, mask, kl_coef=0.1, estimator=estimator)
        assert got[0].tolist() == pytest.approx([-0.1 * penalties[0], 0, 10 - 0.1 * penalties[1], 0])
        assert got[1].tolist() == [0] * 4

    def test_a_score_where_nothing_counts_is_never_read(self) -> None:
        x, mask = torch.zeros(2, 3), torch.tensor([[False] * 3, [True] * 3])
        got = kl_shaped_rewards(torch.tensor([math.nan, 1.0]), x, x, mask, kl_coef=1.0)
        assert got.tolist() == [[0, 0, 0], [0, 0, 1]]

    def test_k3_keeps_its_digits_and_is_never_below_zero(self) -> None:
        d = torch.tensor([[1e-3, -1e-3, 1e-2, 80.0, -80.0]])
        got = kl_shaped_rewards(torch.zeros(1), d, torch.zeros_like(d), torch.ones_like(d).bool(), kl_coef=1.0,
                                estimator="k3")  # fmt: skip
        wanted = [math.expm1(-x) + x for x in d.double()[0].tolist()]
        assert (-got[0]).tolist() == pytest.approx(wanted, rel=2e-4)
        assert (got <= 0).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes_and_detached(self, dtype: torch.dtype) -> None:
        """Widened before the difference, which a bf16 difference would round to 8 bits."""
        logps, ref = (torch.randn(3, 5) - 50).to(dtype).requires_grad_(), (torch.randn(3, 5) - 50).to(dtype)
        scores, mask = torch.randn(3).to(dtype).requires_grad_(), holey(3, 5)
        wide = torch.promote_types(dtype, torch.float32)
        got = kl_shaped_rewards(scores, logps, ref, mask, kl_coef=0.1)
        assert got.dtype == wide
        assert not got.requires_grad
        assert torch.equal(got, kl_shaped_rewards(scores.to(wide), logps.to(wide), ref.to(wide), mask, kl_coef=0.1))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.usefixtures("unpoisoned")
    def test_compiles_whole(self) -> None:
        torch.compiler.reset()
        compiled = torch.compile(kl_shaped_rewards, fullgraph=True, backend="aot_eager")
        arguments = (torch.randn(3), *torch.randn(2, 3, 5), holey(3, 5))
        for estimator in ("k1", "k3"):
            options = {"kl_coef": 0.1, "estimator": estimator}
            close(compiled(*arguments, **options), kl_shaped_rewards(*arguments, **options))


class TestWhiten:
    def test_by_hand(self) -> None:
        """1 and 3: μ = 2, σ = 1, with the count as the variance's divisor."""
        x = torch.tensor([[1.0, math.nan], [3.0, math.inf]], dtype=torch.float64)
        mask = torch.tensor([[True, False], [True, False]])
        assert masked_whiten(x, mask).tolist() == [pytest.approx([-1, 0], abs=1e-8), pytest.approx([1, 0], abs=1e-8)]
        assert masked_whiten(x, mask, shift_mean=False).tolist() == [pytest.approx([1, 0]), pytest.approx([3, 0])]

    @pytest.mark.parametrize("shift", [True, False])
    def test_gradcheck(self, shift: bool) -> None:
        x, mask = torch.randn(3, 4, dtype=torch.float64).requires_grad_(), holey(3, 4, 0.9, seed=3)
        assert mask.sum() > 3
        assert torch.autograd.gradcheck(lambda x: masked_whiten(x, mask, shift_mean=shift), x)

    def test_what_is_masked_reaches_no_gradient(self) -> None:
        mask = holey(3, 4, 0.9, seed=3)
        x = torch.randn(3, 4).masked_fill(~mask, math.nan).requires_grad_()
        (masked_whiten(x, mask, shift_mean=False) ** 3).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad[~mask] == 0).all()

    @pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3), ()])
    def test_nothing_counts(self, shape: tuple[int, ...]) -> None:
        x = torch.randn(shape).requires_grad_()
        got = masked_whiten(x, torch.zeros(shape, dtype=torch.bool), shift_mean=False)
        assert got.shape == shape
        assert (got == 0).all()
        got.sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()

    def test_one_value_is_its_own_mean(self) -> None:
        mask = torch.tensor([False, True])
        assert masked_whiten(torch.tensor([5.0, 7.0]), mask).tolist() == [0, 0]
        assert masked_whiten(torch.tensor([5.0, 7.0]), mask, shift_mean=False).tolist() == [0, 7]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, dtype: torch.dtype) -> None:
        x, mask = (100 + torch.randn(4, 50)).to(dtype), holey(4, 50)
        got = masked_whiten(x, mask)
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        close(got.double(), whiten_oracle(x.double(), mask), rtol=1e-4, atol=1e-4)


class TestPolicyLoss:
    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope", "clipped"),
        [
            (1.5, 2.0, -2.4, 0.0, 1),  # a good answer made much likelier: no further
            (1.5, -2.0, 3.0, 3.0, 0),  # a bad one made much likelier: back
            (0.5, 2.0, -1.0, -1.0, 0),
            (0.5, -2.0, 1.6, 0.0, 1),
            (1.1, 2.0, -2.2, -2.2, 0),
            (1.0, 2.0, -2.0, -2.0, 0),
            (1.0, 0.0, 0.0, 0.0, 0),
        ],
    )
    def test_by_hand(self, ratio: float, advantage: float, loss: float, slope: float, clipped: int) -> None:
        logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        result = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask)
        assert result.loss.item() == pytest.approx(loss)
        assert result.approx_kl.item() == pytest.approx(math.log(ratio) ** 2 / 2)
        assert result.clip_fraction.item() == clipped
        (gradient,) = torch.autograd.grad(result.loss, logps)
        assert gradient.item() == pytest.approx(slope)

    @pytest.mark.parametrize("advantage", [-1e-3, 0.0, 1e-3, 1.0])
    @pytest.mark.parametrize("log_ratio", [-80.0, -20.0, 20.0, 80.0])
    def test_extremes(self, log_ratio: float, advantage: float) -> None:
        logps = torch.tensor([[log_ratio]]).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        result = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask)
        wanted = policy_oracle(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask)
        assert [x.item() for x in result] == pytest.approx(wanted, rel=1e-5)
        (gradient,) = torch.autograd.grad(result.loss, logps)
        # The loss is −Aρ or does not depend on the ratio.
        slope = -advantage * math.exp(log_ratio)
        taken = slope >= -advantage * min(max(math.exp(log_ratio), 0.8), 1.2)
        assert gradient.item() == pytest.approx(slope if taken else 0.0, rel=1e-5)

    @pytest.mark.parametrize("advantage", [0.0, 2.0])
    @pytest.mark.parametrize("clip", [0.2, 10.0])
    @pytest.mark.parametrize("log_ratio", [100.0, 1e4, math.inf])
    def test_a_ratio_that_overflows_where_it_is_clipped(self, log_ratio: float, clip: float, advantage: float) -> None:
        logps, mask = torch.tensor([[log_ratio]]).requires_grad_(), torch.ones(1, 1, dtype=torch.bool)
        loss = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip=clip).loss
        assert loss.item() == pytest.approx(-advantage * (1 + clip))
        assert torch.autograd.grad(loss, logps)[0].item() == 0

    @pytest.mark.parametrize("clip", [0.2, (0.0, 0.28), (0.2, 0.0)])
    def test_at_the_old_policy_it_is_the_policy_gradient(self, clip: Any) -> None:
        """A bound of 0 too, at which every ratio is."""
        logps, advantages = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
        mask = torch.ones(3, 4, dtype=torch.bool)
        loss, kl, clipped = ppo_policy_loss(logps, logps.detach(), advantages, mask, clip=clip, dual_clip=3.0)
        (gradient,) = torch.autograd.grad(loss, logps)
        close(gradient, -advantages / 12)
        close(loss, -advantages.mean())
        assert kl.item() == clipped.item() == 0

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope", "clipped"),
        [
            (2.0, 2.0, -2.6, 0.0, 1),  # above 1 + high
            (1.25, 2.0, -2.5, -2.5, 0),  # within, where 1 + low is not
            (0.5, -2.0, 1.8, 0.0, 1),  # below 1 − low
            (0.85, -2.0, 1.8, 0.0, 1),  # as well, where 1 − high is not
            (0.95, -2.0, 1.9, 1.9, 0),
            (2.5, -2.0, 5.0, 5.0, 0),
            (4.0, -2.0, 6.0, 0.0, 0),  # above the dual clip
            (4.0, 2.0, -2.6, 0.0, 1),  # which has no part where A > 0
            (4.0, 0.0, 0.0, 0.0, 0),
        ],
    )
    def test_a_pair_and_a_dual_clip_by_hand(
        self, ratio: float, advantage: float, loss: float, slope: float, clipped: int
    ) -> None:
        logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        result = ppo_policy_loss(
            logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, clip=(0.1, 0.3), dual_clip=3.0
        )
        assert result.loss.item() == pytest.approx(loss)
        assert result.clip_fraction.item() == clipped
        (gradient,) = torch.autograd.grad(result.loss, logps)
        assert gradient.item() == pytest.approx(slope)

    @pytest.mark.parametrize("dual_clip", [None, 3.0])
    @pytest.mark.parametrize("clip", [(0.1, 0.4), (0.4, 0.1), (1.0, 10.0), (5.0, 0.2), (0.0, 0.3), (0.3, 0.0)])
    def test_against_the_formula(self, clip: tuple[float, float], dual_clip: float | None) -> None:
        """Values and gradients, in float64, of the two branches written as one clamp of the ratio per sign of A."""
        row = LOSSES[0]
        (logps, old, advantages), mask = row.example(40, 30), holey(40, 30)
        logps = (4 * logps).requires_grad_()
        ratio = (logps - old).exp()
        good, bad = ratio.clamp(max=1 + clip[1]), ratio.clamp(min=1 - clip[0], max=dual_clip)
        losses = -advantages * torch.where(advantages > 0, good, bad)
        wanted = losses[mask].mean()
        result = ppo_policy_loss(logps, old, advantages, mask, clip=clip, dual_clip=dual_clip)
        close(result.loss, wanted, rtol=1e-13, atol=1e-13)
        close(torch.autograd.grad(result.loss, logps), torch.autograd.grad(wanted, logps), rtol=1e-13, atol=1e-16)
        outside = torch.where(advantages > 0, ratio > 1 + clip[1], ratio < 1 - clip[0])[mask]
        close(result.clip_fraction, outside.double().mean())
        assert outside.any()

    def test_each_bound_is_of_one_sign_alone(self) -> None:
        """Of log-ratios far on both sides, `high` moves the losses where A > 0, `low` and the dual clip where A < 0."""
        logps, old = torch.tensor([[-3.0], [3.0]]), torch.zeros(2, 1)
        mask = torch.ones(2, 1, dtype=torch.bool)

        def loss(sign: int, **options: Any) -> float:
            return ppo_policy_loss(logps, old, torch.full((2, 1), float(sign)), mask, **options).loss.item()

        assert loss(1, clip=(0.2, 0.2)) == loss(1, clip=(0.4, 0.2)) == loss(1, clip=(0.4, 0.2), dual_clip=2.0)
        assert loss(1, clip=(0.2, 0.2)) > loss(1, clip=(0.2, 0.4))
        assert loss(-1, clip=(0.2, 0.2)) == loss(-1, clip=(0.2, 0.4))
        assert loss(-1, clip=(0.2, 0.2)) > loss(-1, clip=(0.4, 0.2)) > loss(-1, clip=(0.4, 0.2), dual_clip=2.0)

    @pytest.mark.parametrize("pair", [(0.3, 0.3), [0.3, 0.3]])
    def test_a_pair_of_one_number_is_the_number(self, pair: Any) -> None:
        row = LOSSES[0]
        tensors, mask = row.example(4, 6), holey(4, 6)
        assert ppo_policy_loss(*tensors, mask, clip=pair) == ppo_policy_loss(*tensors, mask, clip=0.3)

    @pytest.mark.parametrize(
        ("ratio", "advantage", "share"),
        [(0.5, -1.0, 1.0), (0.5, 1.0, 1.0), (1.5, 1.0, 1.0), (1.5, -1.0, 1.0), (3.0, -1.0, 1.0), (3.0, 1.0, 0.0)],
    )
    def test_gradients_at_ties(self, ratio: float, advantage: float, share: float) -> None:
        """At a bound that has a part in the loss the slope is that of −Aρ."""
        logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64).requires_grad_()
        ratio = logps.exp().item()
        clip = (1 - ratio if ratio < 1 else 0.2, ratio - 1 if 1 < ratio < 2 else 0.2)
        loss = ppo_policy_loss(
            logps, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool), clip=clip,
            dual_clip=ratio if ratio > 2 else 3.0,
        ).loss  # fmt: skip
        assert torch.autograd.grad(loss, logps)[0].item() == pytest.approx(-advantage * ratio * share)

    @pytest.mark.parametrize("clip", [0.2, (0.2, 10.0)])
    @pytest.mark.parametrize("log_ratio", [100.0, 1e4, math.inf])
    def test_a_ratio_that_overflows_where_the_dual_clip_holds_it(self, log_ratio: float, clip: Any) -> None:
        logps, mask = torch.tensor([[log_ratio]]).requires_grad_(), torch.ones(1, 1, dtype=torch.bool)
        result = ppo_policy_loss(logps, torch.zeros(1, 1), torch.tensor([[-2.0]]), mask, clip=clip, dual_clip=3)
        assert result.loss.item() == 6
        assert result.clip_fraction.item() == 0
        assert torch.autograd.grad(result.loss, logps)[0].item() == 0

    @pytest.mark.parametrize("clip", [1e30, (1e30, 1e30), (0.2, 1e30)])
    def test_the_largest_clip_clips_nothing(self, clip: Any) -> None:
        logps, mask = torch.tensor([[60.0, 0.5]]).requires_grad_(), torch.ones(1, 2, dtype=torch.bool)
        result = ppo_policy_loss(logps, torch.zeros(1, 2), torch.ones(1, 2), mask, clip=clip, dual_clip=1e29)
        assert result.loss.item() == pytest.approx(-math.exp(60) / 2, rel=1e-5)
        assert result.clip_fraction == 0
        assert torch.autograd.grad(result.loss, logps)[0].isfinite().all()

    @every_reduction
    @pytest.mark.parametrize("options", [{"clip": (0.1, 0.4)}, {"clip": [0.4, 0.1], "dual_clip": 1.3}], ids=str)
    def test_function_module_and_adapter_are_one(self, options: dict[str, Any], reduction: str) -> None:
        (logps, old, advantages), mask = LOSSES[0].example(6, 8), holey(6, 8)
        logps.requires_grad_()
        low, high = options["clip"]
        wanted = ppo_policy_loss(logps, old, advantages, mask, reduction=reduction, **options)
        (gradient,) = torch.autograd.grad(wanted.loss, logps)
        clipped = ppo_policy_loss(logps, old, advantages, mask, **options).clip_fraction
        adapter = openrlhf.PolicyLoss(low, high, options.get("dual_clip"), token_level_loss=reduction == "token")
        for loss_fn in (nn.PPOPolicyLoss(**options, reduction=reduction), adapter):
            loss, reported, *_ = loss_fn(logps, old, advantages, mask)
            assert loss == wanted.loss
            assert reported == clipped
            assert torch.equal(torch.autograd.grad(loss, logps)[0], gradient)
        total = mask.sum() if reduction == "token" else mask.any(1).sum()
        totals = {"batch_num_tokens": total, "global_batch_size": total}
        close(
            nn.PPOPolicyLoss(**options, reduction=reduction)(logps, old, advantages, mask, **totals).loss, wanted.loss
        )

    def test_the_module_shows_its_clips(self) -> None:
        wanted = "PPOPolicyLoss(clip=(0.2, 0.28), dual_clip=3.0)"
        assert repr(nn.PPOPolicyLoss(clip=(0.2, 0.28), dual_clip=3.0)) == wanted

    @pytest.mark.parametrize("dual_clip", [None, 3.0])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_nan_that_counts_is_seen(self, place: int, dual_clip: float | None) -> None:
        tensors = list(torch.zeros(3, 1, 2))
        tensors[place][0, 1] = math.nan
        mask = torch.ones(1, 2, dtype=torch.bool)
        assert ppo_policy_loss(*tensors, mask, dual_clip=dual_clip).loss.isnan()


class TestValueLoss:
    @pytest.mark.parametrize(
        ("value", "old", "target", "loss", "slope", "clipped"),
        [
            (1.0, 0.0, 2.0, 1.62, 0.0, 1),  # moved towards the target by more than 0.2: (0.2 − 2)²/2, no further
            (1.0, 0.0, -1.0, 2.0, 2.0, 0),  # and away from it
            (0.1, 0.0, 1.0, 0.405, -0.9, 0),
            (-0.5, 0.0, -2.0, 1.62, 0.0, 1),
        ],
    )
    def test_by_hand(self, value: float, old: float, target: float, loss: float, slope: float, clipped: int) -> None:
        values = torch.tensor([[value]], dtype=torch.float64).requires_grad_()
        mask = torch.ones(1, 1, dtype=torch.bool)
        result = ppo_value_loss(values, torch.tensor([[old]]), torch.tensor([[target]]), mask)
        assert result.loss.item() == pytest.approx(loss)
        assert result.clip_fraction.item() == clipped
        assert torch.autograd.grad(result.loss, values)[0].item() == pytest.approx(slope)

    @pytest.mark.parametrize("value", [0.25, -0.25])
    @pytest.mark.parametrize("target", [1.0, -1.0, 0.25])
    def test_gradients_at_ties(self, value: float, target: float) -> None:
        """At a bound the slope is that of (v − R)²."""
        values, mask = torch.tensor([[value]]).requires_grad_(), torch.ones(1, 1, dtype=torch.bool)
        loss = ppo_value_loss(values, torch.zeros(1, 1), torch.tensor([[target]]), mask, clip=0.25).loss
        assert torch.autograd.grad(loss, values)[0].item() == value - target

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_nan_that_counts_is_seen(self, place: int) -> None:
        tensors = list(torch.zeros(3, 1, 2))
        tensors[place][0, 1] = math.nan
        assert ppo_value_loss(*tensors, torch.ones(1, 2, dtype=torch.bool)).loss.isnan()


class TestPpoLoss:
    def test_is_its_parts(self) -> None:
        row = next(loss for loss in LOSSES if loss.function is ppo_loss)
        tensors, mask = row.example(4, 6), holey(4, 6)
        options: dict[str, Any] = {"reduction": "sequence", "denominator": 3}
        clips: dict[str, Any] = {"clip": (0.1, 0.3), "dual_clip": 1.5}
        result = ppo_loss(*tensors, mask, **clips, value_clip=0.4, value_coef=0.7, **options)
        policy = ppo_policy_loss(*tensors[:3], mask, **clips, **options)
        value = ppo_value_loss(*tensors[3:], mask, clip=0.4, **options)
        assert result.loss == policy.loss + 0.7 * value.loss
        assert result[1:] == (policy.loss, value.loss, policy.approx_kl, policy.clip_fraction)

    def test_by_hand(self) -> None:
        one = torch.ones(1, 1)
        logps = torch.full((1, 1), math.log(1.5))
        result = ppo_loss(logps, 0 * one, 2 * one, one, 0 * one, 2 * one, one.bool())
        assert [x.item() for x in result] == pytest.approx([-2.4 + 0.162, -2.4, 1.62, math.log(1.5) ** 2 / 2, 1])


class TestPtx:
    def test_by_hand(self) -> None:
        """Three tokens of ½, in sequences of one and of two; and one that does not count."""
        logps = torch.tensor([[math.log(0.5), math.nan], [math.log(0.5), math.log(0.125)]])
        mask = torch.tensor([[True, False], [True, True]])
        assert ptx_loss(logps, mask, gamma=3.0).item() == pytest.approx(5 * math.log(2))
        assert ptx_loss(logps, mask, gamma=3.0, reduction="sequence").item() == pytest.approx(4.5 * math.log(2))
        assert ptx_loss(logps, mask).item() == pytest.approx(27.8 * 5 / 3 * math.log(2))
        assert ptx_loss(logps, mask, gamma=3.0, denominator=5).item() == pytest.approx(3 * math.log(2))

    def test_of_our_log_probs(self) -> None:
        logits, labels = torch.zeros(2, 5, 4, requires_grad=True), torch.randint(4, (2, 5))
        labels[0, 3:] = -100
        logps = fastpref.token_logprobs(logits, labels)
        ptx_loss(logps, labels[:, 1:] != -100, gamma=1.0).backward()
        assert logits.grad is not None
        # ∂(−logp)/∂z of the label is ¼ − 1, over 6 tokens.
        assert logits.grad[1, 0, labels[1, 1]].item() == pytest.approx(-0.75 / 6)
        assert (logits.grad[0, 2:] == 0).all()


class TestController:
    @pytest.mark.parametrize(
        ("kl", "change"),
        [(6.0, 0.0), (6.6, 0.01), (5.4, -0.01), (100.0, 0.02), (0.0, -0.02), (math.inf, 0.02), (-5.0, -0.02)],
    )
    def test_by_hand(self, kl: float, change: float) -> None:
        """Target 6, 100 samples of a horizon of 1000: a tenth of the error, which is cut at a fifth."""
        controller = AdaptiveKLController(0.2, 6.0, 1000)
        controller.update(kl, 100)
        assert controller.value == pytest.approx(0.2 * (1 + change))
        controller.update(torch.tensor(kl), 0)
        assert controller.value == pytest.approx(0.2 * (1 + change))

    def test_steers_to_its_target(self) -> None:
        """A policy whose KL is 1/c settles at the target."""
        controller = AdaptiveKLController(0.5, 4.0, 1000)
        for _ in range(2000):
            controller.update(1 / controller.value, 64)
        assert controller.value == pytest.approx(0.25, rel=1e-3)

    def test_refusals(self) -> None:
        for wrong in ((0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.nan)):
            with pytest.raises(ValueError, match=r"(init|target|horizon) must be .*above 0.*(0\.0|-1\.0|nan)"):
                AdaptiveKLController(*wrong)
        controller = AdaptiveKLController(0.2, 6.0, 1000)
        with pytest.raises(ValueError, match=r"kl must be .*nan"):
            controller.update(math.nan, 1)
        with pytest.raises(ValueError, match=r"n must be .*-1"):
            controller.update(1.0, -1)
        assert controller.value == 0.2


# Every function on tokens: the names of its (B, T) arguments before the mask, and what else it needs.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "ppo_policy_loss": (ppo_policy_loss, ("logps", "old_logps", "advantages"), {}),
    "ppo_value_loss": (ppo_value_loss, ("values", "old_values", "returns"), {}),
    "ppo_loss": (ppo_loss, ("logps", "old_logps", "advantages", "values", "old_values", "returns"), {}),
    "ptx_loss": (ptx_loss, ("token_logps",), {}),
    "gae": (gae, ("rewards", "values"), {}),
    "reference.gae": (reference.gae, ("rewards", "values"), {}),
    "kl_shaped_rewards": (kl_shaped_rewards, ("logps", "ref_logps"), {"scores": torch.zeros(3), "kl_coef": 0.1}),
    "masked_whiten": (masked_whiten, ("x",), {}),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


class TestRefusals:
    """An error names the argument, what was given and what is wanted."""

    def call(self, name: str, **changed: Any) -> Any:
        function, names, more = FUNCTIONS[name]
        given = {argument: torch.zeros(3, 4) for argument in names} | {"mask": torch.ones(3, 4, dtype=torch.bool)}
        return function(**(given | more | changed))

    @every_function
    def test_tensors(self, name: str) -> None:
        _, names, _ = FUNCTIONS[name]
        for argument in names:
            with pytest.raises(TypeError, match=rf"^{argument} must be .*int64"):
                self.call(name, **{argument: torch.zeros(3, 4, dtype=torch.long)})
            with pytest.raises(TypeError, match=rf"^{argument} must be .*list"):
                self.call(name, **{argument: [0.0]})
        for argument in (*names[1:], "mask"):
            kind = torch.bool if argument == "mask" else torch.float32
            with pytest.raises(ValueError, match=rf"^{argument} must be .*\(3, 4\), like {names[0]}; .*\(3, 5\)"):
                self.call(name, **{argument: torch.zeros(3, 5, dtype=kind)})
            with pytest.raises(ValueError, match=rf"^{argument} must be on {names[0]}'s device.*cpu.*meta"):
                self.call(name, **{argument: torch.zeros(3, 4, dtype=kind, device="meta")})
        with pytest.raises(TypeError, match=r"^mask must be a bool .*float32"):
            self.call(name, mask=torch.ones(3, 4))

    @pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "masked_whiten"])
    def test_dimensions(self, name: str) -> None:
        first = FUNCTIONS[name][1][0]
        with pytest.raises(ValueError, match=rf"^{first} must be \(B, T\).*\(4,\)"):
            self.call(name, **{first: torch.zeros(4)})

    @every_loss
    def test_means(self, loss: Loss) -> None:
        name = loss.name.removesuffix("_of_a_pair")
        with pytest.raises(ValueError, match=r"^reduction must be .*'token'.*'sequence'.*'mean'"):
            self.call(name, reduction="mean")
        for wrong in (-1, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"^denominator must be .*{wrong}"):
                self.call(name, denominator=wrong)
        with pytest.raises(ValueError, match=r"^denominator must be .*\(3,\)"):
            self.call(name, denominator=torch.ones(3))
        with pytest.raises(ValueError, match=r"^denominator must be on mask's device.*cpu.*meta"):
            self.call(name, denominator=torch.ones((), device="meta"))

    @pytest.mark.parametrize(
        ("name", "option", "wrong", "words"),
        [
            ("gae", "gamma", 1.1, r"in \[0, 1\].*1\.1"),
            ("gae", "lam", -0.1, r"in \[0, 1\].*-0\.1"),
            ("reference.gae", "lam", math.nan, r"in \[0, 1\].*nan"),
            ("ppo_policy_loss", "clip", 0.0, r"above 0.*0\.0"),
            ("ppo_policy_loss", "clip", (0, 0.0), r"above 0.*pair \(low, high\).*\(0, 0\.0\)"),
            ("ppo_policy_loss", "clip", [0.2, -0.1], r"above 0.*pair \(low, high\).*\[0\.2, -0\.1\]"),
            ("ppo_policy_loss", "clip", (math.inf, 0.2), r"above 0.*pair \(low, high\).*inf"),
            ("ppo_policy_loss", "clip", (0.2, 1e39), r"up to 1e\+30.*1e\+39"),
            ("ppo_policy_loss", "dual_clip", 1.0, r"between 1 and 1e\+30.*1\.0"),
            ("ppo_loss", "clip", (0.2, math.nan), r"above 0.*pair \(low, high\).*nan"),
            ("ppo_loss", "dual_clip", 0.5, r"between 1 and 1e\+30.*0\.5"),
            ("ppo_value_loss", "clip", -1.0, r"above 0.*-1"),
            ("ppo_loss", "clip", math.nan, r"above 0.*nan"),
            ("ppo_loss", "value_clip", 0.0, r"above 0.*0\.0"),
            ("ppo_loss", "value_coef", -0.1, r"not below 0.*-0\.1"),
            ("ptx_loss", "gamma", math.inf, r"not below 0.*inf"),
            ("kl_shaped_rewards", "kl_coef", -0.1, r"not below 0.*-0\.1"),
            ("kl_shaped_rewards", "estimator", "k4", r"'k1'.*'k3'.*'k4'"),
            ("kl_shaped_rewards", "scores", torch.zeros(4), r"\(3,\).*\(4,\)"),
            ("kl_shaped_rewards", "scores", torch.zeros(3, 1), r"\(3,\).*\(3, 1\).*scores\.squeeze\(-1\)"),
            ("kl_shaped_rewards", "scores", torch.zeros(3, device="meta"), r"cpu.*meta"),
        ],
    )
    def test_options(self, name: str, option: str, wrong: Any, words: str) -> None:
        with pytest.raises(ValueError, match=rf"^{option} must be .*{words}"):
            self.call(name, **{option: wrong})

    def test_scores_are_floating(self) -> None:
        with pytest.raises(TypeError, match=r"^scores must be .*int64"):
            self.call("kl_shaped_rewards", scores=torch.zeros(3, dtype=torch.long))

    @every_function
    def test_no_value_is_read_on_the_host(self, name: str) -> None:
        """A meta tensor has none."""
        function, names, more = FUNCTIONS[name]
        given = {argument: torch.zeros(3, 4, device="meta") for argument in names}
        given["mask"] = torch.ones(3, 4, dtype=torch.bool, device="meta")
        more = {option: x.to("meta") if isinstance(x, Tensor) else x for option, x in more.items()}
        for result in fields(function(**given, **more)):
            assert result.device.type == "meta"
