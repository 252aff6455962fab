"""Checkpoints: names, written, read."""
