"""Attention masks and biases: everything the methods do to attention is added to its scores."""

import torch
from torch import Tensor

from timm_tokens.ops.ranges import check_counts


def size_bias(size: Tensor, eps: float = 1e-6) -> Tensor:
    """Additive attention bias by which a token counts as many times as it has members: (B, N) -> (B, 1, 1, N).

    Args:
        size: (B, N) how many members each token has.
        eps: Added to the size: the gradient of log alone is infinite at size 0, which relaxed merging reaches, and
            clamping the size instead would kill the gradient of the tokens that fade. Sizes of at least 1 need none.

    Source: proportional attention, ToMe (arXiv 2210.09461), equation 1.
    """
    size = size.float() + eps if eps else size.float()
    return size.log().unsqueeze(1).unsqueeze(1)


def aux_attention_mask(
    num_tokens: int,
    num_prefix_tokens: int,
    num_aux: int,
    *,
    sees_prefix: bool = False,
    sees_aux: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Additive attention mask for auxiliary tokens that stand after the model's own tokens.

    The model's own tokens never see an auxiliary token; so dropping those changes nothing. An auxiliary token sees the
    patches and itself.

    Args:
        num_tokens: N, the model's own tokens, P = num_prefix_tokens of them first that are no patches.
        num_aux: A, auxiliary tokens.
        sees_prefix: Auxiliary tokens also see the prefix tokens. sees_aux: they also see each other.

    Returns:
        (1, 1, N + A, N + A), queries by keys: 0 where the key is seen, -inf where not.

    Raises:
        ValueError: A number of tokens is negative, or the prefix has more than there are.

    Source: MTE (arXiv 2411.15787): class and patch tokens are masked from the auxiliary class tokens.
    """
    check_counts(0, num_prefix_tokens=num_prefix_tokens, num_aux=num_aux)
    if num_tokens < num_prefix_tokens:
        raise ValueError(f"num_tokens must be at least the {num_prefix_tokens} of the prefix, got {num_tokens}")
    hidden = float("-inf")
    mask = torch.zeros(num_tokens + num_aux, num_tokens + num_aux, device=device, dtype=dtype)  # made for each block
    mask[:num_tokens, num_tokens:] = hidden
    if not sees_aux:
        itself = torch.eye(num_aux, device=device, dtype=torch.bool)
        mask[num_tokens:, num_tokens:].masked_fill_(~itself, hidden)
    if not sees_prefix:
        mask[num_tokens:, :num_prefix_tokens] = hidden
    return mask.unsqueeze(0).unsqueeze(0)
