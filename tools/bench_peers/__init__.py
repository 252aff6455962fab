"""A step beside trl's and a plain loop on torch_xla."""
