"""The keys of a block's attention, which tokens are compared by: training-free, and at the start of training.

What a module computes is obtained by calling it. Its weights are read instead only where nothing could tell: a plain
linear map without hooks, whose average over heads is one small linear map.
"""

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from timm_tokens.hooks import before, is_ordinary, is_plain, sees_calls
from timm_tokens.outputs import evaluating
from timm_tokens.timm_types import Attention


def mean_keys(attn: Attention, y: Tensor) -> Tensor:
    """The attention's keys of what it reads, averaged over heads: (B, N, C) -> (B, N, head_dim)."""
    if attn._forward_pre_hooks:  # which may change what the attention reads; FSDP2's gathers its weights
        y = before(attn, (y,), {})[0][0]
    width, norm = attn.head_dim, attn.k_norm
    if type(norm) is nn.Identity and not sees_calls(norm):
        weights = _weights(attn)
        if weights is not None:
            weight, bias = weights
            return linear(y, _mean(weight, 1, width), None if bias is None else _mean(bias, 1, width))
    keys = _keys(attn, y).unflatten(-1, (-1, width)).transpose(1, 2)  # (B, heads, N, head_dim), as the norm wants them
    return norm(keys).mean(dim=1)


@torch.no_grad()
def mean_projection(attn: Attention, unit: Tensor, width: int) -> tuple[Tensor, Tensor] | None:
    """Weight (E, C) and bias (E,) that make the keys, averaged over as many groups of heads as give E = width channels.

    Where the keys are not made by a plain linear map, the map is read off what becomes of the unit vectors (C, C). None
    if the heads can't be grouped to that width.
    """
    weight, bias = _weights(attn) or _probed(attn, unit)
    groups, rest = divmod(width, attn.head_dim)
    if rest or len(weight) // attn.head_dim % groups:
        return None
    mean_bias = weight.new_zeros(width) if bias is None else _mean(bias, groups, attn.head_dim)
    return _mean(weight, groups, attn.head_dim), mean_bias


def _mean(weight: Tensor, groups: int, head_dim: int) -> Tensor:
    """Rows of all heads, averaged over the heads of each group: (heads * head_dim, ...) -> (groups * head_dim, ...)."""
    return weight.unflatten(0, (groups, -1, head_dim)).mean(dim=1).flatten(0, 1)


def _keys(attn: Attention, y: Tensor) -> Tensor:
    """The keys of all heads, before their norm, by the calls that the attention makes: (B, N, heads * head_dim)."""
    if attn.qkv is None:
        return attn.k_proj(y)
    bias, reads_weight = _bias_apart(attn)
    keys = (linear(y, attn.qkv.weight) if reads_weight else attn.qkv(y)).chunk(3, dim=-1)[1]
    return keys if bias is None else keys + bias


def _weights(attn: Attention) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias that make the keys; None where reading them is not the same as calling the module."""
    if attn.qkv is None:
        return (attn.k_proj.weight, attn.k_proj.bias) if is_plain(attn.k_proj) else None
    qkv, (bias, reads_weight) = attn.qkv, _bias_apart(attn)
    if not (is_ordinary(qkv.weight) if reads_weight else is_plain(qkv)):
        return None
    if bias is None and qkv.bias is not None:
        bias = qkv.bias.chunk(3)[1]
    return qkv.weight.chunk(3)[1], bias


def _bias_apart(attn: Attention) -> tuple[Tensor | None, bool]:
    """The bias that EvaAttention keeps apart from its layers, and whether it then reads a weight past its module."""
    if type(attn) in (timm.layers.Attention, timm.layers.AttentionRope, timm.layers.DiffAttention):
        return None, False  # a missing attribute takes long to look up
    bias = getattr(attn, "k_bias", None)
    return bias, bias is not None and not attn.qkv_bias_separate


def _probed(attn: Attention, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map that makes the keys, from the keys of 0 and of the unit vectors (C, C), without dropout."""
    with evaluating(attn):
        keys = _keys(attn, torch.cat([torch.zeros_like(unit[:1]), unit]).unsqueeze(0))[0]  # (1 + C, heads * head_dim)
    return (keys[1:] - keys[0]).T, keys[0]
