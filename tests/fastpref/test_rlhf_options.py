"""The options of PPO's parts as a YAML or JSON file may give them, and PPO's parts under another default device."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastpref
from fastpref import nn, reference
from fastpref.integrations import openrlhf, verl

WHOLE = torch.ones(3, 4, dtype=torch.bool)


def tokens() -> Tensor:
    return torch.linspace(-1, 1, 12, device="cpu").view(3, 4)


def of_tokens(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return a call of `function` with `count` tensors (B, T), a mask and options."""
    return lambda **options: function(*(tokens() for _ in range(count)), WHOLE, **options)


# How each function is called; what it is called with beside that are its keyword-only options.
CALLS: dict[Callable[..., Any], Callable[..., Any]] = {
    fastpref.kl_shaped_rewards: lambda kl_coef=0.1, **options: fastpref.kl_shaped_rewards(
        torch.zeros(3, device="cpu"), tokens(), tokens(), WHOLE, kl_coef=kl_coef, **options
    ),
    fastpref.gae: of_tokens(fastpref.gae, 2),
    reference.gae: of_tokens(reference.gae, 2),
    fastpref.masked_whiten: of_tokens(fastpref.masked_whiten, 1),
    fastpref.ppo_policy_loss: of_tokens(fastpref.ppo_policy_loss, 3),
    fastpref.ppo_value_loss: of_tokens(fastpref.ppo_value_loss, 3),
    fastpref.ppo_loss: of_tokens(fastpref.ppo_loss, 6),
    fastpref.ptx_loss: of_tokens(fastpref.ptx_loss, 1),
}
MODULES = (nn.PPOPolicyLoss, nn.PPOValueLoss)
CALLS |= {module: module for module in MODULES}

WRONG_NUMBERS = ("0.1", None, [0.1], (0.1, 0.2, 0.3), {"value": 0.1}, True, 1j, torch.ones(2), math.nan, math.inf, -1)
WRONG_CHOICES = (None, 1, True, ["token"], {"token"}, math.nan, "Token", "")
WRONG_BOOLS = (None, "true", 1, 0.0, [True], math.nan)
# Beside those; and what of them an option takes.
MORE_WRONG = {"clip": ("23", b"23", (0.1, "0.2"), [None, 0.2], [True, 0.2], (0.1, math.nan), [[0.1], 0.2], (0, 0), 0)}
RIGHT = {"dual_clip": (None,), "denominator": (None,)}


