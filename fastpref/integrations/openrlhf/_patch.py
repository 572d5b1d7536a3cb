"""Replace OpenRLHF's functions of logits by ours."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from fastpref.integrations._replace import Known, Replacement, parameters_of
from fastpref.integrations.openrlhf._scoring import compute_entropy, log_probs_from_logits

SUPPORTED = ">=0.9.3,<0.12"
"""The supported versions of OpenRLHF."""

OBJECTS = {
    f"openrlhf.models.utils:{function.__name__}": function for function in (log_probs_from_logits, compute_entropy)
}
KNOWN = Known(
    "fastpref.integrations.openrlhf.patch()",
    "openrlhf",
    SUPPORTED,
    parameters_of(OBJECTS),
    uses={"openrlhf.models.actor:Actor.forward": ("log_probs_from_logits", "compute_entropy")},
)

replacement = Replacement(everywhere=True)


def patch() -> AbstractContextManager[Any]:
    """Make OpenRLHF's actors, and the models of its DPO and SFT, score by `token_logprobs`, in this process.

    Returns:
        A context manager whose exit undoes this call. If OpenRLHF is patched already, the call and the exit do nothing.
        Without `with`, the patch stays until `unpatch`.

    Raises:
        ImportError: OpenRLHF is not installed.
        NotImplementedError: the installed OpenRLHF is not a version in `SUPPORTED`, or scores tokens in another way.
    """
    return replacement.apply(KNOWN, lambda: OBJECTS)


def unpatch() -> None:
    """Put OpenRLHF's own functions back. If OpenRLHF is not patched, do nothing.

    Raises:
        RuntimeError: one of them was replaced again after `patch`, and that replacement would be lost.
    """
    replacement.undo()
