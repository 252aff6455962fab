"""The start of a job of several processes: what they must agree on, and what one of them makes for all."""
