"""The optimum of DPO is the optimum of reinforcement learning under a KL constraint."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpref import dpo_loss, implicit_reward, token_logprobs


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_gradient_descent_on_dpo_reaches_the_tilted_reference(beta: float) -> None:
    """With answers labelled by Bradley–Terry on r, descent ends at π* = π_ref·exp(r/β)/Z (arXiv 2305.18290, eq. 4)."""
    torch.set_num_threads(1)  # PyTorch splits even a logsigmoid of 36 numbers, and waits for the other thread
    answers = 6
    reward = torch.randn(answers, dtype=torch.float64)
    ref = torch.randn(answers, dtype=torch.float64).log_softmax(0)

    def pairs(values: Tensor) -> tuple[Tensor, Tensor]:
        """Every (chosen, rejected), in one order; those of an answer with itself have no gradient."""
        return values[:, None].expand(answers, answers).flatten(), values.expand(answers, answers).flatten()

    chosen, rejected = pairs(reward)
    preferred = torch.sigmoid(chosen - rejected)  # P(chosen ≻ rejected)
    every = torch.arange(answers)

    policy = ref.clone().requires_grad_()  # training starts at the reference
    for _ in range(1500):
        logps = token_logprobs(policy.expand(answers, answers), every, shift=False)
        losses = dpo_loss(*pairs(logps), *pairs(ref), beta=beta, reduction="none").loss
        (gradient,) = torch.autograd.grad((preferred * losses).mean(), policy)
        with torch.no_grad():
            policy -= 10 / beta**2 * gradient

    optimum = (ref + reward / beta).log_softmax(0)
    reached = policy.detach().log_softmax(0)
    assert (optimum.exp() - ref.exp()).abs().max() > 0.05
    torch.testing.assert_close(reached.exp(), optimum.exp(), rtol=0, atol=1e-9)
    # And the reward that the policy implies is r, up to one constant.
    implied = implicit_reward(reached, ref, beta=beta) - reward
    torch.testing.assert_close(implied, implied[:1].expand(answers), rtol=0, atol=1e-8)
