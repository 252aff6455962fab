"""The graphs of a step, traced without a machine, and read."""
