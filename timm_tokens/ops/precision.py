"""The precision in which sums over many numbers are taken."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they are."""
    return x if x.dtype == torch.float64 else x.float()
