"""Sharded checkpoints to a Hugging Face model, or to a peft adapter."""
