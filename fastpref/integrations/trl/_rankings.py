"""Datasets of K ranked answers to each prompt: make token ids and ranks of a row, and a batch of rows."""

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
    """Collate rows of ranked answers into a batch of N sequences, those of each prompt one after another.

    Args:
        pad_token_id: the token that pads sequences on the right.
        pad_to_multiple_of: round the padded length up to a multiple of this, if not None.

    Returns:
        For rows with `completion_ids`, K lists of token ids, and `ranks`, K integers: a dict of `input_ids` and
        `attention_mask` (N, T), `ranks` (B, K) for the largest K, and `mask` (B, K), True where a prompt has an answer.
        Elsewhere the rank is the largest K.
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
        ranks = torch.full((len(rows), width), width, device="cpu")  # behind all answers, as in ranks_from_scores
        mask = torch.zeros_like(ranks, dtype=torch.bool)
        for i, row in enumerate(rows):
            ranks[i, : len(row["ranks"])] = torch.tensor(row["ranks"], device="cpu")
            mask[i, : len(row["ranks"])] = True
        return {"input_ids": input_ids, "attention_mask": attention_mask, "ranks": ranks, "mask": mask}


def fits(row: dict[str, Any], max_length: int) -> bool:
    """Return whether every answer of a row has at most `max_length` tokens, its prompt included."""
    return max(map(len, row["completion_ids"])) <= max_length


def ranked_row(row: dict[str, Any], processing_class: Any, loss_type: str) -> dict[str, Any]:
    """Return a row's `completion_ids`, unless it has them already, and its `ranks`, counted from 0.

    Raises:
        ValueError: the row lacks completions or numbers, their counts differ, or the loss does not support its ties.
    """
    answers = row["completion_ids" if "completion_ids" in row else "completions"]
    given = {name: row[name] for name in ("scores", "ranks") if row.get(name) is not None}
    numbers: list[Any] = next(iter(given.values()), [])
    is_valid = len(given) == 1 and all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)
    if not is_valid or not isinstance(answers, list) or len(answers) < 2 or len(answers) != len(numbers):
        raise ValueError(
            "a row must have completions, a list of two or more, and as many numbers in scores or in ranks; got "
            + ", ".join(f"{name}={value!r}" for name, value in {"completions": answers, **given}.items())
        )
    sign = 1 if "scores" in given else -1
    ranks = ranks_from_scores(sign * torch.tensor([numbers], dtype=torch.float64, device="cpu"))[0].tolist()
    untied = {"ranking": [], "plackett_luce": ranks, "best_of_k": [rank for rank in ranks if rank == 0]}[loss_type]
    if len(set(untied)) < len(untied):
        raise ValueError(
            f"loss_type {loss_type!r} does not support these ties; got {given}. Use 'ranking', or break the ties"
        )
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
