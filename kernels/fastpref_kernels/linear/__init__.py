"""Log-probs from hidden states and the LM head, for every device: library products, and row passes of ours.

The scored rows are gathered first. Then, for a chunk of rows, the vocabulary is gone over a tile of columns at a time:
a product writes the tile's logits in float32, and a fold adds them to each row's sums, on a CPU while they are in the
cache. No logit is ever rounded below float32, and no more of them exist at a time than a tile.

With e_j = exp(z_j - a), s = Σ_{j≠y} e_j and S = s + e_y:

    log p_y    = -log1p(s·exp(a - z_y))
    ∂/∂z_j     = e_j / S, and -s / S at the label, each with the sign turned

The anchor a is the label's logit as a dot product of its own gives it. It is only near the z_y of the tile, which is
the one that counts: rounded like all others of its row, it leaves a common offset without effect. A row whose sum would
pass 2^60, or 2^10 where an entropy is wanted, moves its anchor up to its maximum.

So where a row's e (with -s in the label's place) was kept, both gradients are library products of it, whatever the
upstream gradient g: d_hidden = -diag(g/S)·(e·W) and d_weight = -eᵀ·(diag(g/S)·X). Nothing cancels, at any log-prob.
Where it was not kept, the logits are made again, and a second fold turns them into the gradient.

The host never waits for the device where it is told how many rows are scored: `rows.py` says how.
"""

from fastpref_kernels.linear.backend import (
    COLUMNS,
    ENTROPY_LIMIT,
    LIMIT,
    LOSS_BYTES,
    Backend,
    Tile,
    widened,
)
from fastpref_kernels.linear.backward import accumulate_gradients, gradients, scaled_gradient
from fastpref_kernels.linear.finalize import finalize_shard
from fastpref_kernels.linear.forward import fold_shard, logprobs, shard_labels
from fastpref_kernels.linear.library import empty, library_backend, library_product
from fastpref_kernels.linear.rows import INVALID, UNSCORED, Rows
from fastpref_kernels.linear.tile import fold, fold_backward

__all__ = [
    "COLUMNS",
    "ENTROPY_LIMIT",
    "INVALID",
    "LIMIT",
    "LOSS_BYTES",
    "UNSCORED",
    "Backend",
    "Rows",
    "Tile",
    "accumulate_gradients",
    "empty",
    "finalize_shard",
    "fold",
    "fold_backward",
    "fold_shard",
    "gradients",
    "library_backend",
    "library_product",
    "logprobs",
    "scaled_gradient",
    "shard_labels",
    "widened",
]
