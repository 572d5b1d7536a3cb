"""A run of the demo: data, tokenizer, and the trainings with their measurements."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn

import fastpref
from examples.demo import model as models
from examples.demo import ppo, train
from examples.demo.data import Dataset, pairs_dataset, stdlib_dataset
from examples.demo.evaluate import HeldOutSamples, answer_lengths, sample_answers, score_answers
from examples.demo.jsonl import read_pairs
from examples.demo.ppo import PPOCurves
from examples.demo.progress import Advance, Bars
from examples.demo.sample import Sampler, check_sampling, sample
from examples.demo.settings import Settings
from examples.demo.stop import Stop, Stopped
from examples.demo.tokens import (
    Batch,
    Encoded,
    collate,
    draw_batches,
    encode,
    load_tokenizer,
    shorten,
    train_tokenizer,
)
from examples.demo.train import Curves, Memory, PairBatch

# The repetitions of DPO to compare with: the title of the bar, and the loss.
REPETITIONS = {
    "logits": ("DPO from logits", train.logits_loss),
    "eager": ("DPO in eager PyTorch", train.eager_loss),
}


def load_data(settings: Settings) -> Dataset:
    """Load the dataset that the settings name; a user's file is read completely before anything is trained."""
    if settings.data is not None:
        return pairs_dataset(read_pairs(settings.data), held_out=settings.held_out, seed=settings.seed)
    return stdlib_dataset(held_out=settings.held_out, seed=settings.seed, limit=settings.functions)


