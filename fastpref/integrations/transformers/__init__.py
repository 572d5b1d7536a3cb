"""Get log-probs from a transformers causal LM without its logits: `attach(model)`, then `model(..., fastpref=True)`.

A scored call runs the model's own forward, so hooks of DDP, FSDP, ZeRO and accelerate run as in any call. It runs it on
a shallow copy of the model whose head, the output embeddings, has another forward. That forward computes log-probs from
the head's weight, or calls the function given as `fastpref`, such as a loss; the copy of the model goes on with one row
of zeros as its logits. Using the head's weight outside the model's call would miss the hooks that gather it.
"""

from fastpref.integrations.transformers._attach import attach, detach

__all__ = ["attach", "detach"]
