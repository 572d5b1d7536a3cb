"""The native operators from hidden states, called directly: what they refuse to read and write beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref_kernels import cpu

B, T, H, V = 2, 5, 16, 33
SCORING = (-100, True, 1.0, 1.0, None)


@pytest.fixture(autouse=True)
def native() -> None:
    if not cpu.native():
        pytest.skip("no compiler: there are no native operators")


def operands() -> dict[str, Any]:
    return {
        "hidden": torch.randn(B, T, H),
        "weight": torch.randn(V, H),
        "bias": torch.randn(V),
        "labels": torch.randint(V, (B, T)),
        "store": torch.empty(B * (T - 1), V),
        "chunk_rows": None,
    }


def forward(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, store: Tensor, chunk_rows: Any) -> Any:
    arguments = (hidden, weight, bias, labels, None, store, *SCORING, 0, None, chunk_rows, None)
    return torch.ops.fastpref.linear_logprobs(*arguments)


def gradients(given: dict[str, Any], norm: Tensor) -> dict[str, Any]:
    zeros = {f"d_{name}": torch.zeros_like(given[name]) for name in ("hidden", "weight", "bias")}
    return {**given, "grad": torch.ones(B, T - 1), "grad_entropy": None, "norm": norm, **zeros}


def backward_(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    store: Tensor,
    chunk_rows: Any,
    grad: Any,
    grad_entropy: Any,
    norm: Tensor,
    d_hidden: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> None:
    shares = torch.empty(0, B, T - 1)
    operands = (grad, grad_entropy, hidden, weight, bias, labels, None, norm, store, shares)
    torch.ops.fastpref.linear_logprobs_backward_(
        *operands, d_hidden, d_weight, d_bias, True, *SCORING, None, chunk_rows, None
    )


WRONG_OPERANDS: list[tuple[str, Any, str]] = [
    ("hidden", torch.randn(T, H), "hidden must be"),
    ("hidden", torch.randn(B, T, H).double(), "of one dtype"),
    ("weight", torch.randn(V, H - 1), "hidden must be"),
    ("weight", torch.randn(V * H), "hidden must be"),
    ("bias", torch.randn(V - 1), "bias must be"),
    ("bias", torch.randn(V).double(), "bias must be"),
    ("labels", torch.zeros(B, T + 4, dtype=torch.long), "labels must be"),
    ("labels", torch.zeros(B * T, dtype=torch.long), "labels must be"),
    ("store", torch.empty(B * (T - 1) - 1, V), "store must"),
    ("store", torch.empty(B * (T - 1), V - 1), "store must"),
    ("store", torch.empty(V, B * (T - 1)).t(), "store must"),
    ("chunk_rows", 0, "chunk_rows must be"),
]
WRONG_GRADIENTS: list[tuple[str, Any, str]] = [
    ("grad", None, "gradient of the log-probs or of the entropy"),
    ("grad", torch.ones(1, 1), "gradient of the log-probs or of the entropy"),
    ("grad_entropy", torch.ones(B, T), "gradient of the log-probs or of the entropy"),
    ("grad_entropy", torch.ones(B, T - 1), "norm must be 4 planes"),
    ("norm", torch.ones(2, B, T - 1), "norm must be 3 planes"),
    ("norm", torch.ones(3, B, T), "norm must be 3 planes"),
    ("d_hidden", torch.zeros(B, H, T).mT, "contiguous features"),
    ("d_hidden", torch.zeros(B, 1, H).expand(B, T - 1, H), "hidden's gradient must be"),
    ("d_weight", torch.zeros(V, H + 1), "weight's gradient must be"),
    ("d_bias", torch.zeros(V + 1), "bias's gradient must be"),
]


@pytest.mark.parametrize(("name", "wrong", "words"), WRONG_OPERANDS)
def test_a_wrong_operand_is_refused(name: str, wrong: Any, words: str) -> None:
    given = operands()
    with pytest.raises(RuntimeError, match=words):
        forward(**{**given, name: wrong})
    norm = forward(**given)[1]
    with pytest.raises(RuntimeError, match=words):
        backward_(**{**gradients(given, norm), name: wrong})


@pytest.mark.parametrize(("name", "wrong", "words"), WRONG_GRADIENTS)
def test_a_wrong_gradient_is_refused(name: str, wrong: Any, words: str) -> None:
    given = operands()
    right = gradients(given, forward(**given)[1])
    backward_(**right)
    assert all(right[name].abs().max() > 0 for name in ("d_hidden", "d_weight", "d_bias"))
    with pytest.raises(RuntimeError, match=words):
        backward_(**{**right, name: wrong})
