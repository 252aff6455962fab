"""Ranks, the mesh they form, collectives, and the layers sharded over it."""
