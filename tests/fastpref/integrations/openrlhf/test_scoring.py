"""Compare our versions of OpenRLHF's functions of logits with plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastpref.integrations import openrlhf as ours
from tests.fastpref.integrations.imitations import assert_alike, randn


@pytest.mark.parametrize("shape", [(2, 5), (9,)])
def test_scoring(shape: tuple[int, ...]) -> None:
    logits, labels = randn(*shape, 11, grad=True), torch.randint(11, shape)
    before = logits.detach().clone()
    z = F.log_softmax(logits / 0.7, -1)
    found = ours.log_probs_from_logits(logits, labels, 0.7)
    assert_alike(found, z.gather(-1, labels[..., None])[..., 0], logits)
    z = F.log_softmax(logits, -1)
    assert_alike(ours.compute_entropy(logits), -(z.exp() * z).sum(-1), logits)
    assert torch.equal(logits, before)
