"""Flags, the training loop, the optimizer, checkpoints and metrics."""
