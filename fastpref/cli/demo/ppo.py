"""PPO on sampled answers: a step's samples, their advantages, and a few passes over them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastpref
from fastpref.cli.demo import model as models
from fastpref.cli.demo.sample import Sampler, Samples
from fastpref.cli.demo.stop import Stop
from fastpref.cli.demo.tokens import IGNORED, Batch
from fastpref.cli.demo.train import CLIP_NORM, Curves, optimizer_and_schedule

# Passes over the samples of a step, and the parts of a pass, each an optimizer step.
EPOCHS = 2
MINIBATCHES = 4
UPDATES = EPOCHS * MINIBATCHES
LAM = 0.95
CLIP = 0.2
# The rewards are logits, several units apart; 0.2 would hold the values back.
VALUE_CLIP = 1.0
PTX_GAMMA = 0.3
KL_COEF = 0.1
# In samples: over so many, the coefficient moves by a fifth at the most.
KL_HORIZON = 128.0


@dataclass
class PPOCurves(Curves):
    """What PPO records, one number a step; the loss is the policy's.

    Attributes:
        score: mean reward-model score of the step's samples.
        kl: mean KL of the policy to the reference on them, nats a sequence (k3).
        kl_coef: the price of a nat.
        length: mean number of sampled tokens.
        value_loss: as `ppo_value_loss` gives it.
        clip_fraction: share of tokens where the policy's clipped branch is the larger.
        ptx: mean −log-prob of a token of the SFT batches, nats.
    """

    score: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kl_coef: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)
    value_loss: list[float] = field(default_factory=list)
    clip_fraction: list[float] = field(default_factory=list)
    ptx: list[float] = field(default_factory=list)


class Rollout(NamedTuple):
    """Samples with all that a pass over them needs; every tensor but the batch is (B, L−1), a predicted token a column.

    Attributes:
        batch: prompts and answers, (B, L).
        mask: bool, True at a sampled token.
        logps: under the policy that sampled.
        values: of the value model then.
        advantages: whitened.
        returns: what the values should have been.
    """

    batch: Batch
    mask: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Rollout:
        """The rollout of some of the sequences, without the padding that they have no need of."""
        length = int(self.batch.attention_mask[index].sum(1).max())
        batch = Batch(*(tensor[index, :length] for tensor in self.batch))
        return Rollout(batch, *(tensor[index, : length - 1] for tensor in self[1:]))

    def minibatches(self, generator: torch.Generator) -> Iterator[Rollout]:
        """All of it in parts of like lengths, in any order."""
        parts = self.batch.attention_mask.sum(1).argsort(stable=True).chunk(MINIBATCHES)
        for part in torch.randperm(len(parts), generator=generator).tolist():
            yield self.rows(parts[part])


def sequence_kl(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """(B,) estimates of the KL to the reference of whole sequences, nats: the sum of its tokens' k3."""
    no_score = logps.new_zeros(logps.shape[0])
    return -fastpref.kl_shaped_rewards(no_score, logps, ref_logps, mask, kl_coef=1.0, estimator="k3").sum(1)


@torch.no_grad()
def rollout(samples: Samples, scores: Tensor, ref_logps: Tensor, value_model: nn.Module, *, kl_coef: float) -> Rollout:
    """Advantages of the sampled tokens: the score comes with the last of them, a price for KL with each.

    Args:
        samples: B answers.
        scores: (B,) of the reward model.
        ref_logps: (B, L−1) log-probs under the reference.
        value_model: the value of a position is that of all that comes after it.
        kl_coef: the price of a nat.
    """
    values = models.values(value_model, samples.batch)[:, :-1]
    rewards = fastpref.kl_shaped_rewards(scores, samples.logps, ref_logps, samples.mask, kl_coef=kl_coef)
    advantages, returns = fastpref.gae(rewards, values, samples.mask, lam=LAM)
    advantages = fastpref.masked_whiten(advantages, samples.mask)
    return Rollout(samples.batch, samples.mask, samples.logps, values, advantages, returns)


def ppo_losses(policy: nn.Module, value_model: nn.Module, part: Rollout, ptx: Batch) -> dict[str, Tensor]:
    """One minibatch, forward and backward of policy and value model, which share nothing (arXiv 2009.01325)."""
    policy_loss = fastpref.ppo_policy_loss(
        models.token_logps(policy, part.batch), part.logps, part.advantages, part.mask, clip=CLIP
    )
    value_loss = fastpref.ppo_value_loss(
        models.values(value_model, part.batch)[:, :-1], part.values, part.returns, part.mask, clip=VALUE_CLIP
    )
    scored = ptx.labels[:, 1:] != IGNORED
    ptx_loss = fastpref.ptx_loss(models.token_logps(policy, ptx), scored, gamma=PTX_GAMMA)
    (policy_loss.loss + value_loss.loss + ptx_loss).backward()
    return {
        "loss": policy_loss.loss.detach(),
        "value_loss": value_loss.loss.detach(),
        "clip_fraction": policy_loss.clip_fraction,
        "ptx": ptx_loss.detach() / PTX_GAMMA,
    }


def train(
    policy: nn.Module,
    reference: nn.Module,
    reward_model: nn.Module,
    prompts: Sequence[Sequence[list[int]]],
    ptx: Iterator[Batch],
    *,
    draw: Sampler,
    rate: float,
    kl_target: float,
    seed: int,
    curves: PPOCurves,
    stop: Stop,
    show: Callable[[PPOCurves], None],
) -> None:
    """Train the policy in place, and a value model that starts as the reward model (arXiv 2009.01325).

    Args:
        policy: starts as the reference.
        reference: what the KL is to.
        reward_model: what scores the samples.
        prompts: one step's after the other's.
        ptx: SFT batches, one a minibatch.
        draw: samples an answer to each of some prompts.
        rate: the highest learning rate of both.
        kl_target: nats a sequence, towards which the price of a nat moves.
        seed: of the order of minibatches.
        curves: one number is appended to each curve per step.
        stop: asked before every step.
        show: called with the curves after every step.
    """
    value_model = copy.deepcopy(reward_model)
    trained = (policy, value_model)
    # No dropout: the ratio is that of two policies, not of two draws of one.
    for model in (*trained, reference, reward_model):
        model.eval()
    makers = [optimizer_and_schedule(model, rate, UPDATES * len(prompts)) for model in trained]
    controller = fastpref.AdaptiveKLController(KL_COEF, kl_target, KL_HORIZON)
    generator = torch.Generator().manual_seed(seed)
    for some in prompts:
        stop.check()
        start = time.perf_counter()
        samples = draw(policy, some)
        with torch.no_grad():
            scores = models.rewards(reward_model, samples.batch)
            ref_logps = models.token_logps(reference, samples.batch)
        step = rollout(samples, scores, ref_logps, value_model, kl_coef=controller.value)
        losses = []
        for _ in range(EPOCHS):
            for part in step.minibatches(generator):
                losses.append(ppo_losses(policy, value_model, part, next(ptx)))
                for model, (optimizer, schedule) in zip(trained, makers, strict=True):
                    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        kl = sequence_kl(samples.logps, ref_logps, samples.mask).mean()
        curves.kl_coef.append(controller.value)
        controller.update(kl, len(some))
        for name in losses[0]:
            getattr(curves, name).append(torch.stack([loss[name] for loss in losses]).mean().item())
        curves.score.append(scores.mean().item())
        curves.kl.append(kl.item())
        curves.length.append(samples.mask.sum(1).double().mean().item())
        curves.seconds.append(time.perf_counter() - start)
        show(curves)