def keywords(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [x for x in inspect.signature(function).parameters.values() if x.kind is x.KEYWORD_ONLY]


def wrong_options() -> Iterator[Any]:
    for function in CALLS:
        for option in keywords(function):
            kinds = {str: WRONG_CHOICES, bool: WRONG_BOOLS}
            values = kinds.get(type(option.default), WRONG_NUMBERS) + MORE_WRONG.get(option.name, ())
            right = RIGHT.get(option.name, ())
            # By identity: a tensor is equal to nothing, elementwise.
            wrong = [value for value in values if not any(value is x for x in right)]
            place = "reference." if function is reference.gae else ""
            for value in wrong:
                yield pytest.param(function, option.name, value, id=f"{place}{function.__name__}-{option.name}-{value}")


def refusal(call: Callable[[], Any], name: str, wrong: Any) -> Exception:
    """The error of a call, which names the option, what is wanted and what was given."""
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert message.startswith((f"{name} must be ", f"{name} must not be a tensor"))
    assert ("a torch.float32 tensor of shape (2,)" if isinstance(wrong, Tensor) else repr(wrong)) in message
    return caught.value


def number_like(wrong: Any) -> bool:
    return isinstance(wrong, (int, float)) and not isinstance(wrong, bool)


def test_every_function_is_here() -> None:
    parts = {entry.function for entry in fastpref.losses.RLHF}
    assert parts <= set(CALLS)
    assert {"clip", "dual_clip", "gamma", "lam", "kl_coef", "estimator", "shift_mean", "reduction", "denominator"} < {
        option.name for function in parts for option in keywords(function)
    }


@pytest.mark.parametrize(("function", "name", "wrong"), list(wrong_options()))
def test_an_option_of_a_wrong_type_or_range(function: Any, name: str, wrong: Any) -> None:
    CALLS[function]()  # which works without the option
    error = refusal(lambda: CALLS[function](**{name: wrong}), name, wrong)
    if isinstance(wrong, (type(None), bool, dict, complex)):
        assert isinstance(error, TypeError)
    default = inspect.signature(function).parameters[name].default
    if number_like(wrong) and not isinstance(default, (str, bool)):
        assert isinstance(error, ValueError)


@pytest.mark.parametrize("wrong", [*WRONG_NUMBERS, 0], ids=str)
@pytest.mark.parametrize("name", ["init", "target", "horizon"])
def test_the_controllers_options(name: str, wrong: Any) -> None:
    options: dict[str, Any] = {"init": 0.1, "target": 6, "horizon": 1000}
    refusal(lambda: fastpref.AdaptiveKLController(**(options | {name: wrong})), name, wrong)


@pytest.mark.parametrize(("name", "wrong"), [
    *(("n", wrong) for wrong in WRONG_NUMBERS),
    *(("kl", wrong) for wrong in ("5", None, [5.0], True, 1j, torch.ones(2), math.nan)),
], ids=str)  # fmt: skip
def test_the_controllers_update(name: str, wrong: Any) -> None:
    controller = fastpref.AdaptiveKLController(0.1, 6.0, 1000)
    refusal(lambda: controller.update(**({"kl": 5.0, "n": 10} | {name: wrong})), name, wrong)
    assert controller.value == 0.1


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("wrong", ["8", [8], True, math.nan, -1], ids=str)
@pytest.mark.parametrize(("reduction", "name"), [
    ("token", "dp_size"), ("token", "batch_num_tokens"), ("sequence", "global_batch_size"),
])  # fmt: skip
def test_the_divisors_of_a_module(module: Any, wrong: Any, reduction: str, name: str) -> None:
    loss_fn = module(reduction=reduction)
    refusal(lambda: loss_fn(tokens(), tokens(), tokens(), WHOLE, **{name: wrong}), name, wrong)


@pytest.mark.parametrize("two", [2, np.float32(2), np.int64(2), Fraction(2)], ids=lambda x: type(x).__name__)
def test_any_real_number_is_a_number(two: Any) -> None:
    for function, given, wanted in (
        (fastpref.ppo_policy_loss, {"clip": two, "dual_clip": two}, {"clip": 2.0, "dual_clip": 2.0}),
        (fastpref.ppo_policy_loss, {"clip": [two, 1]}, {"clip": (2.0, 1.0)}),
        (fastpref.ppo_loss, {"value_clip": two, "value_coef": two}, {"value_clip": 2.0, "value_coef": 2.0}),
        (fastpref.kl_shaped_rewards, {"kl_coef": two}, {"kl_coef": 2.0}),
        (fastpref.gae, {"gamma": two / 2, "lam": two / 2}, {"gamma": 1.0, "lam": 1.0}),
        (fastpref.ptx_loss, {"gamma": two, "denominator": two}, {"gamma": 2.0, "denominator": 2.0}),
    ):
        assert_equal(CALLS[function](**given), CALLS[function](**wanted))
    controller = fastpref.AdaptiveKLController(two, two, 100)
    controller.update(4 * two, two)
    assert controller.value == pytest.approx(2 * (1 + 0.2 * 2 / 100))


def flat(result: Any) -> list[Tensor]:
    return [x for x in result if x is not None] if isinstance(result, (tuple, list)) else [result]


def assert_equal(found: Any, wanted: Any) -> None:
    for a, b in zip(flat(found), flat(wanted), strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


def adapters() -> list[Tensor]:
    logps = tokens().requires_grad_()
    old = tokens() / 2
    found = [
        *flat(openrlhf.PolicyLoss(0.1, 0.3, 1.5)(logps, old, old)),
        openrlhf.ValueLoss()(logps, old, old),
        *openrlhf.get_advantages_and_returns(old, old, WHOLE, 0.9, 0.8),
        *verl.compute_policy_loss(old, logps, old, WHOLE, 0.1, cliprange_high=0.3),
        *verl.compute_value_loss(logps, old, old, WHOLE, 0.2),
        *verl.compute_gae_advantage_return(old, old, WHOLE, 0.9, 0.8),
    ]
    return [*found, *torch.autograd.grad(sum(x for x in found if x.requires_grad), logps)]


def test_another_default_device_changes_nothing() -> None:
    modules = {kind: lambda kind=kind: kind()(tokens(), tokens() / 2, tokens() / 3) for kind in MODULES}
    calls = CALLS | modules | {adapters: adapters}
    for call in calls.values():
        wanted = call()
        with torch.device("meta"):
            found = call()
        assert_equal(found, wanted)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("function", [fastpref.ppo_value_loss, fastpref.gae])
def test_a_value_head_gives_one_dimension_too_many(function: Callable[..., Any], place: int) -> None:
    count = 3 if function is fastpref.ppo_value_loss else 2
    tensors = [*(tokens() for _ in range(count)), WHOLE]
    tensors[place] = tensors[place].unsqueeze(-1)
    names = list(inspect.signature(function).parameters)
    with pytest.raises(ValueError, match=rf"^{names[place]} must be .*: pass {names[place]}\.squeeze\(-1\)"):
        function(*tensors)


def test_a_kl_beyond_a_floats_range_moves_the_controller_as_far_as_any() -> None:
    controller = fastpref.AdaptiveKLController(0.1, 6.0, 100)
    controller.update(10**400, 50)
    assert controller.value == pytest.approx(0.1 * (1 + 0.2 * 50 / 100))
