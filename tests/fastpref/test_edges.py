"""Edges that have one right answer: a table, one row for each, in the words of the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import dpo_loss, pairwise_reward_loss, reference, sequence_logprobs, token_logprobs
from tests.tolerance import ALL_STATS, assert_matches_reference

Check = Callable[[torch.dtype], None]
EDGES: dict[str, Check] = {}
V = 45


def edge(text: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        EDGES[text] = check
        return check

    return add


def make(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    shape = shape or (3, 6, V)
    return (3 * torch.randn(shape)).to(dtype), torch.randint(shape[-1], shape[:-1])


def both(logits: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs per token and per sequence, and the gradient of their sum and the entropy's."""
    leaf = logits.clone().requires_grad_()
    tokens = token_logprobs(leaf, labels, stats=("entropy",), **options)
    sequences = sequence_logprobs(leaf, labels, **options)
    (tokens.logprobs.sum() + tokens.entropy.sum() + sequences.sum()).backward()
    assert leaf.grad is not None
    return tokens.logprobs.detach(), sequences.detach(), leaf.grad


def others_unharmed(logits: Tensor, labels: Tensor, harmed: int) -> None:
    """Check that the log-prob of one sequence is NaN and that the others keep every bit."""
    _, sequences, gradient = both(logits, labels)
    kept = [i for i in range(logits.shape[0]) if i != harmed]
    _, alone, alone_gradient = both(logits[kept], labels[kept])
    assert sequences[harmed].isnan()
    assert torch.equal(sequences[kept], alone)
    assert torch.equal(gradient[kept], alone_gradient)
    assert gradient[kept].isfinite().all()


def one_bad_logit(dtype: torch.dtype, value: float) -> None:
    """Check that `value` in a scored row, not at its label, harms only its own sequence."""
    for column in (0, 17, V - 1):
        logits, labels = make(dtype)
        labels[1, 3] = 5
        logits[1, 2, column] = value
        others_unharmed(logits, labels, 1)


@edge("every label of a sequence is ignore_index: logp 0, gradient exactly 0, never NaN")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype)
    labels[1] = -100
    logits[1] = math.nan
    tokens, sequences, gradient = both(logits, labels)
    assert (tokens[1] == 0).all()
    assert sequences[1] == 0
    assert (gradient[1] == 0).all()
    assert gradient.isfinite().all()
    leaf = logits.requires_grad_()
    mean = sequence_logprobs(leaf, labels, reduction="mean")
    mean.sum().backward()
    assert mean[1] == 0
    assert leaf.grad is not None
    assert (leaf.grad[1] == 0).all()


@edge("logits −inf at a token that is not the label: probability 0, gradient 0 there")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype)
    dead = torch.rand(logits.shape) < 0.4
    dead[:, :-1].scatter_(-1, labels[:, 1:, None], False)
    logits[dead] = -math.inf
    tokens, _, gradient = both(logits, labels)
    assert tokens.isfinite().all()
    assert (gradient[dead] == 0).all()
    assert gradient.isfinite().all()
    stats = ("lse", "entropy", "is_top1", "log_sum_sq_probs")
    assert_matches_reference("token_logprobs", logits, labels, stats=stats)
    # The same as a vocabulary without them.
    row = logits[0, 0]
    label = (~dead[0, 0])[: labels[0, 1]].sum()
    alone = token_logprobs(row[~dead[0, 0]][None], label[None], shift=False, stats=stats)
    whole = token_logprobs(row[None], labels[0, 1:2], shift=False, stats=stats)
    for one, other in zip(alone, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@edge("logits filled with the dtype's lowest number, the label and the first tokens among them")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype, 2, 4, 160)
    logits[:, :, :-2] = torch.finfo(dtype).min
    labels[:] = 3
    if dtype == torch.float16:  # 65504 below the top is not so low
        assert_matches_reference("token_logprobs", logits, labels)
        return
    found = token_logprobs(logits, labels, stats=("entropy", "lse"))
    truth = reference.token_logprobs(logits.double(), labels, stats=("entropy", "lse"))
    for ours, wanted in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-6)
    _, _, gradient = both(logits, labels)
    assert gradient.isfinite().all()


