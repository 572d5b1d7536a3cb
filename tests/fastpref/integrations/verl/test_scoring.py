"""Compare our versions of verl's scoring functions with plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastpref.integrations import verl as ours
from tests.fastpref.integrations.imitations import assert_alike, randn


@pytest.mark.parametrize("shape", [(2, 5), (9,)])
def test_scoring_of_logits(shape: tuple[int, ...]) -> None:
    leaf, labels = randn(*shape, 11, grad=True), torch.randint(11, shape)
    z = F.log_softmax(leaf, -1)
    wanted = z.gather(-1, labels[..., None])[..., 0]
    assert_alike(ours.logprobs_from_logits(leaf, labels), wanted, leaf)
    assert_alike(ours.logprobs_from_logits(leaf * 1, labels, False), wanted, leaf)
    entropy = -(z.exp() * z).sum(-1)
    assert_alike(ours.entropy_from_logits(leaf), entropy, leaf)
    assert_alike(ours.entropy_from_logits_with_chunking(leaf, chunk_size=2), entropy, leaf)
    logits = leaf * 1
    assert_alike(ours.logprobs_from_logits(logits, labels), wanted, leaf)
    # The gradient is written over the logits: each of its rows adds up to 0.
    torch.testing.assert_close(logits.detach().sum(-1), torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2, 5), (9,)])
def test_scoring_of_hidden_states(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, own = [], torch.ops.fastpref.linear_logprobs
    monkeypatch.setattr(torch.ops.fastpref, "linear_logprobs", lambda *args: (calls.append(0), own(*args))[1])
    hidden, weight, ids = randn(*shape, 7, grad=True), randn(11, 7, grad=True), torch.randint(11, shape)
    logps, entropy = ours.FusedLinearForPPO()(hidden, weight, ids, 0.7)
    assert len(calls) == 1
    z = F.log_softmax(hidden @ weight.T / 0.7, -1)
    assert_alike(logps, z.gather(-1, ids[..., None])[..., 0], hidden, weight)
    assert_alike(entropy, -(z.exp() * z).sum(-1), hidden, weight)
