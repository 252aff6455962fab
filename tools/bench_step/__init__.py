"""Throughput of the real training step, measured."""
