"""Print what a run is about to do, and the tables of its measurements."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.demo.data import PROMPT_END
from examples.demo.plots import WAYS
from examples.demo.run import Run
from examples.demo.save import accuracies, comparison, sampled
from examples.demo.settings import Settings

PROMPT_LINES = 8


def announce(settings: Settings, earlier: Mapping[str, Path], console: Console) -> None:
    """Print what is trained, on which text, and from which models of an earlier run."""
    text = settings.data or "the functions of Python's standard library on this machine"
    model = settings.model or earlier.get("sft") or "a small Llama from scratch"
    console.print(f"Training {escape(str(model))} on {escape(str(text))}: {', '.join(settings.stages)}.")
    if "reward" in earlier:
        console.print(f"The reward model is read from {escape(str(earlier['reward']))}.")


def summarise(run: Run) -> None:
    """Print the tables of the measurements, and where the results are."""
    console = run.console
    parameters = sum(parameter.numel() for parameter in run.base.parameters())
    console.print(
        f"{len(run.train)} training and {len(run.held_out)} held-out examples, no {run.data.group} in both; "
        f"{parameters / 1e6:.2f}M parameters, vocabulary {len(run.tokenizer)}."
    )
    tables = (_reward_table(run), _ppo_table(run), _dpo_table(run), _comparison_table(run), _example_table(run))
    for table in filter(None, tables):
        console.print(table)
    for what, name in (("The reward model", "reward_after"), ("DPO", "implicit")):
        unsure = [] if name not in run.scores else _at_chance(run, name)
        if unsure:
            console.print(f"{what} is within two standard errors of chance for: {', '.join(unsure)}.")
    out = escape(str(run.settings.out))
    if run.stopped is not None:
        console.print(f"Stopped at: {run.stopped}.")
    if run.trained:
        console.print(f"In {out}: models {', '.join(run.trained)}; metrics.json and the curves. {run.seconds:.0f} s.")
    else:
        console.print(f"No step was made; {out} holds no model.")


def _reward_table(run: Run) -> Table | None:
    if "reward_after" not in run.scores:
        return None
    table = _table("Reward model: held-out pair accuracy", "pair", "before", "after", "margin after")
    before, after = (accuracies(run)[name] for name in ("reward_before", "reward_after"))
    for kind in after:
        table.add_row(
            kind, _share(before[kind]["accuracy"]), _share(after[kind]["accuracy"]), f"{after[kind]['margin']:+.2f}"
        )
    return table


def _ppo_table(run: Run) -> Table | None:
    found = sampled(run)
    if "change" not in found:
        return None
    before, after, change = found["before"], found["after"], found["change"]
    table = _table("PPO: an answer sampled for every held-out prompt", "mean ± standard error", "before", "after")
    table.add_row("reward-model score", *(_pm(measured, "score", 2) for measured in (before, after)))
    table.add_row("KL to the model before, nats an answer (k3)", "0", _pm(after, "kl_k3", 1))
    table.add_row("tokens", *(_pm(measured, "tokens", 1) for measured in (before, after)))
    for title, field in (("sampled an end of text", "ended"), ("distinct answers", "distinct")):
        table.add_row(title, *(_share(measured[field]) for measured in (before, after)))
    best = "best_answer_nats_per_token"
    table.add_row(f"{run.data.kinds[0]}: nats a token", *(f"{measured[best]:.2f}" for measured in (before, after)))
    table.caption = f"The score rose by {_pm(change, 'score', 2)}, prompt by prompt."
    return table


def _pm(measured: dict[str, float], field: str, digits: int) -> str:
    return f"{measured[field]:.{digits}f} ± {measured[f'{field}_standard_error']:.{digits}f}"


def _dpo_table(run: Run) -> Table | None:
    if "implicit" not in run.scores:
        return None
    table = _table(
        "DPO: held-out pair accuracy of implicit rewards",
        "pair",
        "log-prob/token",
        "before",
        "after",
        "margin after",
    )
    after, mean = (accuracies(run)[name] for name in ("implicit", "ref_mean_logps"))
    for kind in after:
        # Before DPO the policy is its reference, so every implicit reward is 0 and every pair is a tie.
        table.add_row(
            kind,
            _share(mean[kind]["accuracy"]),
            _share(0.5),
            _share(after[kind]["accuracy"]),
            f"{after[kind]['margin']:+.2f}",
        )
    table.caption = (
        "log-prob/token ranks answers by their mean log-probs before DPO. Before DPO all implicit rewards are 0, so "
        "every pair is a tie, which counts one half."
    )
    return table


def _example_table(run: Run) -> Table | None:
    columns = {"reward": "reward_after", "implicit": "implicit"}
    scores = {title: run.scores[name][0].tolist() for title, name in columns.items() if name in run.scores}
    example = run.held_out_examples[0]
    rows = [
        (kind, answer, {title: of_ranks[rank] for title, of_ranks in scores.items()})
        for rank, (kind, answer) in enumerate(zip(run.data.kinds, example.answers, strict=True))
    ]
    for name, samples in run.samples.items():
        # A model may sample characters that cannot be printed.
        answer = "".join(character if character.isprintable() else " " for character in samples.answers[0])
        rows.append((f"{name} PPO", answer, {"reward": samples.scores[0].item()}))
    shown = [title for title in columns if any(title in found for _, _, found in rows)]
    if not shown:
        return None
    prompt = example.prompt.removesuffix(PROMPT_END).splitlines()[:PROMPT_LINES]
    table = _table("\n".join(["One held-out prompt and its answers, best first:", *prompt]), "answer", *shown, "text")
    for column in table.columns:
        column.no_wrap = True
    table.columns[0].min_width = max(len(kind) for kind, _, _ in rows)
    for column in table.columns[1:-1]:
        column.min_width = len("implicit")
    table.columns[-1].justify = "left"
    for kind, answer, found in rows:
        table.add_row(kind, *(f"{found[title]:+.2f}" if title in found else "" for title in shown), escape(answer))
    return table


def _at_chance(run: Run, name: str) -> list[str]:
    bound = 0.5 + 2 * (0.25 / len(run.held_out)) ** 0.5
    return [kind for kind, pair in accuracies(run)[name].items() if pair["accuracy"] < bound]


def _comparison_table(run: Run) -> Table | None:
    compared = comparison(run)
    if not compared:
        return None
    table = _table("DPO: the same steps in three ways", "", *(WAYS[name] for name in compared))
    rows = (
        ("whole step, ms", "median_step_seconds", 1e3),
        ("head to gradient, ms", "median_loss_seconds", 1e3),
        ("whole step, MiB", "peak_step_bytes", 2**-20),
        ("head to gradient, MiB", "peak_loss_bytes", 2**-20),
    )
    for title, field, factor in rows:
        if all(f"{field}_ratio" in found for found in compared.values()):
            cells = (f"{factor * found[field]:.0f} ({found[f'{field}_ratio']:.2f}x)" for found in compared.values())
            table.add_row(title, *cells)
    apart = (
        f"{found['largest_loss_difference']:.1e} {WAYS[name]}" for name, found in compared.items() if name != "dpo"
    )
    table.caption = (
        f"Medians of {compared['dpo']['steps']:.0f} steps; MiB is the peak beyond the memory in use before a step, for "
        "the largest batch. "
        f"Largest difference of a step's loss, nats: {', '.join(apart)}."
    )
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", caption_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"
