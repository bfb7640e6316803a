"""Pure functions on tensors: everything here needs torch alone and holds no state."""

from timm_tokens.ops.intrinsic_dim import local_intrinsic_dimensionality

__all__ = ["local_intrinsic_dimensionality"]
