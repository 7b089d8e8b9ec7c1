"""Checkpoints: their format, and what can be done with one."""
