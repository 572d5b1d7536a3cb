"""Run every kernel, forward and backward, on few rows, so that a sanitizer takes seconds.

compute-sanitizer --tool memcheck python benchmarks/smallest.py [DEVICE]

The vocabulary is three of the widest blocks and part of one, so that every main loop and every tail runs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref._core.results import STATISTICS
from fastpref.testing.evaluate import cast, evaluate, move
from fastpref.testing.loss_cases import loss_cases

B, T, V, H = 2, 4, 3 * 4096 + 37, 16


def main(device: str = "cuda") -> None:
    """Run log-probs in three dtypes with and without statistics, both modes from hidden states, and every loss."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, :2] = -100

    def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def run(function: Any, leaves: dict[str, Tensor], dtype: torch.dtype, **constants: Any) -> None:
        evaluate(function, move(cast(leaves, dtype), device), move(cast(constants, dtype), device))

    head = drawn(hidden=(B, T, H), weight=(V, H))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for stats in ((), STATISTICS):
            logits = drawn(logits=(B, T, V))
            run(fastpref.token_logprobs, logits, dtype, labels=labels, stats=stats)
            run(fastpref.sequence_logprobs, logits, dtype, labels=labels, stats=stats, softcap=5.0)
            for mode in ("save", "recompute") if dtype != torch.float16 else ("recompute",):
                biased = {**head, **drawn(bias=(V,))}
                run(fastpref.linear_token_logprobs, biased, dtype, labels=labels, mode=mode, stats=stats)
                told: dict[str, Any] = {"scored_rows": labels.numel(), "filter_eps": 1e-3}
                run(fastpref.linear_token_logprobs, biased, dtype, labels=labels, mode=mode, **told)
        run(fastpref.linear_dpo_loss, head, dtype, labels=labels, reference_free=True)
    for case in loss_cases():
        leaves, constants = case.draw(generator)
        run(case.function, leaves, torch.float32, **constants)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
