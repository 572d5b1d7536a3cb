"""Replace verl's functions of logits and hidden states, and its advantages, by ours."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from fastpref.integrations._replace import Known, Replacement, parameters_of
from fastpref.integrations.verl._losses import compute_gae_advantage_return
from fastpref.integrations.verl._scoring import (
    FusedLinearForPPO,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    logprobs_from_logits,
)

SUPPORTED = ">=0.9,<0.10"
"""The supported versions of verl."""

OBJECTS = {
    "verl.utils.torch_functional:logprobs_from_logits": logprobs_from_logits,
    "verl.utils.torch_functional:entropy_from_logits": entropy_from_logits,
    "verl.utils.torch_functional:entropy_from_logits_with_chunking": entropy_from_logits_with_chunking,
    "verl.utils.experimental.torch_functional:FusedLinearForPPO": FusedLinearForPPO,
    "verl.trainer.ppo.core_algos:compute_gae_advantage_return": compute_gae_advantage_return,
}
KNOWN = Known(
    "fastpref.integrations.verl.patch()",
    "verl",
    SUPPORTED,
    parameters_of(OBJECTS),
    uses={
        "verl.utils.torch_functional:log_probs_from_logits_response": ("logprobs_from_logits",),
        "verl.models.transformers.dense_common:forward_with_torch_backend": ("FusedLinearForPPO",),
    },
)

replacement = Replacement(everywhere=True)


def patch() -> AbstractContextManager[Any]:
    """Make verl score tokens and compute advantages by fastpref, in this process.

    Call it before engines are built, because they keep references to functions.

    Returns:
        A context manager whose exit undoes this call. If verl is patched already, the call and the exit do nothing.
        Without `with`, the patch stays until `unpatch`.

    Raises:
        ImportError: verl is not installed.
        NotImplementedError: the installed verl is not a version in `SUPPORTED`, or scores tokens in another way.
    """
    return replacement.apply(KNOWN, lambda: OBJECTS)


def unpatch() -> None:
    """Put verl's own functions back. If verl is not patched, do nothing.

    Raises:
        RuntimeError: one of them was replaced again after `patch`, and that replacement would be lost.
    """
    replacement.undo()
