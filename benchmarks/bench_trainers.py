"""A whole step of TRL's DPOTrainer: as it is, after `patch()`, and as `FastDPOTrainer`.

    python benchmarks/bench_trainers.py [--out FOLDER] [--steps N]

Four layers of Llama, about a thousand tokens a step, half of them completion; a reference model, no gradient
checkpointing. SGD, because AdamW's first step is the sign of every gradient, rounding's where a gradient is 0, and so
tells no curve from another. Each trainer has a process of its own and takes a step when it is told to, one after the
other in an order drawn anew for every step, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is all that Python puts there

from benchmarks import harness, peers
from benchmarks.harness import ALLOCATORS, MIB
from fastpref.cli.demo import memory

H, LAYERS, PAIRS, PROMPT, COMPLETION = 256, 4, 4, 61, 60  # an end-of-sequence token is added
VOCABULARIES = {"32k": 32768, "131k": 131072}
DTYPES = ("fp32", "bf16 autocast")
STEPS_NOT_TIMED, RATE = 2, 0.2
TRL, PATCHED, LEAN, FAST = "TRL", "TRL after patch()", 'TRL after patch(mode="recompute")', "FastDPOTrainer"
# Vocabulary -> how many times as fast; and the share of TRL's memory.
SPEED, MEMORY, LOSS = {"32k": 3.0, "131k": 4.0}, 0.25, 1e-5


def tokenizer(vocabulary: int) -> Any:
    """One word a token."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {word: i for i, word in enumerate([*special.values(), *(f"w{i}" for i in range(vocabulary - 4))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def pairs(vocabulary: int, rows: int) -> dict[str, list[str]]:
    """Columns of prompts and their two completions."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " " + " ".join(f"w{draw.randrange(vocabulary - 4)}" for _ in range(words))

    return {
        name: [text(words) for _ in range(rows)]
        for name, words in {"prompt": PROMPT, "chosen": COMPLETION, "rejected": COMPLETION}.items()
    }


def models(vocabulary: int) -> tuple[Any, Any]:
    """The policy, and a reference that is another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=H, intermediate_size=3 * H, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(LlamaForCausalLM(config))
    return made[0], made[1]


