"""Conversion between PyTorch (Hugging Face) checkpoints of the StarCoder family and ours, in both directions, in constant memory."""
