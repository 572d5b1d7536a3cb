"""The statistics' bits and the sums' planes of the contract, as constants of kernels."""

from __future__ import annotations

import triton.language as tl

from fastpref_kernels.contract import ROW_SUM, Statistic

LSE: tl.constexpr = tl.constexpr(Statistic.LSE.value)
ENTROPY: tl.constexpr = tl.constexpr(Statistic.ENTROPY.value)
MEAN_LOGITS: tl.constexpr = tl.constexpr(Statistic.MEAN_LOGITS.value)
IS_TOP1: tl.constexpr = tl.constexpr(Statistic.IS_TOP1.value)
LOG_SUM_SQ_PROBS: tl.constexpr = tl.constexpr(Statistic.LOG_SUM_SQ_PROBS.value)
TOP2_MARGIN: tl.constexpr = tl.constexpr(Statistic.TOP2_MARGIN.value)
DROPPED_MASS: tl.constexpr = tl.constexpr(Statistic.DROPPED_MASS.value)
# Both of these need the largest logit beside the label.
HIGHEST: tl.constexpr = tl.constexpr((Statistic.IS_TOP1 | Statistic.TOP2_MARGIN).value)

# The planes of `contract.RowSums`.
ANCHOR: tl.constexpr = tl.constexpr(ROW_SUM["anchor"])
REST: tl.constexpr = tl.constexpr(ROW_SUM["rest"])
WEIGHTED: tl.constexpr = tl.constexpr(ROW_SUM["weighted"])
SQUARES: tl.constexpr = tl.constexpr(ROW_SUM["squares"])
TOTAL: tl.constexpr = tl.constexpr(ROW_SUM["total"])
BEFORE: tl.constexpr = tl.constexpr(ROW_SUM["before"])
AFTER: tl.constexpr = tl.constexpr(ROW_SUM["after"])
LABEL: tl.constexpr = tl.constexpr(ROW_SUM["label"])
SECOND: tl.constexpr = tl.constexpr(ROW_SUM["second"])

# Stands in for the logarithm of 0, so that 0 times it is 0.
FLOOR: tl.constexpr = tl.constexpr(-1e30)
