"""The mode that finds waits for a GPU is put back, whatever happens: left on, it would fail every later test."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.synchronisation import no_synchronisation

PROTOTYPE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that are set, each with the warning that PyTorch gives for its first."""
    found: list[str] = []

    def set_mode(mode: str) -> None:
        found.append(mode)
        if mode == "error":
            warnings.warn(PROTOTYPE, UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return found


def test_its_own_warning_is_no_error(modes: list[str]) -> None:
    with no_synchronisation():
        assert modes == ["error"]
    assert modes == ["error", "default"]


def test_is_put_back_after_an_error(modes: list[str]) -> None:
    with pytest.raises(RuntimeError, match="waited"), no_synchronisation():
        raise RuntimeError("waited")
    assert modes == ["error", "default"]


def test_other_warnings_are_left_alone(modes: list[str]) -> None:
    with no_synchronisation(), pytest.raises(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)
    assert modes[-1] == "default"
