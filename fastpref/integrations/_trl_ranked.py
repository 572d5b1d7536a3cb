"""Rows of K ranked answers to a prompt: their token ids and ranks, and a batch of them."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import torch
from torch import Tensor

from fastpref.losses.reward import ranks_from_scores


@dataclasses.dataclass
class RankingCollator:
    """Rows of ranked answers to a batch: the sequences of every prompt one after another, N of them in all.

    Args:
        pad_token_id: what fills sequences up on the right.
        pad_to_multiple_of: None, or what their length is rounded up to.

    Returns:
        When called with rows that have `completion_ids`, K lists of token ids, and `ranks`, K integers: `input_ids` and
        `attention_mask` (N, T), `ranks` (B, K) for the largest K, and `mask` (B, K), True where a prompt has an answer.
        Where it has none its rank is K.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [ids for row in rows for ids in row["completion_ids"]]
        unit = self.pad_to_multiple_of or 1
        length = math.ceil(max(map(len, sequences)) / unit) * unit
        input_ids = torch.full((len(sequences), length), self.pad_token_id, device="cpu")
        attention_mask = torch.zeros_like(input_ids)
        for i, ids in enumerate(sequences):
            input_ids[i, : len(ids)] = torch.tensor(ids, device="cpu")
            attention_mask[i, : len(ids)] = 1
        width = max(len(row["ranks"]) for row in rows)
        ranks = torch.full((len(rows), width), width, device="cpu")  # after all others, as in ranks_from_scores
        mask = torch.zeros_like(ranks, dtype=torch.bool)
        for i, row in enumerate(rows):
            ranks[i, : len(row["ranks"])] = torch.tensor(row["ranks"], device="cpu")
            mask[i, : len(row["ranks"])] = True
        return {"input_ids": input_ids, "attention_mask": attention_mask, "ranks": ranks, "mask": mask}


def fits(row: dict[str, Any], max_length: int) -> bool:
    """Whether every answer of a row is short enough."""
    return max(map(len, row["completion_ids"])) <= max_length


def ranked_row(row: dict[str, Any], processing_class: Any, loss_type: str) -> dict[str, Any]:
    """A row's token ids, which it may have already, and its ranks from 0. `ValueError` where they cannot be made."""
    answers = row["completion_ids" if "completion_ids" in row else "completions"]
    given = {name: row[name] for name in ("scores", "ranks") if row.get(name) is not None}
    numbers: list[Any] = next(iter(given.values()), [])
    sound = len(given) == 1 and all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)
    if not sound or not isinstance(answers, list) or len(answers) < 2 or len(answers) != len(numbers):
        raise ValueError(
            "a row must have completions, a list of two or more, and as many numbers as scores or as ranks; got "
            + ", ".join(f"{name}={value!r}" for name, value in {"completions": answers, **given}.items())
        )
    sign = 1 if "scores" in given else -1
    ranks = ranks_from_scores(sign * torch.tensor([numbers], dtype=torch.float64, device="cpu"))[0].tolist()
    untied = {"ranking": [], "plackett_luce": ranks, "best_of_k": [rank for rank in ranks if rank == 0]}[loss_type]
    if len(set(untied)) < len(untied):
        raise ValueError(f"{loss_type} has no place for ties, as ranking has; got {given}")
    if "completion_ids" in row:
        return {"ranks": ranks}
    return {"completion_ids": [_token_ids(row, answer, processing_class) for answer in answers], "ranks": ranks}


def _token_ids(row: dict[str, Any], answer: Any, processing_class: Any) -> list[int]:
    if isinstance(answer, str):
        end = "" if answer.endswith(processing_class.eos_token) else processing_class.eos_token
        return processing_class(text=row["prompt"] + answer + end)["input_ids"]
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    options = {"tools": tools, "return_dict": True, **(row.get("chat_template_kwargs") or {})}
    return processing_class.apply_chat_template(row["prompt"] + answer, tokenize=True, **options)["input_ids"]
