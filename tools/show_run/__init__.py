"""A run as one page for a browser: curves, configuration, evaluations, answers."""
