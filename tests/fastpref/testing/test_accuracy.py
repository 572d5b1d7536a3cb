"""Tests of what the accuracy rule allows and refuses."""

from __future__ import annotations

import pytest
import torch

from fastpref.testing.accuracy import judge, ulp
from fastpref.testing.case import DTYPES


def test_ulp() -> None:
    for dtype in DTYPES:
        for magnitude in (1.0, 1.7, 96.0):
            x = torch.tensor(magnitude, dtype=dtype)
            step = torch.nextafter(x, torch.tensor(torch.inf, dtype=dtype)) - x
            assert ulp(dtype, x.item()) == step.item()
    assert ulp(torch.float32, 0.0) == 2.0**-149


@pytest.mark.parametrize("peer", [0.0, 2.0**-20])
def test_twice_what_eager_loses_and_four_ulp(peer: float) -> None:
    truth = torch.tensor([1.5, -0.25], dtype=torch.float64)
    eager = (truth + torch.tensor([0.0, peer])).float()
    allowed = 2 * peer + 4 * 2.0**-23
    for share, right in ((1.0, True), (1.25, False)):
        ours = truth + torch.tensor([share * allowed, 0.0])
        verdict = judge(ours.float(), eager, truth)
        assert (verdict.fault is None) is right
        assert verdict.allowance == allowed
        assert verdict.error == share * allowed


def test_float64_may_lose_sixteen_ulp_of_one() -> None:
    truth = torch.tensor([0.125], dtype=torch.float64)
    assert judge(truth + 16 * 2.0**-52, truth, truth).fault is None
    assert judge(truth + 17 * 2.0**-52, truth, truth).fault is not None


def test_an_infinity_is_one_of_the_truth() -> None:
    infinite, finite = torch.tensor([1.0, -torch.inf]), torch.tensor([1.0, 2.0])
    assert judge(infinite, infinite, infinite.double()).fault is None
    assert judge(finite, infinite, infinite.double()).fault is not None
    assert judge(infinite, finite, finite.double()).fault == "1 values are not finite"
