"""Conversion between PyTorch (Hugging Face) checkpoints, of StarCoder's family and BLOOM's, and ours: both
ways, in constant memory."""
