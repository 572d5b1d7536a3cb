"""Float32 products of ours are exact, whatever precision the process has set, and leave that setting as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastpref
from fastpref_kernels import linear, ops, precision

HAS_BACKENDS = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # since torch 2.9


def lower_for_backends() -> None:
    if not HAS_BACKENDS:
        pytest.skip("this torch has no precision of a backend")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def accumulate_in_float16() -> None:
    torch.backends.cuda.matmul.allow_fp16_accumulation = True


SETTINGS: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "each backend": lower_for_backends,
    "float16 sums": accumulate_in_float16,
}
EXACT = {"highest", "ieee", False}
lowered = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


def problem() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(2, 40, 256), torch.randn(1031, 256) / 5
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(1031, (2, 40))


def every_product(hidden: Tensor, weight: Tensor, labels: Tensor) -> Iterator[Tensor]:
    """Yield what each function with products of its own gives, and the gradients."""
    for mode in ("save", "recompute"):
        value = fastpref.linear_token_logprobs(hidden, weight, labels, mode=mode)
        yield value
        yield from torch.autograd.grad(value.sum(), (hidden, weight))
    result = fastpref.linear_dpo_loss(hidden, weight, labels, reference_free=True)
    yield result.chosen_logps
    yield from torch.autograd.grad(result.loss, (hidden, weight))
    yield from fastpref.gae(hidden[..., 0], hidden[..., 1], labels > 100)


@lowered
def test_every_product_is_exact(setting: str) -> None:
    """On a processor that has fast products of bfloat16 it would not be; elsewhere the setting changes nothing."""
    given = problem()
    exact = [value.detach() for value in every_product(*given)]
    SETTINGS[setting]()
    for value, wanted in zip(every_product(*given), exact, strict=True):
        assert torch.equal(value.detach(), wanted)


@lowered
def test_every_library_product_is_made_at_full_precision(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's library would read at each product; whose arithmetic it is does not matter here."""
    seen: list[tuple[Any, ...]] = []

    def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        seen.append(precision._setting())
        linear.library_product(out, a, b, add)

    backend = linear.library_backend(linear.fold, linear.fold_backward)._replace(product=product)
    hidden, weight, labels = (value.detach() for value in problem())
    scoring = (-100, True, 1.0, 1.0, None)
    SETTINGS[setting]()
    before = precision._setting()
    with torch.autocast("cpu", torch.bfloat16):
        chunking = (None, None, None)
        logps, norm, *_ = linear.linear_logprobs(
            backend, hidden, weight, None, labels, None, None, *scoring, 0, *chunking
        )
        given = (torch.ones_like(logps), None, hidden, weight, None, labels, None, norm, None, hidden.new_zeros(0))
        totals = (torch.empty_like(hidden), torch.empty_like(weight), None)
        linear.linear_logprobs_backward_(backend, *given, *totals, True, *scoring, *chunking)
    assert len(seen) == 4
    assert {value for setting in seen for value in setting} <= EXACT
    assert precision._setting() == before


@lowered
def test_the_setting_is_as_it_was(setting: str) -> None:
    SETTINGS[setting]()
    before = precision._setting()
    list(every_product(*problem()))
    assert precision._setting() == before
    with pytest.raises(ZeroDivisionError), precision.full_float32():
        raise ZeroDivisionError
    assert precision._setting() == before
    hidden, weight, labels = problem()
    labels[1, 3] = len(weight)
    with pytest.raises(IndexError):
        fastpref.linear_token_logprobs(hidden, weight, labels)
    assert precision._setting() == before


@lowered
def test_threads_that_overlap_leave_it_as_it_was(setting: str) -> None:
    """The first to come is the first to go, which is when another's product is still to be made."""
    SETTINGS[setting]()
    before, seen = precision._setting(), []
    both, first_left = threading.Barrier(2), threading.Event()

    def first() -> None:
        with precision.full_float32():
            both.wait()
        first_left.set()

    def second() -> None:
        with precision.full_float32():
            both.wait()
            first_left.wait()
            seen.append(precision._setting())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen[0]) <= EXACT
    assert precision._setting() == before


