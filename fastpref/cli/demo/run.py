"""A run of the demo: data, tokenizer, the trainings with their measurements, and what they leave behind."""

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
from fastpref.cli.demo import model as models
from fastpref.cli.demo import ppo, train
from fastpref.cli.demo.data import Dataset, pairs_dataset, stdlib_dataset
from fastpref.cli.demo.evaluate import HeldOutSamples, answer_lengths, sample_answers, score_answers
from fastpref.cli.demo.jsonl import read_pairs
from fastpref.cli.demo.ppo import PPOCurves
from fastpref.cli.demo.progress import Advance, Bars
from fastpref.cli.demo.sample import Sampler, check_sampling, sample
from fastpref.cli.demo.settings import Settings
from fastpref.cli.demo.stop import Stop, Stopped
from fastpref.cli.demo.tokens import (
    Batch,
    Encoded,
    collate,
    draw_batches,
    encode,
    load_tokenizer,
    shorten,
    train_tokenizer,
)
from fastpref.cli.demo.train import Curves, Memory, PairBatch

# How DPO is repeated to compare: the bar's title, and its loss.
REPETITIONS = {
    "logits": ("DPO from logits", train.logits_loss),
    "eager": ("DPO in eager PyTorch", train.eager_loss),
}


def load_data(settings: Settings) -> Dataset:
    """The dataset that the settings name; a user's file is read whole before anything is trained."""
    if settings.data is not None:
        return pairs_dataset(read_pairs(settings.data), held_out=settings.held_out, seed=settings.seed)
    return stdlib_dataset(held_out=settings.held_out, seed=settings.seed, limit=settings.functions)


class Run:
    """Everything a run has made so far.

    Attributes:
        models: by stage, in training order; the last one may be half trained.
        curves: by stage, and `logits` and `eager` for DPO's repetitions.
        memory: of a step of DPO and of its repetitions, by the same names, where it can be measured.
        scores: (N, K) held-out scores by name, such as `reward_before`.
        samples: answers sampled for the held-out prompts, `before` and `after` PPO.
        stopped: where a Ctrl-C stopped the run; None if it did not.
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
        # Loading and saving models have bars of their own, within ours.
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
        """Wall time since the data was loaded."""
        return time.perf_counter() - self._start

    def __call__(self) -> None:
        """Train and measure every stage; a Ctrl-C ends it after the step at hand, and is noted in `stopped`."""
        stages = {"sft": self._sft, "reward": self._reward, "ppo": self._ppo, "dpo": self._dpo}
        # On a CPU the first call compiles the operators: not inside a step that is timed.
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
        # A model that knows no language yet learns it from the prompts too; the user's own is taught to answer.
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
        # Not sorted by length: a step's mean score is then comparable to the next one's.
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
                rate=settings.ppo_rate,
                kl_target=settings.kl_target,
                seed=settings.seed,
                curves=curves,
                stop=self.stop,
                show=lambda curves: advance(score=curves.score, kl=curves.kl),
            )
        self._sample("after", policy, reference)

    def _prompt(self, example: Encoded) -> list[int]:
        """With room behind it for a sampled answer and its end."""
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
                # The same draws before and after.
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
            # Step by step beside the first, so that whatever else the machine does slows all of them alike.
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
        """Once all are trained: given back to the operating system, memory would make a timed step slower."""
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
        """`steps` times `count` rows of the training data, drawn by the seed."""
        yield from islice(draw_batches([example.length for example in self.train], count, self.settings.seed), steps)

    def _collate(self, picks: Sequence[tuple[int, int]], *, score_prompt: bool = False) -> Batch:
        sequences = [(self.train[row].prompt, self.train[row].answers[answer]) for row, answer in picks]
        return collate(sequences, self.tokenizer.pad_token_id, self.device, score_prompt=score_prompt)

    def _pairs(self, reference: nn.Module) -> list[PairBatch]:
        """DPO's batches: one pair of every drawn prompt's ranking, with the frozen reference's log-probs."""
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
        """Train each (name, model, step, curves) on the same batches, in turn after every step."""
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
