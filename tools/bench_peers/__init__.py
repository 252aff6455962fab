"""A training step of markstep compared with those of trl and of a plain loop on torch_xla."""