@edge("logits −inf at every token but the label: logp 0")
def _(dtype: torch.dtype) -> None:
    logits = torch.full((1, 2, V), -math.inf, dtype=dtype)
    logits[..., 7] = 1.5
    tokens, sequences, gradient = both(logits, torch.full((1, 2), 7))
    assert tokens.item() == 0
    assert sequences.item() == 0
    assert (gradient == 0).all()


@edge("logits −inf at the label: logp −inf; gradient finite or NaN-free elsewhere")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype)
    logits[1, 2, labels[1, 3]] = -math.inf
    tokens, sequences, gradient = both(logits, labels)
    assert tokens[1, 2] == -math.inf
    assert sequences[1] == -math.inf
    assert not gradient.isnan().any()
    tokens[1, 2] = 0
    assert tokens.isfinite().all()
    assert sequences[[0, 2]].isfinite().all()
    assert_matches_reference("token_logprobs", logits, labels)


@edge("logits −inf at the label of a token of weight 0: it counts for nothing")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype, 2, 6, V)
    labels[1, 4:] = -100
    for reduction in ("sum", "mean"):
        found = []
        for value in (0.0, -math.inf):
            logits[0, 4, labels[0, 5]] = value  # past the three tokens that the pair shares
            leaf = logits.clone().requires_grad_()
            logps = sequence_logprobs(leaf, labels, ld_alpha=0.0, reduction=reduction)
            (gradient,) = torch.autograd.grad(logps.sum(), leaf)
            torch.testing.assert_close(
                logps, reference.sequence_logprobs(leaf, labels, ld_alpha=0.0, reduction=reduction)
            )
            found.append((logps.detach(), gradient))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        assert found[0][0].isfinite().all()
        assert not found[0][1][0, 3:].any()


@edge("NaN in a scored row: NaN for that sequence alone; other sequences unharmed")
def _(dtype: torch.dtype) -> None:
    one_bad_logit(dtype, math.nan)


@edge("+inf in a scored row: NaN for that sequence alone; other sequences unharmed")
def _(dtype: torch.dtype) -> None:
    one_bad_logit(dtype, math.inf)


@edge("+inf or NaN at the label: NaN for that sequence alone, not 0")
def _(dtype: torch.dtype) -> None:
    for value in (math.inf, math.nan):
        logits, labels = make(dtype)
        logits[1, 2, labels[1, 3]] = value
        others_unharmed(logits, labels, 1)
        assert token_logprobs(logits, labels)[1, 2].isnan()


@edge("a row that is all −inf: NaN")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype)
    logits[1, 2] = -math.inf
    others_unharmed(logits, labels, 1)
    assert token_logprobs(logits, labels)[1, 2].isnan()


@edge("NaN, +inf or NaN-making rows beside packed sequences: their sequence alone")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype, 12, V)
    bounds = torch.tensor([0, 4, 4, 9, 12])
    clean = sequence_logprobs(logits, labels, cu_seqlens=bounds)
    logits[5, 3] = math.nan
    harmed = sequence_logprobs(logits, labels, cu_seqlens=bounds)
    assert harmed[2].isnan()
    assert torch.equal(harmed[[0, 1, 3]], clean[[0, 1, 3]])


@edge("NaN in a row that is not scored: never read, no effect")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype)
    labels[:, 1:3] = -100
    clean = both(logits, labels)
    logits[:, :2] = math.nan
    logits[:, -1] = math.inf
    for before, after in zip(clean, both(logits, labels), strict=True):
        assert torch.equal(before, after)


@edge("label outside [0, V) and not ignore_index: IndexError naming the position")
def _(dtype: torch.dtype) -> None:
    for bad in (V, -1, -101, 2**31 + 5, -(2**40)):
        logits, labels = make(dtype)
        labels[2, 4] = bad
        for function in (token_logprobs, sequence_logprobs):
            with pytest.raises(IndexError, match=rf"{bad}\b.*\[2, 3\].*\[0, {V}\)"):
                function(logits, labels)
            with pytest.raises(IndexError, match=rf"{bad}\b.*\[2, 4\]"):
                function(logits, labels, shift=False)


