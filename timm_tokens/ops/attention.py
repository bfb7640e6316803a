"""Attention masks and biases: everything the methods do to attention is added to its scores."""

from torch import Tensor


def size_bias(size: Tensor) -> Tensor:
    """Additive attention bias by which a token counts as many times as it has members: (B, N) -> (B, 1, 1, N).

    log(size + 1e-6): the gradient of log alone is infinite at size 0, which relaxed merging reaches, and clamping the
    size instead would kill the gradient of the tokens that fade.

    Source: proportional attention, ToMe (arXiv 2210.09461), equation 1.
    """
    return (size.float() + 1e-6).log_().unsqueeze(1).unsqueeze(1)
