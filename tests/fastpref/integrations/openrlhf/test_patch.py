"""Patch modules that imitate OpenRLHF's, and restore them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastpref.integrations import openrlhf as ours
from fastpref.integrations.openrlhf import _patch
from tests.fastpref.integrations.imitations import install, randn

SOURCES = {
    "openrlhf": "",
    "openrlhf.models": "",
    "openrlhf.models.utils": """
def log_probs_from_logits(logits, labels, temperature=1.0):
    raise AssertionError
def compute_entropy(logits):
    raise AssertionError
""",
    "openrlhf.models.actor": """
from torch import nn
from openrlhf.models.utils import compute_entropy, log_probs_from_logits
class Actor(nn.Module):
    def forward(self, logits, labels):
        return compute_entropy(logits), log_probs_from_logits(logits, labels)
""",
}


def imitate(monkeypatch: pytest.MonkeyPatch, installed: str = "0.11.2") -> tuple[Any, Any]:
    """Install modules that imitate OpenRLHF's. Return models.utils and models.actor."""
    modules = install(monkeypatch, SOURCES, installed)
    return modules["openrlhf.models.utils"], modules["openrlhf.models.actor"]


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    assert not _patch.replacement


def test_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    utils, actor = imitate(monkeypatch)
    own = dict(vars(actor))
    logits, labels = randn(2, 5, 11), torch.randint(11, (2, 5))
    with ours.patch():
        entropy, logps = actor.Actor()(logits, labels)
        assert utils.compute_entropy is ours.compute_entropy
        with ours.patch():
            pass
        assert utils.log_probs_from_logits is actor.log_probs_from_logits is ours.log_probs_from_logits
    assert vars(actor) == own
    assert utils.compute_entropy is own["compute_entropy"]
    z = F.log_softmax(logits, -1)
    torch.testing.assert_close(logps, z.gather(-1, labels[..., None])[..., 0])
    torch.testing.assert_close(entropy, -(z.exp() * z).sum(-1))


def test_what_is_replaced_again_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    utils, _ = imitate(monkeypatch)
    ours.patch()
    utils.compute_entropy = print
    with pytest.raises(RuntimeError, match="compute_entropy was replaced again"):
        ours.unpatch()
    utils.compute_entropy = ours.compute_entropy
    ours.unpatch()


def wrong_signature(utils: Any, actor: Any) -> None:
    def log_probs_from_logits(logits: Any, labels: Any, temperature: float = 1.0, chunk: int = 0) -> None: ...

    utils.log_probs_from_logits = actor.log_probs_from_logits = log_probs_from_logits


def missing(utils: Any, actor: Any) -> None:
    del utils.compute_entropy


def unused(utils: Any, actor: Any) -> None:
    actor.Actor.forward = lambda self, logits, labels: actor.log_probs_from_logits(logits, labels)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (wrong_signature, r"chunk=0"),
        (missing, "lacks openrlhf.models.utils.compute_entropy"),
        (unused, "does not use compute_entropy"),
    ],
)
def test_another_openrlhf_is_refused(change: Any, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(*imitate(monkeypatch))
    with pytest.raises(NotImplementedError, match=match) as error:
        ours.patch()
    assert ours.SUPPORTED in str(error.value)
    assert "found openrlhf 0.11.2" in str(error.value)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch, "0.12.0")
    with pytest.raises(NotImplementedError, match=r"openrlhf>=0.9.3,<0.12, .* found openrlhf 0.12.0"):
        ours.patch()
