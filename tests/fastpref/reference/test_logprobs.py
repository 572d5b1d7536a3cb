"""The definitions of log-probs: against numbers worked out by hand, and their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpref import reference
from tests.helpers.by_hand import THIRD, WIN, close, tensor
from tests.tolerance import ALL_STATS


class TestTokenLogprobs:
    def test_three_equal_logits_give_log_one_third(self) -> None:
        close(reference.token_logprobs(torch.full((1, 3, 3), 7.0).double(), torch.tensor([[0, 1, 2]])), THIRD, THIRD)

    def test_logits_one_and_zero(self) -> None:
        logits = tensor([1.0, 0.0], [1.0, 0.0])
        close(reference.token_logprobs(logits, torch.tensor([0, 1]), shift=False), WIN, WIN - 1)

    def test_shift_scores_the_next_label(self) -> None:
        logits = tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 0.0]])
        labels = torch.tensor([[1, 0, 1]])
        close(reference.token_logprobs(logits, labels), WIN, -math.log(2))
        close(reference.token_logprobs(logits, labels, shift=False), WIN - 1, -math.log(2), -math.log1p(math.exp(5)))

    def test_ignored_tokens_are_zero(self) -> None:
        logits = tensor([1.0, 0.0], [1.0, 0.0], [1.0, 0.0])
        close(reference.token_logprobs(logits, torch.tensor([0, -100, 0]), shift=False), WIN, 0, WIN)
        close(reference.token_logprobs(logits, torch.tensor([1, 0, 1]), shift=False, ignore_index=1), 0, WIN, 0)

    def test_scale_then_softcap_then_temperature(self) -> None:
        # The cap of 2 holds the scaled logit 0.5·6 = 3, not the temperature's: z = 2·tanh(3/2)/4.
        z = 2 * math.tanh(3 / 2) / 4
        logits = tensor([6.0, 0.0])
        logp = reference.token_logprobs(
            logits, torch.tensor([0]), shift=False, logit_scale=0.5, softcap=2.0, temperature=4.0
        )
        close(logp, -math.log1p(math.exp(-z)))

    def test_statistics_of_three_known_rows(self) -> None:
        # softmax of log(1, 2, 5) is (1, 2, 5)/8; of equal logits, uniform; of (0, −∞, −∞), certain.
        infinity = math.inf
        logits = tensor([0.0, math.log(2), math.log(5)], [4.0, 4.0, 4.0], [0.0, -infinity, -infinity])
        result = reference.token_logprobs(logits, torch.tensor([2, 1, 0]), shift=False, stats=ALL_STATS)
        p = (1 / 8, 2 / 8, 5 / 8)
        assert result._fields == ("logprobs", *ALL_STATS)
        close(result.logprobs, math.log(5 / 8), THIRD, 0)
        close(result.lse, math.log(8), 4 + math.log(3), 0)
        close(result.entropy, -sum(x * math.log(x) for x in p), math.log(3), 0)
        close(result.mean_logits, math.log(10) / 3, 4, -infinity)
        close(result.log_sum_sq_probs, math.log(sum(x * x for x in p)), THIRD, 0)
        # Of equal logits the first is the top, and the label was the second.
        assert result.is_top1.tolist() == [True, False, True]

    def test_statistics_are_of_the_transformed_logits(self) -> None:
        logits = tensor([2.0, 6.0])
        result = reference.token_logprobs(
            logits, torch.tensor([0]), shift=False, temperature=2.0, stats=("mean_logits", "lse")
        )
        close(result.mean_logits, 2)
        close(result.lse, 3 + math.log1p(math.exp(-2)))

    def test_gradient_is_one_hot_minus_softmax(self) -> None:
        logits = tensor([0.0, math.log(2), math.log(5)]).requires_grad_()
        reference.token_logprobs(logits, torch.tensor([1]), shift=False).sum().backward()
        assert logits.grad is not None
        close(logits.grad, -1 / 8, 1 - 2 / 8, -5 / 8)

    def test_entropy_gradient(self) -> None:
        # ∂entropy/∂z_j = −p_j (log p_j + entropy)
        p = (1 / 8, 2 / 8, 5 / 8)
        entropy = -sum(x * math.log(x) for x in p)
        logits = tensor([0.0, math.log(2), math.log(5)]).requires_grad_()
        reference.token_logprobs(logits, torch.tensor([1]), shift=False, stats=("entropy",)).entropy.sum().backward()
        assert logits.grad is not None
        close(logits.grad, *(-x * (math.log(x) + entropy) for x in p))

    def test_low_precision_logits_give_float32(self) -> None:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            logits = torch.tensor([[1.0, 0.0]], dtype=dtype)
            logp = reference.token_logprobs(logits, torch.tensor([0]), shift=False)
            assert logp.dtype == torch.float32
            assert abs(logp.item() - WIN) < 1e-7


class TestSequenceLogprobs:
    logits = tensor([1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0])

    def test_sum_and_mean_count_scored_tokens(self) -> None:
        logits, labels = self.logits[None].repeat(2, 1, 1), torch.tensor([[1, 0, 0, -100], [0, -100, -100, -100]])
        close(reference.sequence_logprobs(logits, labels), 2 * WIN, 0)
        close(reference.sequence_logprobs(logits, labels, reduction="mean"), WIN, 0)

    def test_two_dimensional_logits_are_one_sequence(self) -> None:
        close(reference.sequence_logprobs(self.logits, torch.tensor([1, 0, 0, 0])), 2 * WIN - math.log(2))

    def test_packed_shift_stays_inside_a_sequence(self) -> None:
        # Sequences of 2, 0 and 2 tokens: the label at each start scores nothing, so one token is left in each.
        bounds, labels = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 0, 0, 1])
        close(reference.sequence_logprobs(self.logits, labels, cu_seqlens=bounds), WIN, 0, -math.log(2))
        unshifted = reference.sequence_logprobs(self.logits, labels, cu_seqlens=bounds, shift=False)
        close(unshifted, 2 * WIN, 0, -2 * math.log(2))

    def test_ld_alpha_weighs_the_longer_completion_s_tail(self) -> None:
        # Three scored tokens against one: the pair shares 1, and the other two weigh α.
        logits = self.logits[None].repeat(2, 1, 1)
        labels = torch.tensor([[9, 1, 0, 0], [9, 0, -100, -100]])
        logps = reference.sequence_logprobs(logits, labels, ld_alpha=0.3)
        close(logps, (WIN - 1) + 0.3 * (WIN - math.log(2)), WIN)

    def test_shared_lengths_are_scored_tokens_from_the_first(self) -> None:
        logits = self.logits[None]
        labels = torch.tensor([[9, -100, 0, 0]])
        logps = reference.sequence_logprobs(logits, labels, ld_alpha=0.0, shared_lengths=torch.tensor([1]))
        close(logps, WIN)

    def test_statistics_stay_per_token(self) -> None:
        result = reference.sequence_logprobs(self.logits, torch.tensor([1, 0, -100, 0]), stats=("lse",))
        close(result.logprobs, WIN - math.log(2))
        close(result.lse, math.log1p(math.e), 0, math.log(2))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "logit_scale": 0.5, "softcap": 3.0}], ids=["plain", "all"]
)
@pytest.mark.parametrize("shift", [True, False])
def test_gradcheck_token_logprobs(logits: Tensor, labels: Tensor, shift: bool, options: dict[str, float]) -> None:
    def call(z: Tensor) -> tuple[Tensor, Tensor]:
        result = reference.token_logprobs(z, labels, shift=shift, stats=("entropy",), **options)
        return result.logprobs, result.entropy

    assert torch.autograd.gradcheck(call, logits.requires_grad_())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradcheck_sequence_logprobs(logits: Tensor, labels: Tensor, reduction: str) -> None:
    bounds = torch.tensor([0, 4, 4, 6, 8])
    packed, flat = logits.reshape(8, 7).requires_grad_(), labels.reshape(8)
    assert torch.autograd.gradcheck(
        lambda z: reference.sequence_logprobs(z, flat, cu_seqlens=bounds, reduction=reduction, ld_alpha=0.5), packed
    )
