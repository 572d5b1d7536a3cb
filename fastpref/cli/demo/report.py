"""What the demo prints: what it is about to do, the tables of what came of it, and where it is."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpref.cli.demo.data import PROMPT_END
from fastpref.cli.demo.plots import WAYS
from fastpref.cli.demo.run import Run
from fastpref.cli.demo.save import accuracies, comparison
from fastpref.cli.demo.settings import Settings

PROMPT_LINES = 8


def announce(settings: Settings, console: Console) -> None:
    """Say what is trained on."""
    text = settings.data or "the functions of Python's standard library on this machine"
    model = settings.model or "a small Llama from scratch"
    console.print(f"Training {escape(str(model))} on {escape(str(text))}: {', '.join(settings.stages)}.")


def summarise(run: Run) -> None:
    """Print the tables of what was measured, and where everything lies."""
    console = run.console
    parameters = sum(parameter.numel() for parameter in run.base.parameters())
    console.print(
        f"{len(run.train)} training and {len(run.held_out)} held-out examples, no {run.data.group} in both; "
        f"{parameters / 1e6:.2f}M parameters, vocabulary {len(run.tokenizer)}."
    )
    tables = (_reward_table(run), _dpo_table(run), _comparison_table(run), _example_table(run))
    for table in filter(None, tables):
        console.print(table)
    for what, name in (("The reward model", "reward_after"), ("DPO", "implicit")):
        unsure = [] if name not in run.scores else _at_chance(run, name)
        if unsure:
            console.print(f"{what} does not tell apart, within two standard errors of chance: {', '.join(unsure)}.")
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
        # Before DPO the policy is its reference, so every implicit reward is 0 and every pair a tie.
        table.add_row(
            kind,
            _share(mean[kind]["accuracy"]),
            _share(0.5),
            _share(after[kind]["accuracy"]),
            f"{after[kind]['margin']:+.2f}",
        )
    table.caption = (
        "log-prob/token: by the model before DPO alone. Its implicit rewards are all 0: ties, one half each."
    )
    return table


def _example_table(run: Run) -> Table | None:
    columns = {"reward": "reward_after", "implicit": "implicit"}
    shown = {title: run.scores[name] for title, name in columns.items() if name in run.scores}
    if not shown:
        return None
    example = run.held_out_examples[0]
    prompt = example.prompt.removesuffix(PROMPT_END).splitlines()[:PROMPT_LINES]
    table = _table("\n".join(["One held-out prompt and its answers, best first:", *prompt]), "answer", *shown, "text")
    for column in table.columns:
        column.no_wrap = True
    table.columns[0].min_width = max(map(len, run.data.kinds))
    for column in table.columns[1:-1]:
        column.min_width = len("implicit")
    table.columns[-1].justify = "left"
    for rank, (kind, answer) in enumerate(zip(run.data.kinds, example.answers, strict=True)):
        table.add_row(kind, *(f"{scores[0, rank]:+.2f}" for scores in shown.values()), escape(answer))
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
        f"Medians of {compared['dpo']['steps']:.0f} steps; MiB at most beyond those before it, on the largest batch. "
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
