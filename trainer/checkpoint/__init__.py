"""Writing, finding and reading checkpoints, in the format of docs/checkpoint-format.md."""
