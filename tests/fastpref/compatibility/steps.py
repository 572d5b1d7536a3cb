"""Small training steps, from ids and labels to a loss: one for each kind of public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpref

VOCABULARY, WIDTH = 61, 16


def of_pairs(logps: Tensor) -> Tensor:
    """Return the DPO loss of (2B,) log-probs without a reference, in plain PyTorch."""
    chosen, rejected = logps.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


class Step(nn.Module):
    """A model of one layer, and the loss it is trained by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def heads(self) -> nn.Module:
        """Return the module that holds the head."""
        return self

    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.score(torch.tanh(self.embed(ids)), labels)


class Logits(Step):
    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(hidden)
        tokens = fastpref.token_logprobs(logits, labels)
        return of_pairs(fastpref.sequence_logprobs(logits, labels)) - 0.01 * tokens.mean()


class Hidden(Step):
    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        tokens = fastpref.linear_token_logprobs(hidden, self.head.weight, labels, self.head.bias)
        return of_pairs(tokens.sum(-1)) - 0.01 * tokens.mean()


class HiddenLoss(Step):
    """The gradients are made in the backward of one chunk, and in the forward of several."""

    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        options: dict[str, Any] = {"bias": self.head.bias, "reference_free": True}
        whole = fastpref.linear_dpo_loss(hidden, self.head.weight, labels, **options).loss
        return whole + fastpref.linear_dpo_loss(hidden, self.head.weight, labels, chunk_rows=24, **options).loss


class Losses(Step):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)

    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        tokens, mask = -hidden[:, 1:].square().sum(-1), labels[:, 1:] != -100
        logps, old = tokens.sum(-1), labels[:, 1:].cos().to(tokens.dtype) - 5
        (chosen, rejected), ref = logps.chunk(2), old.sum(-1).chunk(2)[0]
        return (
            fastpref.dpo_loss(chosen, rejected, ref, ref, loss_type=["sigmoid", "ipo"]).loss
            + fastpref.kto_loss(logps, old.sum(-1), mask[:, 2], kl=0.1).loss
            + fastpref.pairwise_reward_loss(chosen, rejected, center_weight=0.1)
            + fastpref.ranking_loss(tokens[:, :4], fastpref.ranks_from_scores(old[:, :4].cos()))
            + fastpref.ppo_policy_loss(tokens, old, old.cos(), mask).loss
        )


class Attached(Step):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, attn_implementation="eager",
        )  # fmt: skip
        self.model = fastpref.attach(transformers.LlamaForCausalLM(config), verify=False)

    def heads(self) -> nn.Module:
        return self.model

    @property
    def embed(self) -> nn.Module:
        return self.model.model.embed_tokens

    def score(self, hidden: Tensor, labels: Tensor) -> Tensor:
        options = {"labels": labels, "fastpref": True, "reduction": "sum", "use_cache": False}
        return of_pairs(self.model(inputs_embeds=hidden, **options).logprobs)


OURS = (Logits, Hidden, HiddenLoss)


def build(kind: type[Step]) -> Step:
    torch.manual_seed(0)
    step = kind()
    for parameter in step.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return step


def head_of(step: Step) -> tuple[nn.Module, str]:
    """Return the module that holds the head, and the head's name in it."""
    return step.heads(), "lm_head" if isinstance(step, Attached) else "head"


def batch(pairs: int = 2, length: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (2 * pairs, length), generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    return ids, labels


def outcome(step: Step, call: Callable[..., Tensor] | None = None, data: tuple[Tensor, ...] | None = None) -> Any:
    """Return the loss of a step, or of `call`, and the gradients of all parameters of the step."""
    step.zero_grad()
    loss = (step if call is None else call)(*(batch() if data is None else data))
    loss.backward()
    return {"loss": loss.detach(), **gradients(step)}


def gradients(step: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in step.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(step.parameters()))
    assert all(gradient.abs().max() > 1e-5 for gradient in found.values())
    return found


def hold(found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def values(step: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in step.named_parameters()}
