"""Handing a model on: its card, its upload, and a conversation with it."""
