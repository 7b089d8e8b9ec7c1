"""Continual pretraining of StarCoder-family models on TPU: PyTorch weights in, Flax on a mesh, PyTorch weights out."""
