"""A process of the smoke whose launchers have planted faults."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.smoke import worker

FAULTS = {
    "gae/dense/float32": "a launcher that is off by 1e-3",
    "kto_loss/sum/float32": "a launcher that leaves an output unwritten",
    "pairwise_reward_loss/sum/float32": "a launcher that raises",
    "best_of_k_loss/sum/float32": "a launcher that ends the process",
    "ranking_loss/sum/float32": "a launcher that never returns",
    "plackett_luce_loss/sum/float32": "none",
}


def _ends(*_: Any) -> Any:
    os._exit(3)


def _raises(*_: Any) -> Any:
    raise RuntimeError("planted: no kernel image\nand more of it")


def _never(*_: Any) -> Any:
    while True:
        time.sleep(3600)


def serve(pipe: Connection, device: str) -> None:
    """Serve cases with the faults in place."""
    from fastpref_kernels.triton import gae as gae_kernels
    from fastpref_kernels.triton.losses import preference, reward

    gae, kto_loss = gae_kernels.gae, preference.kto_loss

    def unwritten(*arguments: Any) -> Any:
        loss, partials, rewards = kto_loss(*arguments)
        return loss, torch.empty_like(partials), rewards

    gae_kernels.gae = lambda *arguments: tuple(value + 1e-3 for value in gae(*arguments))
    preference.kto_loss = unwritten
    reward.pairwise_reward_loss, reward.best_of_k_loss, reward.ranking_loss = _raises, _ends, _never
    worker.serve(pipe, device)