def trainer_process(name: str, vocabulary: int, dtype: str, steps: int, parent: Connection) -> None:
    """Train for `steps` steps, each begun when the parent says so, and answered by its seconds, loss and peak."""
    from transformers import TrainerCallback

    class Lockstep(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            parent.recv()
            memory.restart_peak()
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.start
            peak = memory.peak_resident() - before
            parent.send({"seconds": seconds, "loss": losses[-1], "peak": peak, "gradients": gradients})

    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = peers.dpo_trainer(
            name == FAST, *models(vocabulary), tokenizer(vocabulary), pairs(vocabulary, PAIRS * steps), folder,
            per_device_train_batch_size=PAIRS, max_steps=steps, bf16=dtype != "fp32", learning_rate=RATE, optim="sgd",
        )  # fmt: skip
        compute_loss = trainer.compute_loss

        def recorded(*args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(*args, **kwargs)
            losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

        trainer.compute_loss = recorded
        trainer.add_callback(Lockstep())
        gradients = sum(parameter.nbytes for parameter in trainer.model.parameters())
        before = memory.resident_bytes()
        if name in (PATCHED, LEAN):
            from fastpref.integrations import trl

            trl.patch(mode="recompute" if name == LEAN else "auto")
        trainer.train()
    parent.close()


def timed_rows(vocabulary: str, dtype: str, steps: int, tick: Any) -> harness.Rows:
    """All trainers in lockstep, in this environment."""
    context = multiprocessing.get_context("spawn")
    children: dict[str, tuple[Any, Connection]] = {}
    for name in (TRL, PATCHED, LEAN, FAST):
        ours, theirs = context.Pipe()
        arguments = (name, VOCABULARIES[vocabulary], dtype, steps, theirs)
        children[name] = context.Process(target=trainer_process, args=arguments, daemon=True), ours
        children[name][0].start()
        theirs.close()
    order, found = random.Random(0), {name: [] for name in children}
    for _ in range(steps):
        for name in order.sample(list(children), len(children)):
            children[name][1].send(None)
            found[name].append(children[name][1].recv())
        tick()
    for process, _ in children.values():
        process.join()
    curve = [step["loss"] for step in found[TRL]]
    rows = []
    for name, taken in found.items():
        timed = taken[STEPS_NOT_TIMED:]
        rows.append({
            "name": name, "V": vocabulary, "dtype": dtype,
            "seconds": statistics.median(step["seconds"] for step in timed),
            "peak_mib": max(step["peak"] for step in timed) / MIB,
            "beyond_mib": max(step["peak"] - step["gradients"] for step in timed) / MIB,
            "first_loss": taken[0]["loss"], "last_loss": taken[-1]["loss"],
            "off": max(abs(step["loss"] - loss) for step, loss in zip(taken, curve, strict=True)),
        })  # fmt: skip
    for row in rows:
        row["faster"] = rows[0]["seconds"] / row["seconds"]
        row["share"] = row["peak_mib"] / rows[0]["peak_mib"]
        row["beyond_share"] = row["beyond_mib"] / rows[0]["beyond_mib"]
    return rows


COLUMNS = (
    ("", "name", "{}"), ("V", "V", "{}"), ("dtype", "dtype", "{}"), ("allocator", "allocator", "{}"),
    ("s a step", "seconds", "{:.2f}"), ("× as fast as TRL", "faster", "{:.2f}"),
    ("MiB above the models", "peak_mib", "{:.0f}"), ("of TRL's", "share", "{:.2f}"),
    ("MiB beyond gradients", "beyond_mib", "{:.0f}"), ("of TRL's", "beyond_share", "{:.2f}"),
    ("loss at first", "first_loss", "{:.6f}"), ("at last", "last_loss", "{:.6f}"),
    ("off TRL's curve by", "off", "{:.1e}"),
)  # fmt: skip


def verdict(rows: harness.Rows, steps: int) -> list[str]:
    """Every target beside what was measured, in the first allocator."""
    lines = []
    for row in rows:
        if row["name"] == TRL or row["allocator"] != next(iter(ALLOCATORS)):
            continue
        label = f"{row['name']}, V={row['V']}, {row['dtype']}"
        for what, value, limit, met in (
            ("times as fast", row["faster"], SPEED[row["V"]], row["faster"] >= SPEED[row["V"]]),
            ("of TRL's memory above the models", row["share"], MEMORY, row["share"] <= MEMORY),
            ("of it beyond gradients too", row["beyond_share"], MEMORY, row["beyond_share"] <= MEMORY),
            (f"off its curve over {steps} steps", row["off"], LOSS, row["off"] <= LOSS),
        ):
            lines.append(f"{label}: {value:.2g} {what} (target {limit:g}): {'met' if met else 'missed'}")
    return lines


def main(
    out: Annotated[Path, typer.Option(help="Folder for the CSV and the markdown table")] = Path("benchmarks/results"),
    steps: Annotated[int, typer.Option(min=4, help="Steps of every trainer")] = 20,
    vocabulary: Annotated[list[str] | None, typer.Option(help="Which of 32k and 131k; both if not given")] = None,
) -> None:
    """Measure on this machine's CPU."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    runs = [(steps, a, v, d) for a in ALLOCATORS for v in vocabulary or VOCABULARIES for d in DTYPES]
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(runs) * steps)

        def measure(run: tuple[int, str, str, str]) -> harness.Rows:
            steps, allocator, size, dtype = run
            number = runs.index(run)
            progress.update(task, completed=number * steps, description=f"V={size}, {dtype}, {allocator} allocator")
            with harness.environment(ALLOCATORS[allocator]):
                found = timed_rows(size, dtype, steps, lambda: progress.advance(task))
            return [{**row, "allocator": allocator} for row in found]

        rows = harness.resumed(out / "trainers", runs, measure)
    tokens = 2 * PAIRS * (PROMPT + COMPLETION + 1)
    title = f"DPO steps of {tokens} tokens, H={H}, {LAYERS} layers, {torch.get_num_threads()} threads, {steps} steps"
    harness.show(rows, COLUMNS, verdict(rows, steps), title, console)
    harness.write(rows, COLUMNS, verdict(rows, steps), out / "trainers", title)


if __name__ == "__main__":
    typer.run(main)
