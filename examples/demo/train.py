"""The steps of supervised training, the reward model and DPO, and the training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fastpref
from examples.demo import model as models
from examples.demo.stop import Stop
from examples.demo.tokens import IGNORED, Batch
from fastpref.testing.memory import peak_bytes

CLIP_NORM = 1.0
WARMUP = 0.1
FINAL_RATE = 0.05


@dataclass
class Curves:
    """One number for every step of a training; accuracy and margin stay empty if there are no pairs.

    Attributes:
        loss: the loss in nats.
        accuracy: share of the batch's pairs that are ranked correctly.
        margin: mean difference between the rewards of the better and the worse answer.
        seconds: time of the whole step.
        loss_seconds: time from the hidden states to their gradient, if it is measured.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)


class Memory(NamedTuple):
    """The most bytes that a step of DPO uses beyond those in use before it.

    Attributes:
        step: forward and backward of the whole model.
        loss: from the hidden states to their gradient and the head's gradient.
    """

    step: int
    loss: int


class Step(NamedTuple):
    """The numbers of one step, on the device."""

    loss: Tensor
    accuracy: Tensor | None = None
    margin: Tensor | None = None
    loss_seconds: float | None = None


def optimizer_and_schedule(model: nn.Module, rate: float, steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return AdamW, and a schedule that warms up to `rate` and decays as a cosine over `steps` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, round(WARMUP * steps))
    schedule = LambdaLR(
        optimizer,
        lambda i: (
            min(1.0, (i + 1) / warmup) * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * i / steps)))
        ),
    )
    return optimizer, schedule


def train(
    model: nn.Module,
    batches: Sequence[Any],
    step: Callable[[nn.Module, Any], Step],
    *,
    rate: float,
    curves: Curves,
    stop: Stop,
    show: Callable[[Curves], None],
) -> Iterator[None]:
    """Make one AdamW step for every batch, with warm-up, cosine decay and clipping, and yield after every step.

    Args:
        model: the model to train in place.
        batches: the batches, one for each step.
        step: runs forward and backward of one batch, and leaves the gradients in the model.
        rate: the highest learning rate.
        curves: gets one number for each curve and step.
        stop: checked before every step.
        show: called with the curves after every step.
    """
    optimizer, schedule = optimizer_and_schedule(model, rate, len(batches))
    model.train()
    for batch in batches:
        stop.check()
        start = time.perf_counter()
        done = step(model, batch)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curves.loss.append(done.loss.item())
        curves.seconds.append(time.perf_counter() - start)
        if done.accuracy is not None and done.margin is not None:
            curves.accuracy.append(done.accuracy.item())
            curves.margin.append(done.margin.item())
        if done.loss_seconds is not None:
            curves.loss_seconds.append(done.loss_seconds)
        show(curves)
        yield


def sft_step(model: nn.Module, batch: Batch) -> Step:
    """Run forward and backward of supervised training: the mean −log-prob of the scored tokens."""
    logps = fastpref.sequence_logprobs(models.logits(model, batch), batch.labels, inplace_backward=True)
    loss = -logps.sum() / (batch.labels[:, 1:] != IGNORED).sum()
    loss.backward()
    return Step(loss.detach())


def reward_step(model: nn.Module, batch: Batch, answers: int) -> Step:
    """Run forward and backward of a ranking loss of K answers, best first (arXiv 2203.02155; K = 2: 2009.01325)."""
    rewards = models.rewards(model, batch).view(-1, answers)
    if answers == 2:
        loss = fastpref.pairwise_reward_loss(*rewards.unbind(1))
    else:
        ranks = torch.arange(answers, device=rewards.device).expand_as(rewards)
        loss = fastpref.ranking_loss(rewards, ranks)
    loss.backward()
    better, worse = torch.triu_indices(answers, answers, offset=1, device=rewards.device)
    margins = rewards.detach()[:, better] - rewards.detach()[:, worse]
    return Step(loss.detach(), _accuracy(margins), margins.mean())


class PairBatch(NamedTuple):
    """B pairs as 2B sequences, the chosen answers first, and their (2B,) log-probs under the reference."""

    batch: Batch
    ref_logps: Tensor


