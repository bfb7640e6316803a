"""The running mean of a teacher's logits, which keeps a prototype from winning everything."""

import torch
from torch import Tensor, nn

from timm_tokens.distributed import all_reduce_sum, batch_size


class Center(nn.Module):
    """Exponential moving average of logits over the global batch, subtracted from them.

    Args:
        *shape: Shape of what is averaged: (K,), or (T, K) for one centre per token.
        momentum: Share of the old value that is kept at each update.

    Raises:
        ValueError: If momentum is not in [0, 1).

    Source: DINO (arXiv 2104.14294), equation 4.
    """

    value: Tensor

    def __init__(self, *shape: int, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"the centre's momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(shape))

    def forward(self, logits: Tensor) -> Tensor:
        """Centred logits, in float32: (..., *shape) -> (..., *shape)."""
        return logits.float() - self.value

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move towards the mean of logits (B, *shape). A batch without any, on all processes, leaves it as it is."""
        count = batch_size(logits)
        mean = all_reduce_sum(logits.float().sum(0)) / count.clamp(min=1)
        self.value.lerp_(mean, (1 - self.momentum) * (count > 0))

    def extra_repr(self) -> str:
        return f"{tuple(self.value.shape)}, momentum={self.momentum}"
