"""The pictures: each training's curves, and DPO against the same steps in eager PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fastpref.cli.demo.train import Curves

TITLES = {"sft": "Supervised", "reward": "Reward model", "dpo": "DPO"}
COLORS = {"sft": "#4C72B0", "reward": "#DD8452", "dpo": "#55A868", "eager": "#C44E52"}
STYLE = {
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
    """Exponential moving average, unbiased at the start."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def _draw(axes: Any, values: Sequence[float], color: str) -> None:
    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(values), color=color, linewidth=2)


def plot_curves(curves: Mapping[str, Curves], path: Path) -> None:
    """One column a training, one row each for loss, accuracy and margin; batch values pale, their average strong."""
    rows = (("loss", "loss (nats)"), ("accuracy", "pair accuracy"), ("margin", "reward margin"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(curves), 8), layout="constrained")
        grid = figure.subplots(len(rows), len(curves), squeeze=False)
        for column, (name, curve) in enumerate(curves.items()):
            for row, (attribute, label) in enumerate(rows):
                axes, values = grid[row, column], getattr(curve, attribute)
                if row and not values:
                    axes.set_axis_off()
                    continue
                _draw(axes, values, COLORS[name])
                axes.set(ylabel=label, xlabel="step")
                if attribute == "accuracy":
                    axes.set_ylim(0, 1.02)
                    axes.axhline(0.5, color="grey", linewidth=1, linestyle=":", label="chance")
                    axes.legend(loc="lower right")
            grid[0, column].set_title(TITLES[name])
        figure.suptitle("Training curves: every batch, and their moving average")
        figure.savefig(path, dpi=130)


def plot_eager(ours: Curves, eager: Curves, path: Path) -> None:
    """DPO's loss with fastpref and in eager PyTorch over the same batches, their difference, and a step's time."""
    steps = min(len(ours.loss), len(eager.loss))
    x = range(1, steps + 1)
    difference = [abs(a - b) for a, b in zip(ours.loss, eager.loss, strict=False)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4), layout="constrained")
        loss, gap, seconds = figure.subplots(1, 3)
        loss.plot(x, eager.loss[:steps], color=COLORS["eager"], linewidth=4, alpha=0.45, label="eager PyTorch")
        loss.plot(x, ours.loss[:steps], color=COLORS["dpo"], linewidth=1.4, label="fastpref")
        loss.set(title="DPO loss, same seed and batches", xlabel="step", ylabel="loss (nats)")
        loss.legend()
        # A difference of exactly zero has no place on a logarithmic axis.
        gap.plot(x, [value or float("nan") for value in difference], color="#4C4C4C", linewidth=1.4)
        gap.set(title="Absolute difference of the two", xlabel="step", ylabel="nats")
        if any(difference):
            gap.set_yscale("log")
        for curve, name, label in ((eager, "eager", "eager PyTorch"), (ours, "dpo", "fastpref")):
            seconds.plot(range(1, len(curve.seconds) + 1), curve.seconds, color=COLORS[name], label=f"{label}, step")
            seconds.plot(
                range(1, len(curve.loss_seconds) + 1),
                curve.loss_seconds,
                color=COLORS[name],
                linestyle="--",
                label=f"{label}, loss alone",
            )
        seconds.set(title="Time", xlabel="step", ylabel="seconds", yscale="log")
        seconds.legend(fontsize=8)
        figure.savefig(path, dpi=130)
