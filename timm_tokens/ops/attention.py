"""Attention masks and biases: everything the methods do to attention is added to its scores."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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


def aligned(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias (..., N) in the type that attention reads it in, on a GPU with rows that begin at multiples of 8 numbers.

    cuDNN's attention, which torch takes in half precision on newer GPUs, is up to twice as fast for it.
    """
    if not bias.is_cuda:
        return bias.to(dtype)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    n = bias.shape[-1]
    return bias.new_zeros(*bias.shape[:-1], n + -n % 8, dtype=dtype)[..., :n].copy_(bias)


class LearnableBias(Tensor):
    """A bias on keys (B, 1, 1, N) that gets a gradient without the scores being kept.

    No fused attention of torch's on a CPU gives the gradient of a mask: the scores (B, heads, N, N) are then computed,
    and kept, one operation after the other. As one more channel of queries (a constant) and keys (the bias), it is no
    mask, and the same. `torch.nn.attention.bias` gives its masks to fused attention in this way.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:
                return _attend(*args, **kwargs or {})
            return func(*args, **kwargs or {})


def _attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
    """Attention of q, k, v (B, heads, N, D), where a bias on the keys (B, 1, 1, N) is a channel of q and k."""
    scale = options.pop("scale", None) or q.shape[-1] ** -0.5
    bias = attn_mask.mT.to(k.dtype)

    def wider(x: Tensor, channel: Tensor) -> Tensor:
        return torch.cat([x, channel.expand(*x.shape[:-1], 1)], dim=-1)  # faster than pad, and so is its gradient

    q, k, v = wider(q, q.new_tensor(1 / scale)), wider(k, bias), wider(v, v.new_zeros(()))
    return scaled_dot_product_attention(q, k, v, scale=scale, **options)[..., :-1]


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
        sees_prefix: Auxiliary tokens also see the prefix tokens.
        sees_aux: Auxiliary tokens also see each other.

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
