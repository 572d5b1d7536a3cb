"""Turn text into padded batches of tokens and labels."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from examples.demo.data import Example

IGNORED = -100
POOLED_BATCHES = 8


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocabulary` entries; `<pad>`, `<s>` and `</s>` are 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a transformers folder. Without a pad token, it pads with the end of text."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no eos_token; it needs one to end an answer with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Encoded(NamedTuple):
    """The token ids of an example: the prompt with a beginning of text, and the answers with an end of text."""

    prompt: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """The number of tokens of the prompt and its longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Return the token ids of every example, with at most `max_length` tokens of a prompt and an answer.

    An answer is cut at its end to half of `max_length`, and then a prompt is cut at its beginning.
    """

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    if not examples:
        return []
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    answers = [answer for example in examples for answer in example.answers]
    answer_ids = iter([[*tokens[: max_length // 2 - 1], tokenizer.eos_token_id] for tokens in ids(answers)])
    encoded = []
    for example, prompt in zip(examples, ids([example.prompt for example in examples]), strict=True):
        kept = [next(answer_ids) for _ in example.answers]
        room = max_length - len(begin) - max(map(len, kept))
        encoded.append(Encoded(begin + prompt[-room:], kept))
    return encoded


def shorten(prompt: list[int], length: int, begin: int | None) -> list[int]:
    """Return the last `length` tokens of a prompt; a beginning of text stays the first of them."""
    if len(prompt) <= length:
        return prompt
    return prompt[-length:] if prompt[0] != begin else [prompt[0], *prompt[len(prompt) - length + 1 :]]


class Batch(NamedTuple):
    """Right-padded sequences, (B, T) int64; labels are aligned with input_ids, and IGNORED where not scored."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def draw_batches(lengths: Sequence[int], count: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of `count` indices without end; every index is drawn once before any is drawn again.

    The indices of a few batches are drawn together and sorted by length, which saves a third of the padding.
    """
    rng = random.Random(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < POOLED_BATCHES * count:
            waiting += rng.sample(range(len(lengths)), len(lengths))
        pool, waiting = waiting[: POOLED_BATCHES * count], waiting[POOLED_BATCHES * count :]
        pool.sort(key=lambda i: lengths[i])
        for start in rng.sample(range(0, len(pool), count), POOLED_BATCHES):
            yield pool[start : start + count]


def collate(
    sequences: Sequence[tuple[list[int], list[int]]], pad: int, device: torch.device, *, score_prompt: bool = False
) -> Batch:
    """Pad (prompt, answer) pairs of token ids to a batch whose labels are the answers, or prompts and answers."""
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = torch.full((len(sequences), length), pad)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        attention_mask[row, :end] = 1
        first = 0 if score_prompt else len(prompt)
        labels[row, first:end] = input_ids[row, first:end]
    return Batch(input_ids.to(device), attention_mask.to(device), labels.to(device))
