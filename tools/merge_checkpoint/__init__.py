"""Sharded checkpoints -> a Hugging Face model, or a peft adapter."""
