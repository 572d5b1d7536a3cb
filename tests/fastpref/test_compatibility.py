"""The table of docs/compatibility.md, with a test for every cell: fastpref's functions under PyTorch's features.

A column is a small training step, from ids and labels to a loss. A row does to a step what its users do.
"""

from __future__ import annotations

import ast
import functools
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastpref
from tests.fastpref.compatibility.runs import (
    accumulation,
    autocast,
    checkpoint_selective,
    checkpointed,
    copies,
    deterministic,
    forked_worker,
    grad_scaler,
    nested,
    no_gradients,
    offloading,
    parametrised,
    quantised,
    replicas,
    results,
    retain_graph,
    step_in_backward,
    subclass,
    threads,
    tied,
    wrapper_subclass,
)
from tests.fastpref.compatibility.steps import (
    VOCABULARY,
    Attached,
    Hidden,
    HiddenLoss,
    Logits,
    Losses,
    Step,
    hold,
)
from tests.fastpref.compatibility.transforms import (
    compiled_backward,
    double_backward,
    dynamic,
    exported,
    flops,
    forward_mode,
    func_grad,
    func_grad_compiled,
    functional,
    inductor,
    shapes_only,
    vmap,
)

pytestmark = [
    pytest.mark.usefixtures("unpoisoned"),
    # The compiler's own imports and code use what the newest Python deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled", "ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]
ROOT = Path(__file__).parents[2]
COLUMNS: dict[str, type[Step]] = {
    "log-probs from logits": Logits,
    "log-probs from hidden states": Hidden,
    "losses from hidden states": HiddenLoss,
    "losses of log-probs": Losses,
    "`attach`ed models": Attached,
}


def defined(place: str) -> bool:
    """Return whether a file of this repository, `path::name`, has a function of that name."""
    path, name = place.split("::")
    tree = ast.parse((ROOT / path).read_text())
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def elsewhere(*places: str) -> Callable[[type[Step]], None]:
    """Return a check that tests of these names exist, for what this process cannot check itself."""

    def check(kind: type[Step]) -> None:
        assert all(map(defined, places))

    check.places = places  # type: ignore[attr-defined]
    return check


TWICE = "refused: once_differentiable"
UNRUN, HOST = "GPU test, not run yet", "with `scored_rows` (GPU test, not run yet)"
WRAPPED, VOCABULARIES = "tests/distributed/wrapped.py", "tests/distributed/vocabulary.py"
CUDA = "tests/gpu/test_cuda.py"


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        what: is done to a step.
        check: does it, and raises unless the result is right.
        cells: what comes of it, one of each column: "yes"; "refused: " and a part of the error's text; "no: " and a
            part of what the check says; "-" where there is nothing to try. One text is that of all columns.
    """

    what: str
    check: Callable[[type[Step]], None]
    cells: tuple[str, ...] | str = "yes"

    def verdicts(self) -> tuple[str, ...]:
        return (self.cells,) * len(COLUMNS) if isinstance(self.cells, str) else self.cells


def but(verdict: str, losses: str = "yes", attached: str | None = None) -> tuple[str, ...]:
    """Return one verdict for all columns, but losses of log-probs, which are plain PyTorch on a CPU, and `attach`."""
    return (verdict, verdict, verdict, losses, verdict if attached is None else attached)


UNCOUNTED = "no: not counted"
VMAP, JVP = "refused: does not support vmap", "refused: no forward-mode derivative"
EXPORT = "refused: export under torch.no_grad()"
SECTIONS: dict[str, list[Row]] = {
    "Compiling": [
        Row(
            "`torch.compile(fullgraph=True)` by inductor, forward and backward",
            inductor,
            but("yes", losses="-", attached="-"),
        ),
        Row("`torch.compile(fullgraph=True, dynamic=True)`, compiled once for all lengths", dynamic),
        Row("compiled autograd", compiled_backward, but("yes", losses="-", attached="-")),
        Row("`torch.export` under `no_grad`, with dynamic shapes", functools.partial(exported, gradients=False)),
        Row("`torch.export` with gradients", functools.partial(exported, gradients=True), but(EXPORT)),
        Row("fake tensors, forward and backward", functools.partial(shapes_only, fake=True)),
        Row(
            "meta tensors, forward and backward",
            functools.partial(shapes_only, fake=False),
            but("yes", attached="refused: cannot be called on meta tensors"),
        ),
    ],
    "Autograd": [
        Row("`retain_graph=True` and a second backward", retain_graph),
        Row("double backward", double_backward, but(TWICE)),
        Row("gradients accumulated over halves of a batch", accumulation),
        Row("`torch.no_grad()`, `torch.inference_mode()`", no_gradients),
        Row("an optimizer in the backward's hooks, `detect_anomaly`", step_in_backward),
        Row("`torch.func.functional_call`", functional),
        Row("`torch.func.grad`, `vjp`", func_grad),
        Row("`torch.func.grad` in `torch.compile`", func_grad_compiled),
        Row("`torch.vmap`, including `vmap` of gradients", vmap, but(VMAP)),
        Row("forward mode: `torch.func.jvp`, `forward_ad`", forward_mode, but(JVP)),
    ],
    "Memory": [
        Row("checkpointing, `use_reentrant=False`", functools.partial(checkpointed, use_reentrant=False)),
        Row("checkpointing, `use_reentrant=True`", functools.partial(checkpointed, use_reentrant=True)),
        Row("selective checkpointing that keeps PyTorch's products", checkpoint_selective),
        Row("`save_on_cpu` and other saved-tensor hooks", offloading),
    ],
    "Precision": [
        Row("autocast to bf16", functools.partial(autocast, dtype=torch.bfloat16)),
        Row("autocast to fp16", functools.partial(autocast, dtype=torch.float16)),
        Row("`GradScaler`, including a skipped step", grad_scaler),
        Row("`torch.use_deterministic_algorithms(True)`", deterministic),
    ],
    "Processes and threads": [
        Row("`copy.deepcopy` and `pickle` of a model", copies),
        Row("`pickle` of a call's result", results),
        Row("replicas in threads, as in `DataParallel`", replicas),
        Row("two threads at once, forward and backward", threads),
        Row("a forked worker of a `DataLoader`", forked_worker),
        Row("DDP", elsewhere(f"{WRAPPED}::ddp"), ("-", "yes", "yes", "yes", "yes")),
        Row(
            "FSDP2", elsewhere(f"{WRAPPED}::fsdp2", f"{WRAPPED}::fsdp2_accumulates"), ("-", "yes", "yes", "yes", "yes")
        ),
        Row(
            "a vocabulary split over ranks, as in tensor parallelism",
            elsewhere(
                *(f"{VOCABULARIES}::{name}" for name in ("token_logprobs", "linear_token_logprobs", "linear_dpo_loss"))
            ),
            ("yes", "yes", "yes", "-", "-"),
        ),
        Row("context parallelism", elsewhere(f"{WRAPPED}::context_parallel"), ("yes", "yes", "-", "-", "-")),
    ],
    "Heads and tensors": [
        Row("a head tied to the embedding", tied, ("yes", "yes", "yes", "-", "yes")),
        Row(
            "`weight_norm` on the head", parametrised, ("yes", "yes", "yes", "-", "refused: must be a plain nn.Linear")
        ),
        Row(
            "a head with PyTorch's dynamic int8 quantization",
            quantised,
            (
                "yes",
                *["refused: weight must be a floating-point tensor"] * 2,
                "-",
                "refused: must be a plain nn.Linear",
            ),
        ),
        Row("a plain subclass of `Tensor`", subclass),
        Row(
            "weights of a wrapper subclass (`__torch_dispatch__`)",
            wrapper_subclass,
            ("yes", "yes", "yes", "yes", "refused: must be a plain tensor"),
        ),
        Row("nested tensors (jagged)", nested, (*["refused: must not be a nested tensor"] * 3, "-", "-")),
    ],
    "CUDA": [
        Row(
            "a CUDA graph, captured and replayed",
            elsewhere(
                f"{CUDA}::test_captured_in_a_graph",
                f"{CUDA}::test_a_loss_waits_for_nothing_and_is_captured",
                f"{CUDA}::test_scored_rows_are_counted_by_the_host",
                f"{CUDA}::test_told_its_scored_rows_a_step_waits_for_nothing_and_is_captured",
            ),
            (UNRUN, HOST, HOST, UNRUN, HOST),
        ),
        Row(
            '`torch.compile(mode="reduce-overhead")`, which captures what it can',
            elsewhere(f"{CUDA}::test_compiles_with_graphs"),
            (UNRUN, UNRUN, UNRUN, UNRUN, "-"),
        ),
    ],
    "Flop counting": [
        Row("`FlopCounterMode` counts the head's products", flops, ("yes", UNCOUNTED, UNCOUNTED, "-", "-"))
    ],
}
CELLS = [
    pytest.param(row, kind, verdict, id=f"{row.what} | {column}")
    for rows in SECTIONS.values()
    for row in rows
    for (column, kind), verdict in zip(COLUMNS.items(), row.verdicts(), strict=True)
    if verdict != "-"
]


def skip_without_compiled_torch_func() -> None:
    """Skip where torch is not known to trace `torch.func.grad`: 2.8 cannot, 2.11 can, none between was tried."""
    if torch.__version__ < (2, 11):
        pytest.skip(f"torch {torch.__version__} is not known to trace torch.func.grad")


@pytest.mark.parametrize(("row", "kind", "verdict"), CELLS)
def test_cell(row: Row, kind: type[Step], verdict: str) -> None:
    if row.check is func_grad_compiled:
        skip_without_compiled_torch_func()
    if row.check in (dynamic, func_grad_compiled) and kind is Attached and torch.__version__ < (2, 12):
        pytest.skip(f"torch {torch.__version__} breaks the graph of an attached model")
    outcome, _, phrase = verdict.partition(": ")
    if hasattr(row.check, "places") or outcome == "yes":
        row.check(kind)
    else:
        error = AssertionError if outcome == "no" else (RuntimeError, TypeError, ValueError, pickle.PicklingError)
        with pytest.raises(error, match=re.escape(phrase)):
            row.check(kind)


def test_what_a_nested_tensor_is_refused_for_works() -> None:
    rows = [torch.randn(length, VOCABULARY) for length in (5, 9)]
    logits = torch.nested.nested_tensor(rows, layout=torch.jagged)
    labels = torch.randint(VOCABULARY, (14,))
    found = fastpref.sequence_logprobs(logits.values(), labels, cu_seqlens=logits.offsets())
    hold(
        found,
        torch.stack(
            [
                fastpref.sequence_logprobs(row[None], y[None])[0]
                for row, y in zip(rows, labels.split([5, 9]), strict=True)
            ]
        ),
    )


def test_the_reference_has_the_derivatives_that_are_refused() -> None:
    labels, (logits, along) = torch.randint(VOCABULARY, (2, 5)), torch.randn(2, 2, 5, VOCABULARY).unbind()
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fastpref.token_logprobs(leaf, labels).sum(), leaf)
    _, tangent = torch.func.jvp(lambda z: fastpref.reference.token_logprobs(z, labels), (logits,), (along,))
    hold(tangent.sum(), (gradient * along).sum(), atol=1e-5)
    (gradient,) = torch.autograd.grad(fastpref.reference.token_logprobs(leaf, labels).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
    assert second.abs().max() > 1e-3


def test_compiled_torch_func_by_the_logits_themselves() -> None:
    """In a compiled graph these logits do not say that they require a gradient, which must not be 0 for that."""
    skip_without_compiled_torch_func()
    logits, labels = torch.randn(2, 5, VOCABULARY), torch.randint(VOCABULARY, (2, 5))
    torch.compiler.reset()
    by_logits = torch.func.grad(lambda z: fastpref.token_logprobs(z, labels).square().sum())
    hold(torch.compile(by_logits, fullgraph=True, backend="eager")(logits), by_logits(logits))
