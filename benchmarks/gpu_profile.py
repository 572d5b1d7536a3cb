"""Read hardware counters of the kernels on logits and of the fold: python -m benchmarks.gpu_profile cuda|cpu [NAME]...

Without names it runs itself under Nsight Compute once for each of `KERNELS` and prints the counters as CSV. The exit
status is 77 if `ncu` is not on PATH. With names it only makes the calls; on a CPU it makes all of them at tiny shapes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

import fastpref
from benchmarks.gpu_parts import NOT_HERE

CALLS = 3
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum.per_second",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum.per_second",
    "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
Call = Callable[[], object]


def logprobs(device: str, stats: tuple[str, ...] = ()) -> Call:
    """Return a call of the forward from logits."""
    rows, vocabulary = (8, 1031) if device == "cpu" else (8192, 128256)
    logits = torch.randn(1, rows, vocabulary, device=device, dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (1, rows), device=device)
    return lambda: fastpref.token_logprobs(logits, labels, shift=False, stats=stats)


def statistics(device: str) -> Call:
    """Return a call of the forward from logits that also gives three statistics."""
    return logprobs(device, ("entropy", "mean_logits", "is_top1"))


def fold(device: str) -> Call:
    """Return a call of the forward from hidden states on a few tiles, each a product and a fold."""
    rows, vocabulary, features = (8, 1031, 16) if device == "cpu" else (4096, 3 * 4096, 1024)
    hidden = torch.randn(1, rows, features, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, features, device=device, dtype=torch.bfloat16) * 3 / features**0.5
    labels = torch.randint(vocabulary, (1, rows), device=device)
    return lambda: fastpref.linear_token_logprobs(hidden, weight, labels, shift=False, mode="save")


# By name: the function that returns the call, and the kernel whose counters are read.
KERNELS: dict[str, tuple[Callable[[str], Call], str]] = {
    "logprobs": (logprobs, "logprobs_forward_kernel"),
    "fold": (fold, "fold_kernel"),
    "statistics": (statistics, "logprobs_forward_kernel"),
}


def launch(name: str, device: str) -> None:
    """Make a call that launches a kernel a few times."""
    call = KERNELS[name][0](device)
    for _ in range(CALLS):
        call()
    if device == "cuda":
        torch.cuda.synchronize()


def main(device: str, *names: str) -> int:
    """Return 1 if `ncu` failed for a kernel."""
    if names or device == "cpu":
        for name in names or KERNELS:
            launch(name, device)
            print(f"{name} ran")
        return 0
    if shutil.which("ncu") is None:
        print("ncu is not on PATH")
        return NOT_HERE
    failed = False
    for name, (_, kernel) in KERNELS.items():
        print(f"-- {name}", flush=True)
        options = ["--kernel-name", kernel, "--launch-count", str(CALLS), "--metrics", ",".join(METRICS)]
        options += ["--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
        command = ["ncu", *options, sys.executable, "-m", "benchmarks.gpu_profile", device, name]
        failed |= subprocess.run(command, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
