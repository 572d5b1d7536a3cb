"""Every kernel once, forward and backward, on shapes so small that a sanitizer is done with them in seconds.

compute-sanitizer --tool memcheck python benchmarks/smallest.py [DEVICE]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref.losses import TABLE

STATS = ("lse", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
B, T, V, H = 2, 4, 37, 16  # no block is full


def main(device: str = "cuda") -> None:
    """Log-probs in three dtypes with and without statistics, both modes from hidden states, every loss, and GAE."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (B, T), generator=generator).to(device)
    labels[0, :2] = -100

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    def backward(result: Any) -> None:
        fields = [result] if isinstance(result, Tensor) else list(result)
        sum(field.float().sum() for field in fields if field.requires_grad).backward()  # type: ignore[union-attr]

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for stats in ((), STATS):
            backward(fastpref.token_logprobs(leaf(B, T, V, dtype=dtype), labels, stats=stats))
            backward(fastpref.sequence_logprobs(leaf(B, T, V, dtype=dtype), labels, stats=stats, softcap=5.0))
            for mode in ("save", "recompute") if dtype != torch.float16 else ("recompute",):
                hidden, weight, bias = leaf(B, T, H, dtype=dtype), leaf(V, H, dtype=dtype), leaf(V, dtype=dtype)
                backward(fastpref.linear_token_logprobs(hidden, weight, labels, bias, mode=mode, stats=stats))
        out = fastpref.linear_dpo_loss(leaf(B, T, H, dtype=dtype), leaf(V, H, dtype=dtype), labels, reference_free=True)
        out.loss.backward()
    for loss in TABLE:
        tensors, options = loss.example(generator, 3)
        given = [t.float().to(device).requires_grad_() if t.is_floating_point() else t.to(device) for t in tensors]
        placed = {
            name: (value.float() if value.is_floating_point() else value).to(device)
            if isinstance(value, Tensor)
            else value
            for name, value in options.items()
        }
        result = loss.function(*given, **loss.options, **placed)
        (result if isinstance(result, Tensor) else result.loss).backward()
    rewards, values = torch.randn(2, B, T, generator=generator).to(device)
    fastpref.gae(rewards, values, labels != -100)
    if device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