@edge("a label that the shift discards: never checked")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype)
    wanted = both(logits, labels)
    labels[:, 0] = 10**9
    for before, after in zip(wanted, both(logits, labels), strict=True):
        assert torch.equal(before, after)
    packed, bounds = logits[0], torch.tensor([0, 3, 6])
    first, other = labels[0].clone(), labels[0].clone()
    first[[0, 3]], other[[0, 3]] = 1, -(10**9)
    assert torch.equal(
        sequence_logprobs(packed, first, cu_seqlens=bounds), sequence_logprobs(packed, other, cu_seqlens=bounds)
    )


@edge("V = 1: logp 0, entropy 0, gradient 0")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype, 2, 4, 1)
    tokens, sequences, gradient = both(logits, labels)
    assert (tokens == 0).all()
    assert (sequences == 0).all()
    assert (gradient == 0).all()
    assert_matches_reference("token_logprobs", logits, labels, stats=ALL_STATS)


@edge("T = 1: with the shift nothing is scored; without it one token is")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype, 3, 1, V)
    tokens, sequences, gradient = both(logits, labels)
    assert tokens.shape == (3, 0)
    assert sequences.tolist() == [0, 0, 0]
    assert (gradient == 0).all()
    assert sequence_logprobs(logits, labels, reduction="mean").tolist() == [0, 0, 0]
    assert_matches_reference("sequence_logprobs", logits, labels, shift=False, stats=ALL_STATS)


@edge("B = 0 and T = 0 work")
def _(dtype: torch.dtype) -> None:
    for batch, time in ((0, 5), (0, 1), (0, 0), (3, 0)):
        logits, labels = torch.empty(batch, time, V, dtype=dtype), torch.empty(batch, time, dtype=torch.long)
        tokens, sequences, gradient = both(logits, labels)
        assert tokens.shape == (batch, max(time - 1, 0))
        assert sequences.tolist() == [0] * batch
        assert gradient.shape == logits.shape
        unshifted = token_logprobs(logits, labels, shift=False, stats=ALL_STATS)
        assert {value.shape for value in unshifted} == {(batch, time)}


@edge("N = 0, packed, with no sequence or with empty ones, works")
def _(dtype: torch.dtype) -> None:
    for bounds in ([0], [0, 0], [0, 0, 0]):
        logits = torch.empty(0, V, dtype=dtype, requires_grad=True)
        cu_seqlens = torch.tensor(bounds)
        for reduction in ("sum", "mean"):
            labels = torch.empty(0, dtype=torch.long)
            logps = sequence_logprobs(logits, labels, cu_seqlens=cu_seqlens, reduction=reduction)
            logps.sum().backward()
            assert logps.tolist() == [0] * (len(bounds) - 1)


@edge("a mean over nothing is 0")
def _(dtype: torch.dtype) -> None:
    nothing = torch.empty(0, dtype=dtype, requires_grad=True)
    loss = dpo_loss(nothing, nothing, nothing, nothing).loss + pairwise_reward_loss(nothing, nothing)
    loss.backward()
    assert loss.item() == 0
    assert nothing.grad is not None
    assert nothing.grad.shape == (0,)


@edge("logits held where offsets pass 2³¹ elements: 64-bit offsets read and write the right rows")
def _(dtype: torch.dtype) -> None:
    if dtype.itemsize > 2:
        return  # the same code with larger elements, and 4 GiB of address space are enough
    # Address space only: of the pages between the rows none is ever touched, unless they are poisoned.
    torch.use_deterministic_algorithms(False)
    rows, labels = make(dtype, 1, 3, V)
    base = torch.empty(2**31 + V, dtype=dtype)
    logits = base.as_strided((1, 3, V), (0, 2**30, 1))
    logits.copy_(rows)
    wanted = both(rows, labels, shift=False)
    assert torch.equal(token_logprobs(logits, labels, shift=False), wanted[0])
    held = logits.requires_grad_()
    result = token_logprobs(held, labels, shift=False)
    gradient = torch.autograd.grad(result.sum(), held)[0]
    fresh = torch.autograd.grad(token_logprobs(rows.requires_grad_(), labels, shift=False).sum(), rows)[0]
    assert torch.equal(gradient, fresh)


