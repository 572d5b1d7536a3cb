"""The operators in PyTorch, for a CPU without a compiler and for devices without kernels of ours."""
