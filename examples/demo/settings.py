"""The settings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STAGES = ("sft", "reward", "ppo", "dpo")


@dataclass(frozen=True)
class Settings:
    """The settings of a run. The defaults train in about three minutes on two CPU cores.

    Attributes:
        out: folder of the results.
        data: JSONL file of the user's pairs; None for the standard library.
        model: transformers folder of the user's model and tokenizer; None for a small Llama from scratch.
        stages: the stages of `STAGES` to train, in that order.
        seed: seed of the split, the draws, the initial weights and the batches.
        vocabulary: entries of the tokenizer that is trained.
        hidden: width of the small Llama.
        layers: number of its layers.
        max_length: most tokens of a prompt and its answer.
        batch: sequences a step: answers for SFT, all answers of batch/K prompts for the reward model, and both answers
            of batch/2 pairs for DPO.
        sft_steps: steps of supervised training.
        reward_steps: steps of the reward model.
        ppo_steps: steps of PPO, each with new samples.
        dpo_steps: steps of DPO, and of its repetitions.
        sft_rate: highest learning rate of supervised training.
        reward_rate: highest learning rate of the reward model.
        ppo_rate: highest learning rate of PPO.
        dpo_rate: highest learning rate of DPO.
        samples: answers sampled in a step of PPO.
        sample_length: most tokens of a sampled answer, at most half of `max_length`.
        kl_target: target of the KL of PPO's policy to its reference, in nats a sequence.
        beta: the β of DPO.
        held_out: share of the data to hold out.
        evaluated: most held-out prompts to score.
        functions: number of functions of the standard library to use; None for all.
        eager: whether to repeat the DPO steps from logits and in eager PyTorch, and compare.
        device: device to train on, such as `cpu`; None for the accelerator if there is one.
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


# These settings run every stage in a few seconds, without learning anything.
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
    """Return the stages of a comma-separated list in training order."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise ValueError(f"stages must be a comma-separated list of {', '.join(STAGES)}; got {text!r}")
    return tuple(stage for stage in STAGES if stage in names)
