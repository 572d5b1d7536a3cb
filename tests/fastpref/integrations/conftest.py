from __future__ import annotations

import importlib
import sys

import pytest


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    if "trl" in sys.modules:
        base = importlib.import_module("trl.trainer.base_trainer")
        monkeypatch.setattr(base, "send_telemetry", lambda *args, **kwargs: None, raising=False)
