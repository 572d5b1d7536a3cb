"""What a run of the demo can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STAGES = ("sft", "reward", "ppo", "dpo")


@dataclass(frozen=True)
class Settings:
    """The demo's knobs, at what trains in about three minutes on two CPU cores.

    Attributes:
        out: folder of the results.
        data: JSONL file of the user's pairs; None for the standard library.
        model: transformers folder of the user's model and tokenizer; None for a small Llama from scratch.
        stages: which of `STAGES` to train, in that order.
        seed: of the split, the draws, the initial weights and the batches.
        vocabulary: entries of the tokenizer trained here.
        hidden: width of the model trained here.
        layers: its depth.
        max_length: tokens of a prompt and its answer.
        batch: sequences a step: that many for SFT, a K-th as many prompts for the reward model, half as many DPO pairs.
        sft_steps: of supervised training.
        reward_steps: of the reward model's.
        ppo_steps: of PPO's, each with samples of its own.
        dpo_steps: of DPO, and of its repetitions.
        sft_rate: highest learning rate.
        reward_rate: highest learning rate.
        ppo_rate: highest learning rate.
        dpo_rate: highest learning rate.
        samples: answers sampled in a step of PPO.
        sample_length: tokens of a sampled answer at most; at most half of `max_length`.
        kl_target: KL of PPO's policy to its reference, nats a sequence, that the price of a nat is steered by.
        beta: DPO's β.
        held_out: share of the data to hold out.
        evaluated: at most so many held-out prompts are scored.
        functions: use so many functions of the standard library; None for all.
        eager: repeat the DPO steps from logits and in eager PyTorch, and compare.
        device: where to train, such as `cpu`; None for the accelerator if there is one.
    """

    out: Path = Path("demo-out")
    data: Path | None = None
    model: Path | None = None
    stages: Sequence[str] = STAGES
    seed: int = 0
    vocabulary: int = 8192
    hidden: int = 128
    layers: int = 3
    max_length: int = 96
    batch: int = 32
    sft_steps: int = 180
    reward_steps: int = 200
    ppo_steps: int = 20
    dpo_steps: int = 100
    sft_rate: float = 3e-3
    reward_rate: float = 1e-3
    ppo_rate: float = 2e-3
    dpo_rate: float = 5e-4
    samples: int = 64
    sample_length: int = 32
    kl_target: float = 6.0
    beta: float = 0.1
    held_out: float = 0.12
    evaluated: int = 320
    functions: int | None = None
    eager: bool = True
    device: str | None = None


# A few seconds: shows that everything runs, learns nothing.
QUICK = {
    "vocabulary": 512,
    "hidden": 32,
    "layers": 1,
    "max_length": 48,
    "batch": 8,
    "sft_steps": 4,
    "reward_steps": 4,
    "ppo_steps": 4,
    "dpo_steps": 4,
    "samples": 8,
    "sample_length": 8,
    "evaluated": 16,
    "functions": 300,
}


def parse_stages(text: str) -> tuple[str, ...]:
    """The stages named in a comma-separated list, in training order."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise ValueError(f"stages must be a comma-separated list of {', '.join(STAGES)}; got {text!r}")
    return tuple(stage for stage in STAGES if stage in names)