@edge("with softcap, the edges hold for the transformed logit: a capped −inf is finite")
def _(dtype: torch.dtype) -> None:
    logits, labels = make(dtype)
    logits[1, 2, labels[1, 3]] = -math.inf
    logits[0, 1, (labels[0, 2] + 1) % V] = math.inf
    tokens, _, gradient = both(logits, labels, softcap=2.0)
    assert tokens.isfinite().all()
    assert gradient.isfinite().all()
    assert_matches_reference("token_logprobs", logits, labels, softcap=2.0, stats=ALL_STATS)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("text", EDGES)
def test_edge(text: str, dtype: torch.dtype) -> None:
    EDGES[text](dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("unpoisoned")
def test_gradient_of_more_than_two_to_the_31_elements() -> None:
    """A gradient of 2³¹ elements or more is right. It is the only tensor that has to be that large."""
    if _available_gibibytes() < 8:
        pytest.skip("needs 8 GiB of free memory for a 4 GiB gradient")
    vocabulary, time = 2**16 + 1, 2**15
    row = torch.randn(1, 1, vocabulary).bfloat16()
    labels = torch.full((1, time), -100)
    labels[0, [0, -1]] = torch.tensor([3, vocabulary - 1])
    logits = row.expand(1, time, vocabulary).detach().requires_grad_()
    logps = token_logprobs(logits, labels, shift=False)
    gradient = torch.autograd.grad(logps.sum(), logits)[0]
    ends = logits.detach()[:, [0, -1]].clone().requires_grad_()
    wanted = token_logprobs(ends, labels[:, [0, -1]], shift=False)
    assert torch.equal(logps[:, [0, -1]], wanted)
    assert torch.equal(gradient[:, [0, -1]], torch.autograd.grad(wanted.sum(), ends)[0])
    # Of the rows that are not scored: the first, the one in the middle, and the last two, astride 2³¹.
    assert not gradient[:, [1, time // 2, time - 3, time - 2]].any()


def _available_gibibytes() -> float:
    try:
        with open("/proc/meminfo") as lines:
            kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0.0
    return kibibytes / 2**20


LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
PACKED = torch.zeros(6, 5), torch.zeros(6, dtype=torch.long)
BOUNDS = torch.tensor([0, 2, 6])
# What is wrong: the function, its arguments, the error, and what its text must hold: the argument, given and wanted.
REFUSED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "logits of integers": ("token", (LOGITS.long(), LABELS), {}, TypeError, ("logits", "torch.int64", "fp32")),
    "logits no tensor": ("token", ([[1.0]], LABELS), {}, TypeError, ("logits", "list", "tensor")),
    "logits of one dimension": ("token", (LOGITS[0, 0], LABELS[0, 0]), {}, ValueError, ("logits", "(5,)", "(B, T, V)")),
    "logits of four": ("token", (LOGITS[None], LABELS[None]), {}, ValueError, ("logits", "(1, 2, 3, 5)", "(B, T, V)")),
    "V = 0": ("token", (LOGITS[..., :0], LABELS), {}, ValueError, ("logits", "(2, 3, 0)", "V > 0")),
    "labels of floats": ("token", (LOGITS, LABELS.float()), {}, TypeError, ("labels", "torch.float32", "int64")),
    "labels shifted already": ("token", (LOGITS, LABELS[:, 1:]), {}, ValueError, ("labels", "(2, 2)", "(2, 3)")),
    "labels flattened": ("token", (LOGITS, LABELS.view(-1)), {}, ValueError, ("labels", "(6,)", "(2, 3)")),
    "labels elsewhere": ("token", (LOGITS, LABELS.to("meta")), {}, ValueError, ("labels", "meta", "cpu")),
    "temperature 0": ("token", (LOGITS, LABELS), {"temperature": 0.0}, ValueError, ("temperature", "0.0", "above 0")),
    "temperature NaN": ("token", (LOGITS, LABELS), {"temperature": math.nan}, ValueError, ("temperature", "nan")),
    "temperature a string": ("token", (LOGITS, LABELS), {"temperature": "x"}, TypeError, ("temperature", "'x'")),
    "temperature None": ("token", (LOGITS, LABELS), {"temperature": None}, TypeError, ("temperature",)),
    "logit_scale −1": ("token", (LOGITS, LABELS), {"logit_scale": -1.0}, ValueError, ("logit_scale", "-1.0", "above")),
    "softcap 0": ("token", (LOGITS, LABELS), {"softcap": 0.0}, ValueError, ("softcap", "0.0", "above 0")),
    "softcap inf": ("token", (LOGITS, LABELS), {"softcap": math.inf}, ValueError, ("softcap", "inf", "finite")),
    "a statistic unknown": ("token", (LOGITS, LABELS), {"stats": ("kl",)}, ValueError, ("stats", "'kl'", "'entropy'")),
    "a statistic twice": ("token", (LOGITS, LABELS), {"stats": ("lse", "lse")}, ValueError, ("stats", "lse", "repeat")),
    "stats a string": ("token", (LOGITS, LABELS), {"stats": "lse"}, TypeError, ("stats", "'lse'", "tuple")),
    "reduction none": ("sequence", (LOGITS, LABELS), {"reduction": "none"}, ValueError, ("reduction", "none", "mean")),
    "cu_seqlens of floats": (
        "sequence",
        PACKED,
        {"cu_seqlens": BOUNDS.float()},
        TypeError,
        ("cu_seqlens", "torch.float32", "int32"),
    ),
    "cu_seqlens of two dimensions": (
        "sequence",
        PACKED,
        {"cu_seqlens": BOUNDS[None]},
        ValueError,
        ("cu_seqlens", "(1, 3)", "(S+1,)"),
    ),
    "cu_seqlens empty": ("sequence", PACKED, {"cu_seqlens": BOUNDS[:0]}, ValueError, ("cu_seqlens", "(0,)", "(S+1,)")),
    "cu_seqlens elsewhere": (
        "sequence",
        PACKED,
        {"cu_seqlens": BOUNDS.to("meta")},
        ValueError,
        ("cu_seqlens", "meta", "cpu"),
    ),
    "cu_seqlens with a batch": (
        "sequence",
        (LOGITS, LABELS),
        {"cu_seqlens": BOUNDS},
        ValueError,
        ("cu_seqlens", "(2, 3, 5)", "(1, N, V)"),
    ),
    "ld_alpha a string": ("sequence", (LOGITS, LABELS), {"ld_alpha": "x"}, TypeError, ("ld_alpha", "'x'", "finite")),
    "ld_alpha NaN": ("sequence", (LOGITS, LABELS), {"ld_alpha": math.nan}, ValueError, ("ld_alpha", "nan", "finite")),
    "shared_lengths without ld_alpha": (
        "sequence",
        (LOGITS, LABELS),
        {"shared_lengths": LABELS[:, 0]},
        ValueError,
        ("shared_lengths", "ld_alpha"),
    ),
    "shared_lengths of another number": (
        "sequence",
        (LOGITS, LABELS),
        {"ld_alpha": 0.5, "shared_lengths": LABELS[:1, 0]},
        ValueError,
        ("shared_lengths", "(1,)", "(2,)"),
    ),
}


@pytest.mark.parametrize(("name", "arguments", "options", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(
    name: str, arguments: tuple[Any, ...], options: dict[str, Any], kind: Any, words: tuple[str, ...]
) -> None:
    function = {"token": token_logprobs, "sequence": sequence_logprobs}[name]
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    for word in words:
        assert word in str(caught.value)
