"""Rotary embedding and attention for rows that hold several examples."""
