"""Programs around a training run; each is run as `python -m tools.<name>`."""
