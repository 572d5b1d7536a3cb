"""Arguments that the parts of PPO refuse, with errors that name the argument, what was given and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpref import (
    gae,
    kl_shaped_rewards,
    masked_whiten,
    ppo_loss,
    ppo_policy_loss,
    ppo_value_loss,
    ptx_loss,
)
from tests.helpers.losses import fields

# Every function on tokens: the names of its (B, T) arguments before the mask, and what else it needs.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "ppo_policy_loss": (ppo_policy_loss, ("logps", "old_logps", "advantages"), {}),
    "ppo_value_loss": (ppo_value_loss, ("values", "old_values", "returns"), {}),
    "ppo_loss": (ppo_loss, ("logps", "old_logps", "advantages", "values", "old_values", "returns"), {}),
    "ptx_loss": (ptx_loss, ("token_logps",), {}),
    "gae": (gae, ("rewards", "values"), {}),
    "kl_shaped_rewards": (kl_shaped_rewards, ("logps", "ref_logps"), {"scores": torch.zeros(3), "kl_coef": 0.1}),
    "masked_whiten": (masked_whiten, ("x",), {}),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


class TestRefusals:
    """An error names the argument, what was given and what is wanted."""

    def call(self, name: str, **changed: Any) -> Any:
        function, names, more = FUNCTIONS[name]
        given = {argument: torch.zeros(3, 4) for argument in names} | {"mask": torch.ones(3, 4, dtype=torch.bool)}
        return function(**(given | more | changed))

    @every_function
    def test_tensors(self, name: str) -> None:
        _, names, _ = FUNCTIONS[name]
        for argument in names:
            with pytest.raises(TypeError, match=rf"^{argument} must be .*int64"):
                self.call(name, **{argument: torch.zeros(3, 4, dtype=torch.long)})
            with pytest.raises(TypeError, match=rf"^{argument} must be .*list"):
                self.call(name, **{argument: [0.0]})
        for argument in (*names[1:], "mask"):
            kind = torch.bool if argument == "mask" else torch.float32
            with pytest.raises(ValueError, match=rf"^{argument} must be .*\(3, 4\), like {names[0]}; .*\(3, 5\)"):
                self.call(name, **{argument: torch.zeros(3, 5, dtype=kind)})
            with pytest.raises(ValueError, match=rf"^{argument} must be on {names[0]}'s device.*cpu.*meta"):
                self.call(name, **{argument: torch.zeros(3, 4, dtype=kind, device="meta")})
        with pytest.raises(TypeError, match=r"^mask must be a bool .*float32"):
            self.call(name, mask=torch.ones(3, 4))

    @pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "masked_whiten"])
    def test_dimensions(self, name: str) -> None:
        first = FUNCTIONS[name][1][0]
        with pytest.raises(ValueError, match=rf"^{first} must be \(B, T\).*\(4,\)"):
            self.call(name, **{first: torch.zeros(4)})

    @pytest.mark.parametrize("name", ["ppo_policy_loss", "ppo_value_loss", "ppo_loss", "ptx_loss"])
    def test_means(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"^reduction must be .*'token'.*'sequence'.*'mean'"):
            self.call(name, reduction="mean")
        for wrong in (-1, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"^denominator must be .*{wrong}"):
                self.call(name, denominator=wrong)
        with pytest.raises(ValueError, match=r"^denominator must be .*\(3,\)"):
            self.call(name, denominator=torch.ones(3))
        with pytest.raises(ValueError, match=r"^denominator must be on mask's device.*cpu.*meta"):
            self.call(name, denominator=torch.ones((), device="meta"))

    @pytest.mark.parametrize(
        ("name", "option", "wrong", "words"),
        [
            ("gae", "gamma", 1.1, r"in \[0, 1\].*1\.1"),
            ("gae", "lam", -0.1, r"in \[0, 1\].*-0\.1"),
            ("gae", "lam", math.nan, r"in \[0, 1\].*nan"),
            ("ppo_policy_loss", "clip", 0.0, r"above 0.*0\.0"),
            ("ppo_policy_loss", "clip", (0, 0.0), r"above 0.*pair \(low, high\).*\(0, 0\.0\)"),
            ("ppo_policy_loss", "clip", [0.2, -0.1], r"above 0.*pair \(low, high\).*\[0\.2, -0\.1\]"),
            ("ppo_policy_loss", "clip", (math.inf, 0.2), r"above 0.*pair \(low, high\).*inf"),
            ("ppo_policy_loss", "clip", (0.2, 1e39), r"up to 1e\+30.*1e\+39"),
            ("ppo_policy_loss", "dual_clip", 1.0, r"between 1 and 1e\+30.*1\.0"),
            ("ppo_loss", "clip", (0.2, math.nan), r"above 0.*pair \(low, high\).*nan"),
            ("ppo_loss", "dual_clip", 0.5, r"between 1 and 1e\+30.*0\.5"),
            ("ppo_value_loss", "clip", -1.0, r"above 0.*-1"),
            ("ppo_loss", "clip", math.nan, r"above 0.*nan"),
            ("ppo_loss", "value_clip", 0.0, r"above 0.*0\.0"),
            ("ppo_loss", "value_coef", -0.1, r"not below 0.*-0\.1"),
            ("ptx_loss", "gamma", math.inf, r"not below 0.*inf"),
            ("kl_shaped_rewards", "kl_coef", -0.1, r"not below 0.*-0\.1"),
            ("kl_shaped_rewards", "estimator", "k4", r"'k1'.*'k3'.*'k4'"),
            ("kl_shaped_rewards", "scores", torch.zeros(4), r"\(3,\).*\(4,\)"),
            ("kl_shaped_rewards", "scores", torch.zeros(3, 1), r"\(3,\).*\(3, 1\).*scores\.squeeze\(-1\)"),
            ("kl_shaped_rewards", "scores", torch.zeros(3, device="meta"), r"cpu.*meta"),
        ],
    )
    def test_options(self, name: str, option: str, wrong: Any, words: str) -> None:
        with pytest.raises(ValueError, match=rf"^{option} must be .*{words}"):
            self.call(name, **{option: wrong})

    def test_scores_are_floating(self) -> None:
        with pytest.raises(TypeError, match=r"^scores must be .*int64"):
            self.call("kl_shaped_rewards", scores=torch.zeros(3, dtype=torch.long))

    @every_function
    def test_no_value_is_read_on_the_host(self, name: str) -> None:
        """A function that reads a value on the host fails on meta tensors, which have none."""
        function, names, more = FUNCTIONS[name]
        given = {argument: torch.zeros(3, 4, device="meta") for argument in names}
        given["mask"] = torch.ones(3, 4, dtype=torch.bool, device="meta")
        more = {option: x.to("meta") if isinstance(x, Tensor) else x for option, x in more.items()}
        for result in fields(function(**given, **more)):
            assert result.device.type == "meta"
