"""What an earlier run left in the folder, for stages that build on one which this run does not train."""

from __future__ import annotations

import json
from pathlib import Path

from fastpref.cli.demo.settings import Settings

NEEDS = {"sft": (), "reward": ("sft",), "ppo": ("sft", "reward"), "dpo": ("sft",)}
# What decides which examples are held out: a model of another split has seen some of these.
SPLIT = ("data", "seed", "held_out", "functions")


def earlier_stages(settings: Settings) -> dict[str, Path]:
    """The folder of every stage that the picked ones need and that is not picked itself.

    A user's model stands in for the SFT model.

    Raises:
        ValueError: the folder holds no such model, or one trained on another split of the data.
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
