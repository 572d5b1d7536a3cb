"""Models of an earlier run, for stages that build on a stage which this run does not train."""

from __future__ import annotations

import json
from pathlib import Path

from examples.demo.settings import Settings

NEEDS = {"sft": (), "reward": ("sft",), "ppo": ("sft", "reward"), "dpo": ("sft",)}
# These settings decide which examples are held out. A model of another split was trained on some of them.
SPLIT = ("data", "seed", "held_out", "functions")


def earlier_stages(settings: Settings) -> dict[str, Path]:
    """Return the folder of every stage that a picked stage needs and that is not picked itself.

    A user's model takes the place of the SFT model.

    Raises:
        ValueError: the folder has no such model, or it has one that was trained on another split of the data.
    """
    found = {}
    for stage in settings.stages:
        for needed in NEEDS[stage]:
            if needed not in settings.stages and (needed != "sft" or settings.model is None):
                folder = settings.out / needed
                if not (folder / "config.json").is_file():
                    raise ValueError(_missing(stage, needed, folder))
                found[needed] = folder
    if found:
        _check_split(settings)
    return found


def _missing(stage: str, needed: str, folder: Path) -> str:
    ways = f"pick it too (--stages {needed},{stage}), or name the --out of a run that trained it"
    if needed == "sft":
        ways += ", or start from a model of your own (--model)"
    return f"the stage {stage} builds on {needed}, which is neither picked nor in {folder}: {ways}"


def _check_split(settings: Settings) -> None:
    metrics = settings.out / "metrics.json"
    if not metrics.is_file():
        return
    then = json.loads(metrics.read_text(encoding="utf-8"))["settings"]
    for name in SPLIT:
        now = getattr(settings, name)
        now = str(now) if isinstance(now, Path) else now
        if then[name] != now:
            raise ValueError(
                f"the models in {settings.out} are of a run with {name} {then[name]}, not {now}: they were trained on "
                "examples that this run would hold out"
            )
