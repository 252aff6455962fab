"""Lengths of examples such as those of databricks-dolly-15k, for benchmarks that need no data set."""

import numpy as np

MEDIAN, MEAN, SHORTEST, LONGEST = 110, 205, 12, 5000  # tokens


def draw_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    """Log-normal lengths in tokens, int64 [count]."""
    lengths = rng.lognormal(np.log(MEDIAN), np.sqrt(2 * np.log(MEAN / MEDIAN)), count)
    return lengths.round().clip(SHORTEST, LONGEST).astype(np.int64)
