"""PPO on sampled answers: each step samples, computes advantages, and makes a few passes over the samples."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastpref
from examples.demo import model as models
from examples.demo.sample import Sampler, Samples
from examples.demo.settings import Settings
from examples.demo.stop import Stop
from examples.demo.tokens import IGNORED, Batch
from examples.demo.train import CLIP_NORM, Curves, optimizer_and_schedule

# Passes over the samples of a step, and optimizer steps of a pass.
EPOCHS = 2
MINIBATCHES = 4
UPDATES = EPOCHS * MINIBATCHES
LAM = 0.95
CLIP = 0.2
# The rewards are logits, several units apart; with 0.2 the values would follow them too slowly.
VALUE_CLIP = 1.0
PTX_GAMMA = 0.3
KL_COEF = 0.1
# The number of samples over which the coefficient changes by at most a fifth.
KL_HORIZON = 128.0


@dataclass
class PPOCurves(Curves):
    """One number for every step of PPO; `loss` is the policy's loss.

    Attributes:
        score: mean reward-model score of the step's samples.
        kl: mean KL of the policy to the reference on the samples, in nats a sequence (k3).
        kl_coef: the coefficient of the KL in the rewards.
        length: mean number of sampled tokens.
        value_loss: the loss of `ppo_value_loss`.
        clip_fraction: share of tokens where the clipped branch of the policy's loss is the larger.
        ptx: mean −log-prob of a token of the SFT batches, in nats.
    """

    score: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kl_coef: list[float] = field(default_factory=list)
    length: list[float] = field(default_factory=list)
    value_loss: list[float] = field(default_factory=list)
    clip_fraction: list[float] = field(default_factory=list)
    ptx: list[float] = field(default_factory=list)


class Rollout(NamedTuple):
    """Samples and the tensors that a pass over them needs, each (B, L−1) with a column for every predicted token.

    Attributes:
        batch: prompts and answers, (B, L).
        mask: bool, True at a sampled token.
        logps: log-probs under the policy that sampled.
        values: values before the first pass.
        advantages: whitened advantages.
        returns: the targets of the values.
    """

    batch: Batch
    mask: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, index: Tensor) -> Rollout:
        """Return the rollout of some of the sequences, cut to the longest of them."""
        length = int(self.batch.attention_mask[index].sum(1).max())
        batch = Batch(*(tensor[index, :length] for tensor in self.batch))
        return Rollout(batch, *(tensor[index, : length - 1] for tensor in self[1:]))

    def minibatches(self, generator: torch.Generator) -> Iterator[Rollout]:
        """Yield parts of similar lengths in random order, which together are the whole rollout."""
        parts = self.batch.attention_mask.sum(1).argsort(stable=True).chunk(MINIBATCHES)
        for part in torch.randperm(len(parts), generator=generator).tolist():
            yield self.rows(parts[part])


def sequence_kl(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """Return (B,) estimates of the KL of whole sequences to the reference: the sums of their tokens' k3, in nats."""
    no_score = logps.new_zeros(logps.shape[0])
    return -fastpref.kl_shaped_rewards(no_score, logps, ref_logps, mask, kl_coef=1.0, estimator="k3").sum(1)


@torch.no_grad()
def rollout(samples: Samples, scores: Tensor, ref_logps: Tensor, value_model: nn.Module, *, kl_coef: float) -> Rollout:
    """Compute the advantages of sampled tokens: the last one is rewarded with the score, and each one pays for its KL.

    Args:
        samples: B answers.
        scores: (B,) scores of the reward model.
        ref_logps: (B, L−1) log-probs under the reference.
        value_model: predicts at each position the reward of all later tokens.
        kl_coef: the coefficient of the KL.
    """
    values = models.values(value_model, samples.batch)[:, :-1]
    rewards = fastpref.kl_shaped_rewards(scores, samples.logps, ref_logps, samples.mask, kl_coef=kl_coef)
    advantages, returns = fastpref.gae(rewards, values, samples.mask, lam=LAM)
    advantages = fastpref.masked_whiten(advantages, samples.mask)
    return Rollout(samples.batch, samples.mask, samples.logps, values, advantages, returns)


def ppo_losses(policy: nn.Module, value_model: nn.Module, part: Rollout, ptx: Batch) -> dict[str, Tensor]:
    """Run forward and backward of the policy and the value model, which share no weights (arXiv 2009.01325)."""
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
    settings: Settings,
    curves: PPOCurves,
    stop: Stop,
    show: Callable[[PPOCurves], None],
) -> None:
    """Train the policy in place, and a value model that starts as the reward model (arXiv 2009.01325).

    Args:
        policy: the model to train, equal to the reference.
        reference: the model that the KL is measured to.
        reward_model: scores the samples.
        prompts: the prompts of every step.
        ptx: SFT batches, one for each minibatch.
        draw: samples an answer to each prompt.
        settings: `ppo_rate`, `kl_target` and `seed` are used.
        curves: gets one number for each curve and step.
        stop: checked before every step.
        show: called with the curves after every step.
    """
    value_model = copy.deepcopy(reward_model)
    trained = (policy, value_model)
    # Without dropout, the ratio compares two policies, not two random forwards of one.
    for model in (*trained, reference, reward_model):
        model.eval()
    makers = [optimizer_and_schedule(model, settings.ppo_rate, UPDATES * len(prompts)) for model in trained]
    controller = fastpref.AdaptiveKLController(KL_COEF, settings.kl_target, KL_HORIZON)
    generator = torch.Generator().manual_seed(settings.seed)
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
