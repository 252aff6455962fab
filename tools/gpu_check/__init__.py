"""Whether a GPU trains as the CPU does, and how fast, in one command."""