PairLoss = Callable[[Tensor, models.Head, PairBatch, float], fastpref.PreferenceLoss]


def linear_loss(hidden: Tensor, head: models.Head, pairs: PairBatch, beta: float) -> fastpref.PreferenceLoss:
    """Compute DPO from hidden states, as a training loop would; only scored tokens go through the head."""
    references = pairs.ref_logps.chunk(2)
    out = fastpref.linear_dpo_loss(hidden, head.weight, pairs.batch.labels, *references, beta=beta, **head.options)
    return fastpref.PreferenceLoss(out.loss, out.chosen_rewards, out.rejected_rewards)


def logits_loss(hidden: Tensor, head: models.Head, pairs: PairBatch, beta: float) -> fastpref.PreferenceLoss:
    """Compute DPO from logits, as a loop that has them would; the gradient is written over them."""
    logps = fastpref.sequence_logprobs(head.logits(hidden), pairs.batch.labels, inplace_backward=True)
    return fastpref.dpo_loss(*logps.chunk(2), *pairs.ref_logps.chunk(2), beta=beta)


def eager_loss(hidden: Tensor, head: models.Head, pairs: PairBatch, beta: float) -> fastpref.PreferenceLoss:
    """Compute DPO in plain PyTorch, as training loops write it."""
    labels = pairs.batch.labels[:, 1:]
    scored = labels != IGNORED
    logits = head.logits(hidden)[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, labels.masked_fill(~scored, 0)[:, :, None]).squeeze(-1)
    chosen, rejected = (beta * ((logps * scored).sum(1) - pairs.ref_logps)).chunk(2)
    return fastpref.PreferenceLoss(-F.logsigmoid(chosen - rejected).mean(), chosen.detach(), rejected.detach())


def loss_gradients(
    model: nn.Module, hidden: Tensor, pairs: PairBatch, *, pair_loss: PairLoss, beta: float
) -> tuple[fastpref.PreferenceLoss, Tensor]:
    """Return the loss and its gradient for the hidden states; the head's gradient is left in the model."""
    leaf = hidden.detach().requires_grad_()
    out = pair_loss(leaf, models.head(model), pairs, beta)
    out.loss.backward()
    assert leaf.grad is not None
    return out, leaf.grad


def dpo_step(model: nn.Module, pairs: PairBatch, *, pair_loss: PairLoss, beta: float) -> Step:
    """Run forward and backward of DPO on one batch of pairs (arXiv 2305.18290)."""
    hidden = models.hidden_states(model, pairs.batch)
    # A single loss.backward() would do; the stop at the hidden states allows to time the loss apart from the model.
    _synchronize(hidden)
    start = time.perf_counter()
    out, grad = loss_gradients(model, hidden, pairs, pair_loss=pair_loss, beta=beta)
    _synchronize(hidden)
    seconds = time.perf_counter() - start
    hidden.backward(grad)
    return Step(out.loss.detach(), _accuracy(out.margins), out.margins.mean(), seconds)


def step_memory(model: nn.Module, pairs: PairBatch, *, pair_loss: PairLoss, beta: float) -> Memory | None:
    """Measure the memory of one step of DPO with its gradients, or return None where it cannot be measured."""
    options: Any = {"pair_loss": pair_loss, "beta": beta}
    model.train()
    dpo_step(model, pairs, **options)  # the first call allocates caches that later calls reuse
    model.zero_grad()
    step = peak_bytes(lambda: dpo_step(model, pairs, **options), pairs.ref_logps.device)
    model.zero_grad()
    with torch.no_grad():
        hidden = models.hidden_states(model, pairs.batch)
    loss = peak_bytes(lambda: loss_gradients(model, hidden, pairs, **options), hidden.device)
    model.zero_grad()
    return None if step is None or loss is None else Memory(step, loss)


def _accuracy(margins: Tensor) -> Tensor:
    # A tie counts one half: DPO starts with nothing but ties.
    return 0.5 + 0.5 * margins.sign().mean()


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize()
