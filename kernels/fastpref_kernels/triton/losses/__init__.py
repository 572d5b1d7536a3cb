"""Losses of log-probs and rewards: one launch gives the loss and its partial derivatives."""
