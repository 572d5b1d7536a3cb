"""Test attaching to models whose forward was replaced before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest

import fastpref
from tests.fastpref.integrations.transformers.attached import (
    IDS,
    LABELS,
    PEFT_WARNINGS,
    assert_as_own_logits,
    assert_close,
    assert_unchanged,
    build,
    states,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = PEFT_WARNINGS


def around_a_method(model: Any) -> Callable[..., Any]:
    own = model.forward
    return lambda *args, **kwargs: own(*args, **kwargs)


def as_trl(model: Any) -> Callable[..., Any]:
    """Return a method whose function refers to the forward that it replaces."""
    own = model.forward

    def forward(self: Any, *args: Any, extra: bool = False, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if not extra else self

    return MethodType(forward, model)


def as_accelerate(model: Any) -> Callable[..., Any]:
    model._old_forward = model.forward
    return functools.update_wrapper(functools.partial(lambda module, *a, **k: module._old_forward(*a, **k), model), own)


def around_the_model(model: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: type(model)._own_class.forward(model, *args, **kwargs)


def own(*args: Any, **kwargs: Any) -> None:
    """Give `functools.update_wrapper` a forward to copy from."""


def that_counts(model: Any) -> Callable[..., Any]:
    own, calls = model.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        forward.calls = calls  # type: ignore[attr-defined]
        return own(*args, **kwargs)

    return forward


def that_hold_each_other(model: Any) -> Callable[..., Any]:
    own = model.forward

    def first(*args: Any, depth: int = 0, **kwargs: Any) -> Any:
        return second(*args, depth=depth + 1, **kwargs) if depth < 2 else own(*args, **kwargs)

    def second(*args: Any, **kwargs: Any) -> Any:
        return first(*args, **kwargs)

    return first


def with_an_empty_cell(model: Any) -> Callable[..., Any]:
    own = model.forward
    if own is None:
        later = 1

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if kwargs is not None else later

    return forward


def in_a_default(model: Any) -> Callable[..., Any]:
    return lambda *args, own=model.forward, **kwargs: own(*args, **kwargs)


def in_a_keyword(model: Any) -> Callable[..., Any]:
    return functools.partial(lambda *args, own, **kwargs: own(*args, **kwargs), own=model.forward)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "patch",
    [
        around_a_method,
        as_trl,
        as_accelerate,
        around_the_model,
        that_counts,
        that_hold_each_other,
        with_an_empty_cell,
        in_a_default,
        in_a_keyword,
    ],
)
def test_a_forward_patched_before_attach_is_run(patch: Callable[[Any], Any], nested: bool) -> None:
    model = build()
    model.forward = forward = patch(model)
    if nested:
        model.forward = forward = around_a_method(model)
    fastpref.attach(model)
    before = states(model)
    assert_as_own_logits(model)
    assert_unchanged(model, before)
    assert fastpref.detach(model).forward is forward


def test_a_patch_keeps_its_own_state() -> None:
    model = build()
    model.forward = forward = that_counts(model)
    fastpref.attach(model)
    for _ in range(3):
        model(IDS, labels=LABELS, fastpref=True)
    model(IDS)
    assert forward.calls == 4  # type: ignore[attr-defined]


class Opaque:
    def __init__(self, model: Any) -> None:
        self.own = model.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.own(*args, **kwargs)


@pytest.mark.parametrize("verify", [False, True])
def test_a_forward_that_cannot_be_followed_is_refused(verify: bool) -> None:
    model = build()
    model.forward = Opaque(model)
    logits = model(IDS).logits
    fastpref.attach(model, verify=verify)
    with pytest.raises(NotImplementedError, match=r"replaced before attach by .*Opaque"):
        model(IDS, labels=LABELS, fastpref=True)
    assert_close(model(IDS).logits, logits)
