"""Training steps whose work on the host is counted: each is a forward, of which the caller runs the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpref
from fastpref.losses import Entry
from tests.gpu_stand_in import on_gpu
from tests.host_waits import Trace, host_trace
from tests.tolerance import ALL_STATS

TOKENS, FEATURES, VOCABULARY = 9, 16, 5000  # two tiles of the vocabulary
SCORED = (5, 3, 4, 6)  # labels of each sequence


class Batch(NamedTuple):
    """Two pairs, [chosen; rejected], on the device. Batches of other seeds differ by values alone."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    reference: Tensor
    boundaries: Tensor

    @classmethod
    def of(cls, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> Tensor:
            # In what models are trained in, whose products with float32 sums are operators that only a GPU has.
            return on_gpu(torch.randn(*shape, generator=generator).bfloat16().requires_grad_())

        labels = torch.full((len(SCORED), TOKENS), -100)
        for row, count in zip(labels, SCORED, strict=True):
            # The first label of a sequence is never scored, packed or not.
            places = 1 + torch.randperm(TOKENS - 1, generator=generator)[:count]
            row[places] = torch.randint(VOCABULARY, (count,), generator=generator)
        boundaries = torch.arange(len(SCORED) + 1) * TOKENS
        hidden, reference = parameter(len(SCORED), TOKENS, FEATURES), parameter(len(SCORED), TOKENS, FEATURES)
        head = parameter(VOCABULARY, FEATURES), parameter(VOCABULARY)
        return cls(hidden, *head, on_gpu(labels), reference, on_gpu(boundaries))

    def packed(self) -> dict[str, Tensor]:
        return {
            "hidden": self.hidden.flatten(0, 1), "weight": self.weight, "labels": self.labels.flatten(),
            "bias": self.bias, "cu_seqlens": self.boundaries,
        }  # fmt: skip

    def padded(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden, "weight": self.weight, "labels": self.labels, "bias": self.bias}

    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T + self.bias


# A step is (batch, options) -> a result with a gradient. The options are those a caller may add: scored_rows, or
# process_group.
Step = Callable[..., Tensor]


def _summed(made: Any) -> Tensor:
    """Return the sum of what log-probs, alone or with statistics, have a gradient of."""
    values = [made] if isinstance(made, Tensor) else list(made)
    return torch.stack([value.sum() for value in values if value.requires_grad]).sum()


def tokens(**fixed: Any) -> Step:
    """Log-probs of tokens, and all statistics that are differentiable."""

    def step(batch: Batch, **options: Any) -> Tensor:
        return _summed(fastpref.linear_token_logprobs(**batch.padded(), **fixed, **options))

    return step


def sequences(packed: bool = False, **fixed: Any) -> Step:
    """Log-probs of sequences."""

    def step(batch: Batch, **options: Any) -> Tensor:
        given = batch.packed() if packed else batch.padded()
        return _summed(fastpref.linear_sequence_logprobs(**given, **fixed, **options))

    return step


def dpo(packed: bool = False, ref_hidden: bool = False, **fixed: Any) -> Step:
    """DPO from hidden states, against a reference of zeros or the reference model's hidden states."""

    def step(batch: Batch, **options: Any) -> Tensor:
        given = batch.packed() if packed else batch.padded()
        reference: dict[str, Any] = {"reference_free": True}
        if ref_hidden:
            states = batch.reference.flatten(0, 1) if packed else batch.reference
            reference = {"ref_hidden": states, "ref_weight": batch.weight, "ref_bias": batch.bias}
        return fastpref.linear_dpo_loss(**given, **reference, **fixed, **options).loss

    return step


def groups(packed: bool = False, **fixed: Any) -> Step:
    """A loss of groups of the caller's own."""

    def step(batch: Batch, **options: Any) -> Tensor:
        given = batch.packed() if packed else batch.padded()
        return fastpref.linear_preference_loss(
            loss_fn=lambda logps: -torch.nn.functional.logsigmoid(logps[:, 0] - logps[:, 1]), group_size=2,
            **given, **fixed, **options,
        ).loss  # fmt: skip

    return step


def from_logits(function: str, packed: bool = False, **fixed: Any) -> Step:
    """Log-probs of tokens or sequences from logits."""

    def step(batch: Batch, **options: Any) -> Tensor:
        logits, labels, more = batch.logits(), batch.labels, {}
        if packed:
            logits, labels, more = logits.flatten(0, 1), labels.flatten(), {"cu_seqlens": batch.boundaries}
        return _summed(getattr(fastpref, function)(logits, labels, **more, **fixed, **options))

    return step


CHUNK = 9  # rows: no two pairs fit

LINEAR: dict[str, Step] = {
    "tokens, save": tokens(mode="save"),
    "tokens, recompute": tokens(mode="recompute"),
    "tokens, recompute in chunks": tokens(mode="recompute", chunk_rows=CHUNK),
    "tokens, filtered, save": tokens(mode="save", filter_eps=1e-4),
    "tokens, filtered, recompute": tokens(mode="recompute", filter_eps=1e-4, stats=("dropped_mass",)),
    "tokens, gradient of the entropy": tokens(stats=("entropy",)),
    "tokens, every statistic": tokens(stats=ALL_STATS),
    "sequences": sequences(),
    "sequences, mean": sequences(reduction="mean"),
    "sequences, packed": sequences(packed=True),
    "sequences, packed, LD": sequences(packed=True, ld_alpha=0.3),
    "DPO": dpo(),
    "DPO, reference's states": dpo(ref_hidden=True),
    "DPO, packed": dpo(packed=True),
    "DPO, packed, reference's states": dpo(packed=True, ref_hidden=True),
    "DPO, statistics": dpo(stats=("entropy", "is_top1")),
    "DPO, filtered": dpo(filter_eps=1e-4),
    "DPO, LD": dpo(ld_alpha=0.3),
    "DPO, lengths": dpo(loss_type="simpo"),
    "DPO, loss of each pair": dpo(reduction="none"),
    "DPO, a loss that mixes pairs": dpo(loss_type="aot"),
    "DPO, recompute": dpo(mode="recompute"),
    "groups": groups(),
    "groups, mean": groups(average_logps=True),
}
# Several chunks: the host must know the rows of each sequence, and not their number alone.
CHUNKED: dict[str, Step] = {
    "DPO in chunks": dpo(chunk_rows=CHUNK),
    "DPO in chunks, reference's states": dpo(chunk_rows=CHUNK, ref_hidden=True),
    "DPO in chunks, packed": dpo(chunk_rows=CHUNK, packed=True),
    "DPO in chunks, statistics": dpo(chunk_rows=CHUNK, stats=("entropy", "is_top1")),
    "DPO in chunks, filtered": dpo(chunk_rows=CHUNK, filter_eps=1e-4),
    "DPO in chunks, means": dpo(chunk_rows=CHUNK, average_logps=True),
    "groups in chunks": groups(chunk_rows=CHUNK),
    "groups in chunks, packed": groups(chunk_rows=CHUNK, packed=True),
}
LOGITS: dict[str, Step] = {
    "tokens from logits": from_logits("token_logprobs"),
    "tokens from logits, statistics": from_logits("token_logprobs", stats=ALL_STATS),
    "tokens from logits, in place": from_logits("token_logprobs", inplace_backward=True),
    "sequences from logits": from_logits("sequence_logprobs"),
    "sequences from logits, mean, statistics": from_logits("sequence_logprobs", reduction="mean", stats=("entropy",)),
    "sequences from logits, LD": from_logits("sequence_logprobs", ld_alpha=0.3),
    "sequences from logits, packed": from_logits("sequence_logprobs", packed=True),
    "sequences from logits, packed, LD": from_logits("sequence_logprobs", packed=True, ld_alpha=0.3),
}
# What is run again with the vocabulary on the ranks of a group.
SHARDED = (
    "tokens, save", "tokens, recompute", "tokens, filtered, save", "tokens, every statistic", "sequences, packed, LD",
    "DPO", "DPO, reference's states", "DPO in chunks", "groups",
)  # fmt: skip
SHARDED_LOGITS = ("tokens from logits", "tokens from logits, statistics", "sequences from logits, packed, LD")


def loss_step(entry: Entry, seed: int = 0) -> Callable[[], Any]:
    """A call of a loss on the example that its row in the table has."""
    tensors, options = entry.example(torch.Generator().manual_seed(seed), 8)
    given = [on_gpu(x.requires_grad_(x.is_floating_point())) for x in tensors]
    moved = {name: on_gpu(x) if isinstance(x, Tensor) else x for name, x in options.items()}
    selected = getattr(entry, "options", {})

    def call() -> Any:
        result = entry.function(*given, **moved, **selected)
        return result[0] if isinstance(result, tuple) else result  # the loss, or what is like one

    return call


def both(step: Callable[[], Any]) -> tuple[Trace, Trace]:
    """Return what the host does in a forward and in its backward, the second time, which finds what the first kept."""
    traces: list[Trace] = []
    for _ in range(2):
        with host_trace() as forward:
            result = step()
        with host_trace() as backward:
            if result.requires_grad:
                result.backward(torch.ones_like(result))
        traces += forward, backward
    return traces[2], traces[3]
