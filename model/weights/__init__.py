"""Weights and adapters in Hugging Face's and peft's formats."""
