"""Log-probs from hidden states and the LM head, for every device: library products, and row passes of ours.

The scored rows are gathered first. For each chunk of rows, the vocabulary is then processed one tile of columns at a
time. A product writes the tile's logits in float32, and a fold adds them to each row's sums, on a CPU while they are in
the cache. No logit is ever rounded below float32, and no more than a tile of logits exists at a time.

With e_j = exp(z_j - a), s = Σ_{j≠y} e_j and S = s + e_y:

    log p_y    = -log1p(s·exp(a - z_y))
    ∂/∂z_j     = e_j / S, and -s / S at the label, each with the opposite sign

The anchor a is the label's logit, computed by a separate dot product. It is close to the tile's z_y, but may differ by
rounding. The formulas use the tile's z_y, because it is rounded like all other logits of its row, so that a common
offset has no effect. If a row's sum would exceed 2^60, or 2^10 with an entropy, the row moves its anchor up to its
maximum.

If a row's e (with -s in the label's place) was kept, both gradients are library products of it, for any upstream
gradient g: d_hidden = -diag(g/S)·(e·W) and d_weight = -eᵀ·(diag(g/S)·X). Nothing cancels, at any log-prob. If it was
not kept, the logits are computed again, and a second fold turns them into the gradient.

The host never waits for the device if the caller says how many rows are scored: see `rows.py`.
"""

from fastpref_kernels.eager.linear import fold, fold_backward
from fastpref_kernels.linear.backend import LOSS_BYTES, Backend, Tile
from fastpref_kernels.linear.backward import linear_logprobs_backward, linear_logprobs_backward_, scaled_gradient
from fastpref_kernels.linear.finalize import linear_finalize
from fastpref_kernels.linear.forward import linear_fold, linear_logprobs, shard_labels
from fastpref_kernels.linear.library import empty, library_backend, library_product
from fastpref_kernels.linear.rows import Rows

__all__ = [
    "LOSS_BYTES",
    "Backend",
    "Rows",
    "Tile",
    "empty",
    "fold",
    "fold_backward",
    "library_backend",
    "library_product",
    "linear_finalize",
    "linear_fold",
    "linear_logprobs",
    "linear_logprobs_backward",
    "linear_logprobs_backward_",
    "scaled_gradient",
    "shard_labels",
]
