"""The models: a small Llama or the user's own, the reward model on its backbone, and how a batch is scored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import fastpref
from fastpref.cli.demo.tokens import Batch


def small_llama(tokenizer: Any, *, hidden: int, layers: int, max_length: int) -> nn.Module:
    """A Llama from scratch with tied embeddings, from torch's current seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def load_model(folder: Path, tokenizer: Any) -> nn.Module:
    """The causal language model of a transformers folder, in float32, which is what is trained here."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    embedded = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embedded:
        raise ValueError(f"the tokenizer in {folder} has {len(tokenizer)} entries; the model embeds {embedded}")
    return model


def reward_model(policy: Any) -> nn.Module:
    """A scalar head on a copy of the policy's backbone.

    The head starts as in arXiv 2009.01325, normal with variance 1/(H + 1), on an answer's last token.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    for head in model.children():
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    return model


def rewards(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) scalar rewards of the answers."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.squeeze(-1)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, T, V) logits."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


def answer_logps(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) summed log-probs of the answers, nats, without gradients."""
    with torch.no_grad():
        return fastpref.sequence_logprobs(logits(model, batch), batch.labels)
