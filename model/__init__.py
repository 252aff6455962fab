"""Llama in parallel layers, LoRA, and weights in Hugging Face's format."""
