"""The command of the demo: its options, its errors and its exit status."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from examples.demo.settings import QUICK, STAGES, Settings, parse_stages

if TYPE_CHECKING:
    from examples.demo.run import Run

DEFAULT = Settings()
INTERRUPTED = 130


def _knob(meaning: str, field: str, **limits: float):
    return typer.Option(help=meaning, show_default=str(getattr(DEFAULT, field)), **limits)  # type: ignore[arg-type]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the models, curves and metrics.")] = DEFAULT.out,
    data: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Your own pairs: JSONL, one object a line with prompt, chosen, rejected."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Your own model: a transformers folder with its tokenizer."),
    ] = None,
    stages: Annotated[str, typer.Option(help="Which trainings to run, comma-separated.")] = ",".join(STAGES),
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")] = DEFAULT.seed,
    quick: Annotated[bool, typer.Option("--quick", help="Run it all in a few seconds; nothing is learnt.")] = False,
    eager: Annotated[
        bool, typer.Option(help="Repeat the DPO steps from logits and in eager PyTorch, and compare.")
    ] = True,
    device: Annotated[
        str | None,
        typer.Option(help="Where to train, such as cpu.", show_default="the accelerator if there is one"),
    ] = None,
    vocabulary: Annotated[int | None, _knob("Entries of the tokenizer.", "vocabulary", min=300)] = None,
    hidden: Annotated[int | None, _knob("Width of the small Llama, a multiple of 32.", "hidden", min=32)] = None,
    layers: Annotated[int | None, _knob("Layers of the small Llama.", "layers", min=1)] = None,
    max_length: Annotated[int | None, _knob("Most tokens of a prompt and its answer.", "max_length", min=16)] = None,
    batch: Annotated[int | None, _knob("Sequences a step.", "batch", min=1)] = None,
    sft_steps: Annotated[int | None, _knob("Steps of supervised training.", "sft_steps", min=1)] = None,
    reward_steps: Annotated[int | None, _knob("Steps of the reward model.", "reward_steps", min=1)] = None,
    ppo_steps: Annotated[int | None, _knob("Steps of PPO.", "ppo_steps", min=1)] = None,
    dpo_steps: Annotated[int | None, _knob("Steps of DPO.", "dpo_steps", min=1)] = None,
    sft_rate: Annotated[float | None, _knob("Learning rate of supervised training.", "sft_rate", min=0)] = None,
    reward_rate: Annotated[float | None, _knob("Learning rate of the reward model.", "reward_rate", min=0)] = None,
    ppo_rate: Annotated[float | None, _knob("Learning rate of PPO.", "ppo_rate", min=0)] = None,
    dpo_rate: Annotated[float | None, _knob("Learning rate of DPO.", "dpo_rate", min=0)] = None,
    samples: Annotated[int | None, _knob("Answers sampled in a step of PPO.", "samples", min=2)] = None,
    sample_length: Annotated[int | None, _knob("Most tokens of a sampled answer.", "sample_length", min=1)] = None,
    kl_target: Annotated[
        float | None, _knob("Target of PPO's KL to the reference, in nats an answer.", "kl_target", min=1e-6)
    ] = None,
    beta: Annotated[float | None, _knob("β of DPO.", "beta", min=1e-6)] = None,
    held_out: Annotated[float | None, _knob("Share of the data to hold out.", "held_out", min=0.01, max=0.9)] = None,
    evaluated: Annotated[int | None, _knob("Most held-out prompts to score.", "evaluated", min=1)] = None,
) -> None:
    """Train a small language model, a reward model, PPO and DPO on text found on this machine, and measure them.

    The text is the documented functions of Python's standard library. A prompt is a function's signature and the start
    of its body. The answers, best first, are its docstring, the docstring of another function, its own docstring with
    the words shuffled, and a line of its code. Ctrl-C ends the run after the current step and keeps what was trained so
    far. A stage that is not picked is read from the folder, where an earlier run left it.
    """
    try:
        knobs = {
            "vocabulary": vocabulary,
            "hidden": hidden,
            "layers": layers,
            "max_length": max_length,
            "batch": batch,
            "sft_steps": sft_steps,
            "reward_steps": reward_steps,
            "ppo_steps": ppo_steps,
            "dpo_steps": dpo_steps,
            "sft_rate": sft_rate,
            "reward_rate": reward_rate,
            "ppo_rate": ppo_rate,
            "dpo_rate": dpo_rate,
            "samples": samples,
            "sample_length": sample_length,
            "kl_target": kl_target,
            "beta": beta,
            "held_out": held_out,
            "evaluated": evaluated,
        }
        given = {name: value for name, value in knobs.items() if value is not None}
        settings = replace(
            DEFAULT,
            out=out,
            data=data,
            model=model,
            stages=parse_stages(stages),
            seed=seed,
            eager=eager,
            device=device,
            **{**(QUICK if quick else {}), **given},
        )
        run = _prepare(settings)
    except (ValueError, OSError) as error:
        typer.echo(f"demo: {error}", err=True)
        raise typer.Exit(1) from None
    _train(run)
    if run.stopped is not None:
        raise typer.Exit(INTERRUPTED)


def _prepare(settings: Settings) -> Run:
    # These imports take seconds; --help and a mistyped option do not wait for them.
    from rich.console import Console

    from examples.demo import report, run
    from examples.demo.earlier import earlier_stages

    console = Console()
    earlier = earlier_stages(settings)
    report.announce(settings, earlier, console)
    prepared = run.Run(settings, run.load_data(settings), earlier, console)
    # Fail before the training, not after it, if the folder cannot be written to.
    settings.out.mkdir(parents=True, exist_ok=True)
    return prepared


def _train(run: Run) -> None:
    from examples.demo import report, save

    run()
    save.save(run)
    report.summarise(run)
