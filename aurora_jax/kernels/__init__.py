"""Pallas kernels for TPU; each folder has its plain reference beside it."""
