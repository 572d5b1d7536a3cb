"""Measure a whole step of TRL's DPOTrainer: unchanged, after `patch()`, and as `FastDPOTrainer`.

`fastpref bench trainers` runs this subject. The model is a Llama of four layers with a reference model and no gradient
checkpointing; a step has about a thousand tokens, half of them completion. The optimizer is SGD, because the first step
of AdamW is the sign of each gradient, which rounding decides where a gradient is 0. Each trainer runs in a process of
its own. In each step they take turns in a new order, so that other load on the machine affects all alike.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import machine, peers
from benchmarks.harness import MIB, Options, reason, statistics_of
from benchmarks.peers import Entry
from benchmarks.store import Row, Rows
from fastpref.testing import memory

LAYERS, PAIRS, PROMPT, COMPLETION = 4, 4, 61, 60  # an end-of-sequence token is added to each completion
STEPS_NOT_TIMED, RATE = 2, 0.2
STEP = "step"
TRL, PATCHED, LEAN, FAST = "TRL", "TRL after patch()", 'TRL after patch(mode="recompute")', "FastDPOTrainer"
NAMES = (TRL, PATCHED, LEAN, FAST)
# A trainer whose first loss differs from TRL's by more is wrong. In bf16, TRL's own error is a tenth of this.
FIRST_LOSS = 1e-2


def tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer whose tokens are words."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = {word: i for i, word in enumerate([*special.values(), *(f"w{i}" for i in range(vocabulary - 4))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def pairs(axes: Row) -> dict[str, list[str]]:
    """Return the columns prompt, chosen and rejected."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " " + " ".join(f"w{draw.randrange(axes['V'] - 4)}" for _ in range(words))

    return {
        name: [text(words) for _ in range(PAIRS * axes["steps"])]
        for name, words in {"prompt": PROMPT, "chosen": COMPLETION, "rejected": COMPLETION}.items()
    }


def models(axes: Row) -> tuple[Any, Any]:
    """Return the policy and a reference model with other weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=axes["V"],
        hidden_size=axes["H"],
        intermediate_size=3 * axes["H"],
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(LlamaForCausalLM(config))
    return made[0], made[1]


def trainer_process(name: str, axes: Row, device: str, parent: Connection) -> None:
    """Train; begin each step when the parent says so, and answer with its seconds, loss and peak."""
    with open(os.devnull, "w") as nowhere:  # hides the progress bars and logs; errors are sent to the parent
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        _train(name, axes, device, parent)
    except EOFError:  # the parent has ended
        return
    except Exception as met:
        parent.send(reason(met))


def _train(name: str, axes: Row, device: str, parent: Connection) -> None:
    from transformers import TrainerCallback

    class Lockstep(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            parent.recv()
            self.peak = memory.restarted(torch.device(device))
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.start
            parent.send({"seconds": seconds, "loss": losses[-1], "peak": self.peak() - before, "gradients": gradients})

    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = peers.dpo_trainer(
            name == FAST,
            *models(axes),
            tokenizer(axes["V"]),
            pairs(axes),
            folder,
            use_cpu=device == "cpu",
            per_device_train_batch_size=PAIRS,
            max_steps=axes["steps"],
            bf16=axes["dtype"] != "fp32",
            learning_rate=RATE,
            optim="sgd",
        )
        compute_loss = trainer.compute_loss

        def recorded(*args: Any, **kwargs: Any) -> Any:
            loss = compute_loss(*args, **kwargs)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

        trainer.compute_loss = recorded
        trainer.add_callback(Lockstep())
        gradients = sum(parameter.nbytes for parameter in trainer.model.parameters())
        before = memory.held(torch.device(device))
        if name in (PATCHED, LEAN):
            from fastpref.integrations import trl

            trl.patch(mode="recompute" if name == LEAN else "auto")
        trainer.train()


def entries(options: Options, axes: dict[str, Any]) -> list[Entry]:
    """Return the entries of TRL's trainer and of fastpref; `options` cannot leave any out."""
    return [peers.process(TRL, "trl"), *(peers.process(name, "fastpref") for name in (PATCHED, LEAN, FAST))]


def measure(axes: dict[str, Any], device: str, options: Options, say: Callable[..., None]) -> Rows:
    """Run all trainers in lockstep and return their rows."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[Row]] = {}
    problems: dict[str, str] = {}
    children: dict[str, tuple[Any, Connection]] = {}
    chosen = entries(options, axes)
    for entry in chosen:
        ours, theirs = context.Pipe()
        process = context.Process(target=trainer_process, args=(entry.name, axes, device, theirs), daemon=True)
        process.start()
        children[entry.name], found[entry.name] = (process, ours), []
        theirs.close()
    order = random.Random(0)
    for step in range(axes["steps"]):
        say("round", step)
        for name in order.sample(list(children), len(children)):
            if name in problems:
                continue
            try:
                children[name][1].send(None)
                taken = children[name][1].recv()
            except (EOFError, ConnectionError):
                taken = f"ended (status {children[name][0].exitcode})"
            if isinstance(taken, str):
                problems[name] = taken
            else:
                found[name].append(taken)
    for process, _ in children.values():
        process.join()
    return [_row(entry, found, problems) for entry in chosen]


def _row(entry: Entry, found: dict[str, list[Row]], problems: dict[str, str]) -> Row:
    """Return the row of a trainer; its error is the difference of its first loss from TRL's, with the same weights."""
    row: Row = {
        "name": entry.name,
        "pass": STEP,
        "package": entry.package,
        "version": machine.package_version(entry.package),
        "scored": 2 * PAIRS * (COMPLETION + 1),
    }
    taken, curve = found[entry.name], [step["loss"] for step in found[TRL]]
    if entry.name in problems or not taken:
        return {**row, "gate": "failed", "problem": problems.get(entry.name, "took no step")}
    error = abs(taken[0]["loss"] - curve[0]) if curve else float("nan")
    if not error <= FIRST_LOSS:
        return {
            **row,
            "gate": "failed",
            "problem": f"wrong: its first loss differs from TRL's by {error:.1e}",
            "error": error,
        }
    timed = taken[STEPS_NOT_TIMED:]
    row |= statistics_of([step["seconds"] for step in timed])
    row |= {
        "gate": "within",
        "error": error,
        "off_curve": max(abs(step["loss"] - loss) for step, loss in zip(taken, curve, strict=True)),
        "first_loss": taken[0]["loss"],
        "last_loss": taken[-1]["loss"],
        "gradient_mib": timed[0]["gradients"] / MIB,
        # This includes the gradients, which a user needs memory for as well.
        "peak_mib": max(step["peak"] for step in timed) / MIB,
    }
    return row


BASE = {"dtype": "fp32", "B": PAIRS, "V": 32768, "H": 256, "steps": 5}
AXES = tuple(BASE)


def points(preset: str, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the (allocator, axes) of a preset."""
    if preset == "smoke":
        yield "default", {**BASE, "V": 1024, "H": 64, "steps": 4}
        return
    if preset == "full":
        for allocator in ("default", "THP") if device == "cpu" else ("default",):
            for V in (32768, 131072):
                for dtype in ("fp32", "bf16"):
                    yield allocator, {**BASE, "dtype": dtype, "V": V, "steps": 20}
        return
    yield "default", BASE
    yield "default", {**BASE, "dtype": "bf16"}
    yield "default", {**BASE, "V": 131072}
