"""The models: a small Llama or the user's own, the reward model on its backbone, and how a batch is scored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import fastpref
from fastpref.cli.demo.tokens import Batch, load_tokenizer


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
    score = score_head(model)
    nn.init.normal_(score.weight, std=(score.in_features + 1) ** -0.5)
    return model


def load_reward_model(folder: Path, tokenizer: Any) -> nn.Module:
    """An earlier run's reward model."""
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the reward model in {folder} has another tokenizer than the model to train")
    return AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def score_head(model: nn.Module) -> nn.Linear:
    """A reward model's scalar head."""
    return next(child for child in model.children() if isinstance(child, nn.Linear))


def rewards(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) scalar rewards of the answers."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.squeeze(-1)


def values(model: nn.Module, batch: Batch) -> Tensor:
    """(B, T) scalars, a reward model's head at every token."""
    return score_head(model)(hidden_states(model, batch)).squeeze(-1)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, T, V) logits."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


class Head(NamedTuple):
    """What makes logits of a model's hidden states.

    Attributes:
        weight: (V, H), the model's own parameter, which may be its embedding too.
        bias: None, or (V,).
        logit_scale: multiplies the logits.
        softcap: then caps them.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """How fastpref is told of it, beside the weight."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V) logits of (B, T, H) hidden states, in plain PyTorch."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head(model: Any) -> Head:
    """A causal language model's head, by the names that transformers' configurations have for what follows it."""
    layer = model.get_output_embeddings()
    scale = getattr(model.config, "logit_scale", None) or 1.0
    scale /= getattr(model.config, "logits_scaling", None) or 1.0
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def check_head(model: Any) -> None:
    """Raise ValueError for a model whose logits are not `head` of its last hidden states."""
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    batch = Batch(ids, torch.ones_like(ids), ids)
    model.eval()
    with torch.no_grad():
        expected = logits(model, batch)
        found = head(model).logits(hidden_states(model, batch))
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
        raise ValueError(
            f"PPO and DPO need logits that are linear in the last hidden states; {type(model).__name__}'s are not"
        )


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """(B, T, H) last hidden states, which the head is given."""
    return model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state


def token_logps(model: nn.Module, batch: Batch) -> Tensor:
    """(B, T−1) log-probs of the labels, nats, 0 where not scored."""
    to = head(model)
    return fastpref.linear_token_logprobs(hidden_states(model, batch), to.weight, batch.labels, **to.options)


def answer_logps(model: nn.Module, batch: Batch) -> Tensor:
    """(B,) summed log-probs of the answers, nats, without gradients."""
    to = head(model)
    with torch.no_grad():
        return fastpref.linear_sequence_logprobs(hidden_states(model, batch), to.weight, batch.labels, **to.options)
