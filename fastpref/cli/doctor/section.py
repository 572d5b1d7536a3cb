"""What the doctor finds: sections of facts, and findings with what mends them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a user would expect and is not here, or that may surprise.

    Attributes:
        what: what is missing, or is so.
        costs: what it costs.
        mend: a command that mends it; empty where nothing need be.
        is_error: whether a user would expect it.
    """

    what: str
    costs: str
    mend: str = ""
    is_error: bool = True


@dataclass(frozen=True)
class Section:
    """Facts of one kind.

    Attributes:
        title: what they are of.
        facts: by name: text, a number or None; or these by a further name, such as the device.
        findings: what is to be said of them.
    """

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
