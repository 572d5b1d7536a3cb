"""Plot the curves of the trainings, those of PPO, and DPO beside its repetitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.demo.ppo import PPOCurves
from examples.demo.train import Curves

TITLES = {"sft": "Supervised", "reward": "Reward model", "ppo": "PPO", "dpo": "DPO"}
COLORS = {
    "sft": "#4C72B0",
    "reward": "#DD8452",
    "ppo": "#937860",
    "dpo": "#55A868",
    "logits": "#8172B3",
    "eager": "#C44E52",
}
WAYS = {"dpo": "from hidden states", "logits": "from logits", "eager": "eager PyTorch"}
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "legend.frameon": False,
}


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential moving average, unbiased at the start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def _draw(axes: Any, values: Sequence[float], stage: str) -> None:
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color=COLORS[stage], alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(values), color=COLORS[stage], linewidth=2, label=TITLES[stage])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_curves(
    curves: Mapping[str, Curves], accuracies: Mapping[str, Mapping[str, float]], path: Path, *, title: str
) -> None:
    """Plot the losses in one row, and pair accuracy, reward margin and held-out accuracy in a second row.

    Args:
        curves: the curves by stage, drawn pale with their moving average on top.
        accuracies: held-out accuracy of every kind of pair, by stage; drawn as bars.
        path: the PNG to write.
        title: the title of the whole picture.
    """
    paired = {stage: curve for stage, curve in curves.items() if curve.accuracy}
    columns = 3 if paired else len(curves)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * columns, 7.6 if paired else 4), layout="constrained")
        grid = figure.subplots(2 if paired else 1, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, (stage, curve) in zip(grid[0], curves.items(), strict=False):
            axes.set_axis_on()
            _draw(axes, curve.loss, stage)
            axes.set(title=f"{TITLES[stage]}: loss", ylabel="nats")
        if paired:
            _draw_pairs(grid[1], paired)
            if accuracies:
                _draw_accuracies(grid[1, 2], accuracies)
        figure.suptitle(title)
        figure.savefig(path, dpi=130)


def _draw_pairs(row: Any, paired: Mapping[str, Curves]) -> None:
    accuracy, margin = row[0], row[1]
    for stage, curve in paired.items():
        _draw(accuracy, curve.accuracy, stage)
        _draw(margin, curve.margin, stage)
    accuracy.axhline(0.5, color="grey", linewidth=1, linestyle=":", label="chance")
    accuracy.set(title="Pair accuracy in training", ylim=(0, 1.02))
    margin.set(title="Reward margin in training")
    for axes in (accuracy, margin):
        axes.set_axis_on()
        axes.legend(loc="lower right")


def _draw_accuracies(axes: Any, accuracies: Mapping[str, Mapping[str, float]]) -> None:
    kinds = list(next(iter(accuracies.values())))
    height = 0.8 / len(accuracies)
    for i, (stage, by_kind) in enumerate(accuracies.items()):
        places = [row + (i - (len(accuracies) - 1) / 2) * height for row in range(len(kinds))]
        bars = axes.barh(places, [by_kind[kind] for kind in kinds], height, color=COLORS[stage], label=TITLES[stage])
        axes.bar_label(bars, fmt="{:.2f}", fontsize=8, padding=2)
    axes.axvline(0.5, color="grey", linewidth=1, linestyle=":")
    axes.set_axis_on()
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(title="Pair accuracy, held out", xlim=(0, 1.12))


def plot_ppo(curves: PPOCurves, held_out: Mapping[str, tuple[float, float]], path: Path, *, target: float) -> None:
    """Plot the score and the KL of the samples of every step of PPO.

    Args:
        curves: the curves of the steps that were made.
        held_out: mean score of the held-out samples and its standard error, before and after.
        path: the PNG to write.
        target: the KL that the controller aims at, in nats a sequence.
    """
    steps = range(1, len(curves.score) + 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.4), layout="constrained")
        score, kl = figure.subplots(1, 2)
        score.plot(steps, curves.score, ".-", color=COLORS["ppo"], label="a step's samples, training prompts")
        # The x position is before the first step or after the last.
        places = {"before": (0, "o"), "after": (len(steps) + 1, "s")}
        for name, (mean, error) in held_out.items():
            place, marker = places[name]
            label = f"held out, {name} (± 2 s.e.)"
            score.errorbar(place, mean, 2 * error, fmt=marker, color="black", capsize=4, label=label)
        score.set(title="PPO: reward-model score", ylabel="score")
        kl.plot(steps, curves.kl, ".-", color=COLORS["ppo"], label="KL to the reference (k3)")
        kl.axhline(target, color="black", linewidth=1, linestyle=":", label="target")
        kl.set(title="PPO: KL and its price", ylabel="nats a sequence", ylim=(0, None))
        price = kl.twinx()
        price.plot(steps, curves.kl_coef, color="black", linewidth=1.2, linestyle="--", label="price of a nat")
        price.set(ylabel="price of a nat", ylim=(0, None))
        price.spines["right"].set_visible(True)
        price.grid(visible=False)
        handles = [*kl.get_legend_handles_labels()[0], *price.get_legend_handles_labels()[0]]
        below: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "fontsize": 8, "ncols": 2}
        score.legend(**below)
        kl.legend(handles=handles, **below)
        for axes in (score, kl):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(path, dpi=130)


def plot_comparison(curves: Mapping[str, Curves], path: Path) -> None:
    """Plot the loss of each way of DPO, the differences from the first way, and the time of a step.

    Args:
        curves: the curves by name, those of the same batches; the others are compared with the first.
        path: the PNG to write.
    """
    ours, *others = curves
    steps = min(len(curve.loss) for curve in curves.values())
    x = range(1, steps + 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4), layout="constrained")
        loss, gap, seconds = figure.subplots(1, 3)
        # Draw the widest line first, so that all are visible where they agree.
        for width, name in zip((5, 3, 1.2), reversed(list(curves)), strict=True):
            style: Any = {"color": COLORS[name], "linewidth": width, "alpha": 0.7, "label": WAYS[name]}
            loss.plot(x, curves[name].loss[:steps], **style)
        loss.set(title="DPO loss, same seed and batches", ylabel="nats")
        loss.legend(reverse=True)
        for name in others:
            pairs = zip(curves[name].loss, curves[ours].loss, strict=False)
            # A logarithmic axis cannot show a difference of exactly zero.
            values = [abs(a - b) or float("nan") for a, b in pairs][:steps]
            gap.plot(x, values, ".", color=COLORS[name], markersize=5, label=WAYS[name])
            if any(value > 0 for value in values):
                gap.set_yscale("log")
        gap.set(title="The others' difference (no dot: none)", ylabel="nats")
        gap.legend()
        for name, curve in curves.items():
            color = COLORS[name]
            seconds.plot(x, curve.seconds[:steps], color=color, label=f"{WAYS[name]}, step")
            seconds.plot(x, curve.loss_seconds[:steps], color=color, linestyle="--", label="head to gradient")
        seconds.set(title="Time a step", ylabel="seconds", yscale="log")
        seconds.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        for axes in (loss, gap, seconds):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(path, dpi=130)