@pytest.mark.skipif(not HAS_BACKENDS, reason="this torch has no precision of a backend")
def test_a_backend_goes_on_taking_its_precision_from_above(monkeypatch: pytest.MonkeyPatch) -> None:
    backends, matmul = torch.backends, torch.backends.cuda.matmul
    matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    backends.fp32_precision = "tf32"
    try:
        assert matmul.fp32_precision == "tf32"
        with precision.full_float32():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
    finally:
        backends.fp32_precision = "none"


def test_a_setting_that_comes_in_the_middle_is_kept_and_without_effect() -> None:
    with precision.full_float32():
        torch.set_float32_matmul_precision("high")
        with precision.full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


def test_a_setting_that_comes_in_the_middle_leaves_the_others_as_they_were() -> None:
    """What a second call then finds is in part what the first has set, and is not the process's."""
    before = precision._setting()
    assert True in before  # a process lets a GPU round parts of a sum, unless it is told otherwise
    with precision.full_float32():
        torch.backends.cuda.matmul.allow_fp16_accumulation = True
        with precision.full_float32():
            assert set(precision._setting()) <= EXACT
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert precision._setting() == before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction_split_k"),
    reason="this torch cannot be told to split no sum",
)
def test_a_process_that_splits_no_sum_stays_so() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    try:
        before = precision._setting()
        with precision.full_float32():
            assert not matmul.allow_bf16_reduced_precision_reduction
            assert not matmul.allow_bf16_reduced_precision_reduction_split_k
            assert matmul.allow_fp16_reduced_precision_reduction_split_k
        assert precision._setting() == before
    finally:
        matmul.allow_bf16_reduced_precision_reduction = True


def test_a_narrow_gradient_is_rounded_once() -> None:
    """It is a product whose result has 16 bits, of which a GPU may by default round each part of a sum."""
    seen: list[tuple[Any, ...]] = []

    def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        if out.dtype == torch.bfloat16:
            seen.append(precision._setting())
        linear.library_product(out, a, b, add)

    backend = linear.library_backend(linear.fold, linear.fold_backward)._replace(product=product)
    hidden, weight, labels = (value.detach() for value in problem())
    given = (hidden.bfloat16(), weight.bfloat16(), None, labels, None)
    scoring, chunking = (-100, True, 1.0, 1.0, None), (None, None, None)
    before = precision._setting()
    logps, norm, shares, *_ = linear.linear_logprobs(backend, *given, None, *scoring, 0, *chunking)
    linear.linear_logprobs_backward(
        backend, torch.ones_like(logps), None, *given, norm, None, shares, [True, True, False],
        *[torch.bfloat16] * 3, *scoring, *chunking,
    )  # fmt: skip
    assert len(seen) == 1
    assert set(seen[0]) <= EXACT
    assert precision._setting() == before


@lowered
def test_compiled(setting: str) -> None:
    hidden, weight, labels = (value.detach() for value in problem())
    exact = fastpref.linear_token_logprobs(hidden, weight, labels)
    SETTINGS[setting]()
    before = precision._setting()
    compiled = torch.compile(fastpref.linear_token_logprobs, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight, labels), exact)
    assert precision._setting() == before


def test_no_operator_with_products_is_left_out() -> None:
    """An implementation that multiplies says its precision; these are the ones that do not multiply."""
    registered = {schema.partition("(")[0] for schema in ops._SCHEMAS}
    without = {
        "logprobs",
        "logprobs_backward",
        "logprobs_backward_",
        "shard_labels",
        "linear_finalize",
        "scaled_gradient",
    }
    implemented = {
        "linear_logprobs": linear.linear_logprobs,
        "linear_fold": linear.linear_fold,
        "linear_logprobs_backward": linear.linear_logprobs_backward_,
        "linear_logprobs_backward_": linear.linear_logprobs_backward_,
        "gae": ops.gae.gae,
    }
    assert registered - without - set(ops.LOSSES) == set(implemented)
    for function in implemented.values():
        assert function.__wrapped__.__name__ == function.__name__
