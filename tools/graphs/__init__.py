"""The graphs of a training step: traced without a machine, read, and reported."""
