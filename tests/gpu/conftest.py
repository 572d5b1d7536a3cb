"""What only a GPU can show: dispatch, graphs and launches. What the kernels compute is in tests/triton/launched."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
