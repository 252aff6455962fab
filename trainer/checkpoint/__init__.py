"""Writing, finding and reading checkpoints, in the format of CHECKPOINT_FORMAT.md."""
