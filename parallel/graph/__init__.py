"""The graphs that torch_xla records: found, compared, read as HLO."""
