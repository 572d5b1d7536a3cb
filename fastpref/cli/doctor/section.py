"""Sections of facts about a machine, and findings with commands that fix them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is missing, or that may surprise a user.

    Attributes:
        what: the finding.
        costs: its consequence.
        fix: a command that fixes it; empty if nothing needs to be fixed.
        is_error: whether a user would expect what is missing.
    """

    what: str
    costs: str
    fix: str = ""
    is_error: bool = True


@dataclass(frozen=True)
class Section:
    """Facts about one subject.

    Attributes:
        title: the subject.
        facts: text, a number or None by name, or a dict of these, by device for example.
        findings: the findings about the subject.
    """

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
