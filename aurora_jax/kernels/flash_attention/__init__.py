"""Flash attention for TPU: multi-query, grouped and multi-head, packed documents, ALiBi, forward and backward."""

from aurora_jax.kernels.flash_attention.ops import flash_attention

__all__ = ["flash_attention"]
