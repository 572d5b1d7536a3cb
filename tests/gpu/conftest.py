"""What only a GPU can show: dispatch, streams, graphs and launches. The kernels' numbers are in tests/triton/launched."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