class Run:
    """The results of a run so far.

    Attributes:
        models: the models by stage, in training order; the last one may be half trained.
        curves: the curves by stage, and under `logits` and `eager` those of the repetitions of DPO.
        memory: the memory of a step of DPO and of its repetitions by the same names, if it can be measured.
        scores: (N, K) held-out scores by name, such as `reward_before`.
        samples: answers sampled for the held-out prompts, `before` and `after` PPO.
        stopped: the task that a Ctrl-C stopped, or None.
    """

    def __init__(self, settings: Settings, data: Dataset, earlier: Mapping[str, Path], console: Console) -> None:
        self._start = time.perf_counter()
        self.settings = settings
        self.data = data
        self.console = console
        self.models: dict[str, Any] = {}
        self.curves: dict[str, Curves] = {}
        self.memory: dict[str, Memory] = {}
        self.scores: dict[str, Tensor] = {}
        self.samples: dict[str, HeldOutSamples] = {}
        self.stopped: str | None = None
        self.stop = Stop()
        self.device = torch.device(settings.device) if settings.device else _default_device()
        # The bars of loading and saving models would break into those of the run.
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(settings.seed)
        self._origin = settings.model or earlier.get("sft")
        if self._origin is not None:
            self.tokenizer: Any = load_tokenizer(self._origin)
        else:
            texts = (text for example in data.train for text in (example.prompt, example.answers[0]))
            self.tokenizer = train_tokenizer(texts, settings.vocabulary)
        self.train = encode(data.train, self.tokenizer, settings.max_length)
        held_out = random.Random(settings.seed).sample(data.held_out, min(settings.evaluated, len(data.held_out)))
        self.held_out_examples = held_out
        self.held_out = encode(held_out, self.tokenizer, settings.max_length)
        self.base = self._base_model().to(self.device)
        self._reward_model: Any = None
        if "reward" in earlier:
            self._reward_model = models.load_reward_model(earlier["reward"], self.tokenizer).to(self.device)
        if {"ppo", "dpo"} & set(settings.stages):
            models.check_head(self.base)
        if "ppo" in settings.stages:
            check_sampling(self.base)
            if settings.sample_length > settings.max_length // 2:
                raise ValueError(
                    f"sample_length must be at most half of max_length, {settings.max_length}, to leave room for a "
                    f"prompt; got {settings.sample_length}"
                )

    @property
    def trained(self) -> dict[str, Any]:
        """The models that made at least one step."""
        return {stage: model for stage, model in self.models.items() if self.curves[stage].loss}

    @property
    def seconds(self) -> float:
        """Seconds since the data was loaded."""
        return time.perf_counter() - self._start

    def __call__(self) -> None:
        """Train and measure every stage; a Ctrl-C ends the run after the current step and sets `stopped`."""
        stages = {"sft": self._sft, "reward": self._reward, "ppo": self._ppo, "dpo": self._dpo}
        # On a CPU the first call compiles the operators, which must not count as the time of a step.
        one_token = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        fastpref.sequence_logprobs(torch.zeros(1, 2, 2, device=self.device), one_token)
        with self.stop, Bars(self.console) as self.bars:
            try:
                for stage in self.settings.stages:
                    stages[stage]()
            except (Stopped, KeyboardInterrupt):
                self.stopped = self.bars.current

    def _base_model(self) -> nn.Module:
        settings = self.settings
        if self._origin is not None:
            return models.load_model(self._origin, self.tokenizer)
        return models.small_llama(
            self.tokenizer, hidden=settings.hidden, layers=settings.layers, max_length=settings.max_length
        )

    def _sft(self) -> None:
        model, curves = self._begin("sft", self.base)
        # A model from scratch also learns from the prompts; a user's model only learns to answer.
        scored = self.settings.model is None
        batches = [
            self._collate([(row, 0) for row in rows], score_prompt=scored)
            for rows in self._rows(self.settings.batch, self.settings.sft_steps)
        ]
        self._train(batches, self.settings.sft_rate, ("supervised training", model, train.sft_step, curves))

    def _reward(self) -> None:
        model, curves = self._begin("reward", models.reward_model(self._policy()).to(self.device))
        self._reward_model = model
        answers = len(self.data.kinds)
        score = partial(models.rewards, model)
        self._measure("reward_before", model, score)
        batches = [
            self._collate([(row, answer) for row in rows for answer in range(answers)])
            for rows in self._rows(max(1, self.settings.batch // answers), self.settings.reward_steps)
        ]
        step = partial(train.reward_step, answers=answers)
        self._train(batches, self.settings.reward_rate, ("reward model", model, step, curves))
        self._measure("reward_after", model, score)

    def _ppo(self) -> None:
        settings, reference = self.settings, self._policy()
        policy, curves = copy.deepcopy(reference), PPOCurves()
        self.models["ppo"], self.curves["ppo"] = policy, curves
        self._sample("before", reference, reference)
        # Drawn without regard to length, so that the mean scores of the steps can be compared.
        rng = random.Random(settings.seed)
        prompts = [
            [self._prompt(example) for example in rng.choices(self.train, k=settings.samples)]
            for _ in range(settings.ppo_steps)
        ]
        rows = self._rows(max(1, settings.batch // ppo.UPDATES), ppo.UPDATES * settings.ppo_steps)
        with self.bars.task("PPO", len(prompts)) as advance:
            ppo.train(
                policy,
                reference,
                self._reward_model,
                prompts,
                (self._collate([(row, 0) for row in some]) for some in rows),
                draw=self._sampler(settings.seed),
                settings=settings,
                curves=curves,
                stop=self.stop,
                show=lambda curves: advance(score=curves.score, kl=curves.kl),
            )
        self._sample("after", policy, reference)

    def _prompt(self, example: Encoded) -> list[int]:
        """Return a prompt that leaves room for a sampled answer and its end."""
        room = self.settings.max_length - self.settings.sample_length - 1
        return shorten(example.prompt, room, self.tokenizer.bos_token_id)

    def _sampler(self, seed: int) -> Sampler:
        return partial(
            sample,
            length=self.settings.sample_length,
            pad=self.tokenizer.pad_token_id,
            eos=self.tokenizer.eos_token_id,
            generator=torch.Generator(self.device).manual_seed(seed),
        )

    def _sample(self, name: str, policy: nn.Module, reference: nn.Module) -> None:
        with self.bars.task("held-out samples", len(self.held_out)) as advance:
            self.samples[name] = sample_answers(
                policy,
                reference,
                self._reward_model,
                [self._prompt(example) for example in self.held_out],
                [example.answers[0] for example in self.held_out],
                # The same random numbers before and after PPO.
                draw=self._sampler(self.settings.seed),
                tokenizer=self.tokenizer,
                stop=self.stop,
                show=lambda rows: advance(rows),
            )

    def _dpo(self) -> None:
        reference = self._policy()
        model, curves = self._begin("dpo", copy.deepcopy(reference))
        self._measure("ref_logps", reference, partial(models.answer_logps, reference))
        self.scores["ref_mean_logps"] = self.scores["ref_logps"] / answer_lengths(self.held_out)
        pairs = self._pairs(reference)
        step = partial(train.dpo_step, beta=self.settings.beta)
        trainings = [("DPO", model, partial(step, pair_loss=train.linear_loss), curves)]
        if self.settings.eager:
            # All three take turns at every step, so that other load on the machine slows all of them alike.
            for name, (title, pair_loss) in REPETITIONS.items():
                self.curves[name] = Curves()
                twin = copy.deepcopy(reference)
                trainings.append((title, twin, partial(step, pair_loss=pair_loss), self.curves[name]))
        self._train(pairs, self.settings.dpo_rate, *trainings)
        if self.settings.eager:
            self._measure_memory(model, max(pairs, key=lambda pair: pair.batch.input_ids.numel()))
        self._measure("policy_logps", model, partial(models.answer_logps, model))
        self.scores["implicit"] = fastpref.implicit_reward(
            self.scores["policy_logps"], self.scores["ref_logps"], beta=self.settings.beta
        )

    def _measure_memory(self, model: nn.Module, pairs: PairBatch) -> None:
        """Measure after all trainings: returning memory to the system would make the next timed step slower."""
        losses = {"dpo": train.linear_loss, **{name: loss for name, (_, loss) in REPETITIONS.items()}}
        with self.bars.task("memory of a step", len(losses)) as advance:
            for name, pair_loss in losses.items():
                self.stop.check()
                memory = train.step_memory(model, pairs, pair_loss=pair_loss, beta=self.settings.beta)
                if memory is not None:
                    self.memory[name] = memory
                advance()

    def _policy(self) -> nn.Module:
        return self.models.get("sft", self.base)

    def _begin(self, stage: str, model: nn.Module) -> tuple[nn.Module, Curves]:
        self.models[stage] = model
        self.curves[stage] = Curves()
        return model, self.curves[stage]

    def _rows(self, count: int, steps: int) -> Iterator[list[int]]:
        """Yield `steps` batches of `count` rows of the training data."""
        yield from islice(draw_batches([example.length for example in self.train], count, self.settings.seed), steps)

    def _collate(self, picks: Sequence[tuple[int, int]], *, score_prompt: bool = False) -> Batch:
        sequences = [(self.train[row].prompt, self.train[row].answers[answer]) for row, answer in picks]
        return collate(sequences, self.tokenizer.pad_token_id, self.device, score_prompt=score_prompt)

    def _pairs(self, reference: nn.Module) -> list[PairBatch]:
        """Return the batches of DPO: one pair of every drawn prompt, with the log-probs of the reference."""
        rng = random.Random(self.settings.seed)
        batches = []
        for rows in self._rows(max(1, self.settings.batch // 2), self.settings.dpo_steps):
            picks = [(row, rng.choice(self.data.pairs)) for row in rows]
            chosen, rejected = ([(row, pair[side]) for row, pair in picks] for side in (0, 1))
            batches.append(self._collate(chosen + rejected))
        reference.eval()
        pairs = []
        with self.bars.task("reference log-probs", len(batches)) as advance:
            for batch in batches:
                self.stop.check()
                pairs.append(PairBatch(batch, models.answer_logps(reference, batch)))
                advance()
        return pairs

    def _train(self, batches: Sequence[Any], rate: float, *trainings: tuple[str, nn.Module, Any, Curves]) -> None:
        """Train each (name, model, step, curves) on the same batches; they take turns at every step."""
        with ExitStack() as bars:
            loops = []
            for name, model, step, curves in trainings:
                show = partial(_show, bars.enter_context(self.bars.task(name, len(batches))))
                loops.append(train.train(model, batches, step, rate=rate, curves=curves, stop=self.stop, show=show))
            for _ in zip(*loops, strict=True):
                pass

    def _measure(self, name: str, model: nn.Module, score: Any) -> None:
        model.eval()
        with self.bars.task("held-out answers", len(self.held_out)) as advance:
            self.scores[name] = score_answers(
                score,
                self.held_out,
                pad=self.tokenizer.pad_token_id,
                device=self.device,
                stop=self.stop,
                show=lambda rows: advance(rows),
            )


def _show(advance: Advance, curves: Curves) -> None:
    advance(loss=curves.loss, acc=curves.accuracy)


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")
