"""The language model, the reward model on its backbone, and functions that score a batch with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import fastpref
from examples.demo.tokens import Batch, load_tokenizer


def small_llama(tokenizer: Any, *, hidden: int, layers: int, max_length: int) -> nn.Module:
    """Return a randomly initialised Llama with tied embeddings."""
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
    """Load the causal language model of a transformers folder in float32, the dtype of the training."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    embedded = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embedded:
        raise ValueError(f"the tokenizer in {folder} has {len(tokenizer)} entries; the model embeds {embedded}")
    return model


def reward_model(policy: Any) -> nn.Module:
    """Return a reward model: a scalar head on the last token of an answer, and a copy of the policy's backbone.

    The head is initialised as in arXiv 2009.01325: normal with variance 1/(H + 1).
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    score = score_head(model)
    nn.init.normal_(score.weight, std=(score.in_features + 1) ** -0.5)
    return model


def load_reward_model(folder: Path, tokenizer: Any) -> nn.Module:
    """Load the reward model of an earlier run."""
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the reward model in {folder} has another tokenizer than the model to train")
    return AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


def score_head(model: nn.Module) -> nn.Linear:
    """Return the scalar head of a reward model."""
    return next(child for child in model.children() if isinstance(child, nn.Linear))


def rewards(model: nn.Module, batch: Batch) -> Tensor:
    """Return the (B,) rewards of the answers."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.squeeze(-1)


def values(model: nn.Module, batch: Batch) -> Tensor:
    """Return (B, T) values: the outputs of a reward model's head at every token."""
    return score_head(model)(hidden_states(model, batch)).squeeze(-1)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the (B, T, V) logits."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


class Head(NamedTuple):
    """The function from a model's hidden states to its logits.

    Attributes:
        weight: (V, H), the parameter of the model, which may also be its embedding.
        bias: (V,), or None.
        logit_scale: a factor on the logits.
        softcap: the cap of the scaled logits, or None.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that fastpref's functions take beside the weight."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the (B, T, V) logits of (B, T, H) hidden states, in plain PyTorch."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head(model: Any) -> Head:
    """Return the head of a causal language model, with the scale and the cap that its configuration names."""
    layer = model.get_output_embeddings()
    scale = getattr(model.config, "logit_scale", None) or 1.0
    scale /= getattr(model.config, "logits_scaling", None) or 1.0
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def check_head(model: Any) -> None:
    """Raise ValueError if the logits of a model are not `head` of its last hidden states."""
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
    """Return the (B, T, H) hidden states that the head takes."""
    return model.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state


def token_logps(model: nn.Module, batch: Batch) -> Tensor:
    """Return the (B, T−1) log-probs of the labels in nats, 0 where not scored."""
    to = head(model)
    return fastpref.linear_token_logprobs(hidden_states(model, batch), to.weight, batch.labels, **to.options)


def answer_logps(model: nn.Module, batch: Batch) -> Tensor:
    """Return the (B,) summed log-probs of the answers in nats, without gradients."""
    to = head(model)
    with torch.no_grad():
        return fastpref.linear_sequence_logprobs(hidden_states(model, batch), to.weight, batch.labels, **to.options)
