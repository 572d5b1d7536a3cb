"""The losses in plain PyTorch, each stated once."""
