"""Write the models, metrics and pictures of a run to its folder."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from examples.demo.evaluate import pair_accuracy, pair_margin
from examples.demo.plots import plot_comparison, plot_curves, plot_ppo
from examples.demo.ppo import PPOCurves
from examples.demo.run import REPETITIONS, Run


def comparison(run: Run) -> dict[str, dict[str, float]]:
    """Compare DPO from hidden states with its repetitions, over the steps that all of them made.

    Ratios and the largest difference of a step's loss are relative to DPO from hidden states. The result is empty if
    there are no repetitions, or no steps.
    """
    curves = {name: run.curves[name] for name in ("dpo", *REPETITIONS) if name in run.curves}
    steps = min(len(curve.loss_seconds) for curve in curves.values()) if len(curves) > 1 else 0
    if not steps:
        return {}
    ours = curves["dpo"]
    compared: dict[str, dict[str, float]] = {}
    for name, curve in curves.items():
        found = {
            "steps": float(steps),
            "median_step_seconds": statistics.median(curve.seconds[:steps]),
            "median_loss_seconds": statistics.median(curve.loss_seconds[:steps]),
        }
        if name in run.memory:
            found |= {f"peak_{part}_bytes": float(value) for part, value in run.memory[name]._asdict().items()}
        compared[name] = found
    for name, found in compared.items():
        for field in [field for field in found if field != "steps"]:
            if compared["dpo"].get(field):
                found[f"{field}_ratio"] = found[field] / compared["dpo"][field]
        differences = (abs(a - b) for a, b in zip(ours.loss[:steps], curves[name].loss[:steps], strict=True))
        found["largest_loss_difference"] = max(differences)
    return compared


def accuracies(run: Run) -> dict[str, dict[str, dict[str, float]]]:
    """Return the held-out accuracy and margin of every kind of pair, by the name of the scores."""
    return {
        name: {
            run.data.pair_name(pair): {"accuracy": pair_accuracy(scores, pair), "margin": pair_margin(scores, pair)}
            for pair in run.data.pairs
        }
        for name, scores in run.scores.items()
    }


def sampled(run: Run) -> dict[str, dict[str, float]]:
    """Return statistics of the answers sampled `before` and `after` PPO, and of the paired `change` of the score.

    They are means over the prompts, some with their standard errors.
    """
    found = {}
    for name, samples in run.samples.items():
        found[name] = {
            **_mean("score", samples.scores),
            **_mean("kl_k3", samples.kl),
            **_mean("tokens", samples.lengths),
            "ended": samples.ended.mean().item(),
            "distinct": len(set(samples.answers)) / len(samples.answers),
            "best_answer_nats_per_token": -samples.best_logps.mean().item(),
        }
    if len(found) == 2:
        found["change"] = _mean("score", run.samples["after"].scores - run.samples["before"].scores)
    return found


def _mean(name: str, values: Tensor) -> dict[str, float]:
    error = values.std(correction=min(1, len(values) - 1)) / len(values) ** 0.5
    return {name: values.mean().item(), f"{name}_standard_error": error.item()}


def metrics(run: Run) -> dict[str, Any]:
    """Return all measurements in a form that JSON can hold."""
    return {
        "settings": {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(run.settings).items()
        },
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": str(run.device),
            "threads": torch.get_num_threads(),
            # On a CPU, eager PyTorch spends most of its time in the allocator.
            "allocator": {name: os.environ.get(name) for name in ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")},
        },
        "data": {
            "train": len(run.train),
            "held_out": len(run.held_out),
            "vocabulary": len(run.tokenizer),
            "parameters": sum(parameter.numel() for parameter in run.base.parameters()),
        },
        "seconds": run.seconds,
        "stopped": run.stopped,
        "held_out": accuracies(run),
        "samples": sampled(run),
        "comparison": comparison(run),
        "curves": {name: asdict(curves) for name, curves in run.curves.items()},
    }


def save(run: Run) -> None:
    """Write models and tokenizer, `metrics.json`, `curves.png`, `ppo.png` and, after repetitions, `comparison.png`."""
    out = run.settings.out
    for stage, model in run.trained.items():
        model.save_pretrained(out / stage)
        run.tokenizer.save_pretrained(out / stage)
    (out / "metrics.json").write_text(json.dumps(metrics(run), indent=1) + "\n", encoding="utf-8")
    drawn = {stage: run.curves[stage] for stage in run.trained if stage != "ppo"}
    if drawn:
        measured = accuracies(run)
        after = {
            stage: {kind: pair["accuracy"] for kind, pair in measured[name].items()}
            for stage, name in (("reward", "reward_after"), ("dpo", "implicit"))
            if name in measured
        }
        text = run.settings.data or "the functions of Python's standard library"
        plot_curves(drawn, after, out / "curves.png", title=f"Preference training on {text}")
    ppo = run.curves.get("ppo")
    if isinstance(ppo, PPOCurves) and ppo.loss:
        held_out = {name: (found["score"], found["score_standard_error"]) for name, found in sampled(run).items()}
        held_out.pop("change", None)
        plot_ppo(ppo, held_out, out / "ppo.png", target=run.settings.kl_target)
    if comparison(run):
        plot_comparison({name: run.curves[name] for name in ("dpo", *REPETITIONS)}, out / "comparison.png")
