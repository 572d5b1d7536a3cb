"""What a run leaves in its folder: models, metrics and pictures."""

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

from fastpref.cli.demo.evaluate import pair_accuracy, pair_margin
from fastpref.cli.demo.plots import plot_curves, plot_eager
from fastpref.cli.demo.run import Run


def comparison(run: Run) -> dict[str, float] | None:
    """DPO with fastpref against eager PyTorch over the steps that both made; None before both made one."""
    ours, eager = run.curves.get("dpo"), run.curves.get("eager")
    if not ours or not eager or not eager.loss_seconds:
        return None
    steps = len(eager.loss)
    medians = {
        "step": statistics.median(ours.seconds[:steps]),
        "eager_step": statistics.median(eager.seconds),
        "loss": statistics.median(ours.loss_seconds[:steps]),
        "eager_loss": statistics.median(eager.loss_seconds),
    }
    return {
        "steps": steps,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(ours.loss, eager.loss, strict=False)),
        **{f"median_{name}_seconds": value for name, value in medians.items()},
        "step_time_ratio": medians["eager_step"] / medians["step"],
        "loss_time_ratio": medians["eager_loss"] / medians["loss"],
    }


def accuracies(run: Run) -> dict[str, dict[str, dict[str, float]]]:
    """Held-out accuracy and margin of every kind of pair, by the name of the scores."""
    return {
        name: {
            run.data.pair_name(pair): {"accuracy": pair_accuracy(scores, pair), "margin": pair_margin(scores, pair)}
            for pair in run.data.pairs
        }
        for name, scores in run.scores.items()
    }


def metrics(run: Run) -> dict[str, Any]:
    """Everything measured, ready for JSON."""
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
            # Eager PyTorch's time on a CPU is mostly the allocator's.
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
        "eager": comparison(run),
        "curves": {name: asdict(curves) for name, curves in run.curves.items()},
    }


def save(run: Run) -> None:
    """Write every model with its tokenizer, `metrics.json`, `curves.png` and, after DPO's repetition, `eager.png`."""
    out = run.settings.out
    transformers.utils.logging.disable_progress_bar()
    for stage, model in run.trained.items():
        model.save_pretrained(out / stage)
        run.tokenizer.save_pretrained(out / stage)
    (out / "metrics.json").write_text(json.dumps(metrics(run), indent=1) + "\n", encoding="utf-8")
    drawn = {stage: run.curves[stage] for stage in run.trained}
    if drawn:
        measured = accuracies(run)
        after = {
            stage: {kind: pair["accuracy"] for kind, pair in measured[name].items()}
            for stage, name in (("reward", "reward_after"), ("dpo", "implicit"))
            if name in measured
        }
        text = run.settings.data or "the functions of Python's standard library"
        plot_curves(drawn, after, out / "curves.png", title=f"Preference training on {text}")
    if comparison(run) is not None:
        plot_eager(run.curves["dpo"], run.curves["eager"], out / "eager.png")
