"""From text to padded batches of tokens: the tokenizer, the encoding, the labels."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastpref.cli.demo.data import Example

IGNORED = -100
POOLED_BATCHES = 8


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` entries, with `<pad>`, `<s>` and `</s>` as 0, 1 and 2."""
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
    """The tokenizer of a transformers folder; it needs an end of text, which also pads where no pad token is set."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} needs an eos_token, to end an answer with; it has none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Encoded(NamedTuple):
    """An example as token ids: the prompt with its beginning of text, the answers with their end of text."""

    prompt: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


def encode(examples: Sequence[Example], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Token ids of every example; a prompt loses its beginning, an answer its end, to fit into `max_length`.

    An answer keeps at most half of `max_length`, so that there is always a prompt to answer.
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
    """At most the last `length` tokens of a prompt; a beginning of text stays its first."""
    if len(prompt) <= length:
        return prompt
    return prompt[-length:] if prompt[0] != begin else [prompt[0], *prompt[len(prompt) - length + 1 :]]


class Batch(NamedTuple):
    """Right-padded sequences, all (B, T) int64; labels are aligned with input_ids and IGNORED where not scored."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def draw_batches(lengths: Sequence[int], count: int, seed: int) -> Iterator[list[int]]:
    """Without end, batches of `count` indices: each one once before any comes again, like lengths together.

    Drawn in pools of a few batches; within a pool, batches are cut by length, which saves a third of the padding.
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
    """Pad (prompt, answer) pairs of token ids into a batch; the labels are the answers, or the prompts too."""
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
