"""Patch modules that imitate verl's, and restore them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fastpref.integrations import verl as ours
from fastpref.integrations.verl import _patch
from tests.fastpref.integrations.imitations import install, randn

SOURCES = {
    "verl": "",
    "verl.utils": "",
    "verl.utils.experimental": "",
    "verl.models": "",
    "verl.models.transformers": "",
    "verl.trainer": "",
    "verl.trainer.ppo": "",
    "verl.utils.torch_functional": """
def logprobs_from_logits(logits, labels, inplace_backward=True): ...
def entropy_from_logits(logits): ...
def entropy_from_logits_with_chunking(logits, chunk_size=2048): ...
def log_probs_from_logits_response(logits, labels): return logprobs_from_logits(logits=logits, labels=labels)
""",
    "verl.utils.experimental.torch_functional": """
class FusedLinearForPPO:
    def __init__(self, chunk_size=512, impl_backend="torch"): ...
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0): ...
""",
    "verl.models.transformers.dense_common": """
def forward_with_torch_backend(hidden, weight, ids):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    return FusedLinearForPPO(impl_backend="torch").forward(hidden, weight, ids, temperature=1.0)
""",
    "verl.trainer.ppo.core_algos": """
def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam): ...
""",
    "verl.engine": "from verl.utils.torch_functional import logprobs_from_logits",
}


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    assert not _patch.replacement


def test_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = install(monkeypatch, SOURCES, "0.9.1")
    own = {name: dict(vars(module)) for name, module in modules.items()}
    hidden, weight, ids = randn(2, 5, 7), randn(11, 7), torch.randint(11, (2, 5))
    wanted = F.log_softmax(hidden @ weight.T, -1).gather(-1, ids[..., None])[..., 0]
    with ours.patch():
        scored = [
            modules["verl.utils.torch_functional"].log_probs_from_logits_response(hidden @ weight.T, ids),
            modules["verl.engine"].logprobs_from_logits(hidden @ weight.T, ids),
            modules["verl.models.transformers.dense_common"].forward_with_torch_backend(hidden, weight, ids)[0],
        ]
        core = modules["verl.trainer.ppo.core_algos"]
        assert core.compute_gae_advantage_return is ours.compute_gae_advantage_return
    for found in scored:
        torch.testing.assert_close(found, wanted)
    assert {name: dict(vars(module)) for name, module in modules.items()} == own


@pytest.mark.parametrize(
    ("name", "before", "after", "match"),
    [
        ("verl.utils.torch_functional", "inplace_backward=True", "inplace_backward=False", "inplace_backward=False"),
        ("verl.utils.experimental.torch_functional", "temperature=1.0", "temperature=1.0, bias=None", "bias=None"),
        ("verl.utils.torch_functional", "def entropy_from_logits(", "def entropy(", r"lacks .*entropy_from_logits\. "),
        ("verl.models.transformers.dense_common", "FusedLinearForPPO", "Fused", "does not use FusedLinearForPPO"),
    ],
    ids=["default", "parameter", "missing", "unused"],
)
def test_another_verl_is_refused(
    name: str, before: str, after: str, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, name, SOURCES[name].replace(before, after))
    install(monkeypatch, SOURCES, "0.9.1")
    with pytest.raises(NotImplementedError, match=match) as error:
        ours.patch()
    assert f"verl{ours.SUPPORTED}" in str(error.value)
    assert "found verl 0.9.1" in str(error.value)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, SOURCES, "0.10.0")
    with pytest.raises(NotImplementedError, match=r"verl>=0.9,<0.10, .* found verl 0.10.0"):
        ours.patch()
