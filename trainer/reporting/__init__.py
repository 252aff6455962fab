"""What a run says of itself: lines in files, a bar or log lines, and curves for TensorBoard and W&B."""
