"""Pseudo-labels that use all prototypes alike: Sinkhorn-Knopp, as SwAV takes it (arXiv 2006.09882).

Shapes: B samples, K prototypes.
"""

import math

import torch
from torch import Tensor

from timm_tokens.distributed import batch_logmeanexp
from timm_tokens.ops.precision import at_least_float32


@torch.no_grad()
def sinkhorn_assign(logits: Tensor, tau: float = 0.05, iterations: int = 3) -> Tensor:
    """Assign samples to prototypes, each to an equal share of the batch: the usual alternative to `mira_assign`.

    Starting from exp(z / tau), each iteration scales the columns to equal sums over the global batch,
    and then the rows to 1.

    Args:
        logits: (B, K) z, any finite values.
        tau: Temperature of the logits.
        iterations: Rounds of scaling; 0 is the softmax.

    Returns:
        (B, K) of float32 (float64 for float64), rows that sum to 1. No gradient passes.

    Raises:
        ValueError: If logits is not (B, K), tau not positive, or iterations negative.

    Source: SwAV (arXiv 2006.09882), section 3.1 and listing 1.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (B, K), got {tuple(logits.shape)}")
    if not 0 < tau < math.inf:
        raise ValueError(f"tau must be a positive number, got {tau}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    log_q = at_least_float32(logits) / tau
    most = torch.finfo(log_q.dtype).max / 4  # logits may be finite, and leave their type's range over tau
    log_q.clamp_(-most, most)
    for _ in range(iterations):  # in logarithms, where no prototype and no sample can underflow to 0 / 0
        log_q = (log_q - batch_logmeanexp(log_q)).log_softmax(1)
    return log_q.softmax(1)
