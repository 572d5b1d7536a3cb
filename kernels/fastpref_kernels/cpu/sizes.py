"""Sizes that the Python and the C++ operators of a CPU share."""

# Rows of a tile: more of them mean fewer passes over the weight and its gradient.
ROWS = 1024
# The number of terms of a float32 product that oneDNN sums in one chain.
SUMMED = 512
