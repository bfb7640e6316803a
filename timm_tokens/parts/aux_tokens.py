"""MTE: auxiliary tokens for self-supervised pre-training (arXiv 2411.15787).

Auxiliary class tokens travel through the blocks beside the model's own tokens, which never see them; adaptively pooled
tokens are made from the final patches. Both teach the global token while pre-training and are dropped afterwards: the
base's outputs are the same with and without them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from timm_tokens.hooks import is_plain
from timm_tokens.ops import aux_attention_mask
from timm_tokens.ops.ranges import check_choices, check_ints

POOL_WEIGHTS = ("spatial", "channel")
POOL_NORMS = ("softmax", "none")


class AuxTokens(nn.Module):
    """Auxiliary class tokens and adaptively pooled tokens.

    Args:
        embed_dim: C, dimension of the model's tokens.
        num_cls: k_a, auxiliary class tokens: learned vectors, appended after all other tokens. Each attends to itself
            and to the patches.

    The other arguments are those of `timm_tokens.add_aux_tokens`; see `AdaptivePool` for the pooling.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a value is out of range.

    Source: MTE (arXiv 2411.15787). The paper states the two kinds of tokens, the masking and the large kernel; the
    arguments' defaults beyond that are this package's.
    """

    def __init__(
        self,
        embed_dim: int,
        num_cls: int = 6,
        num_pooled: int = 6,
        *,
        kernel_size: int = 11,
        pool_weight: str = "spatial",
        pool_norm: str = "softmax",
        aux_sees_cls: bool = False,
        aux_sees_aux: bool = False,
    ) -> None:
        super().__init__()
        check_ints(0, num_cls=num_cls, num_pooled=num_pooled)
        self.num_cls, self.num_pooled = num_cls, num_pooled
        self.aux_sees_cls, self.aux_sees_aux = aux_sees_cls, aux_sees_aux
        self.pool_options: dict[str, Any] = dict(kernel_size=kernel_size, pool_weight=pool_weight, pool_norm=pool_norm)
        self.tokens = nn.Parameter(torch.empty(num_cls, embed_dim)) if num_cls else None
        self._draw_tokens()
        self.pool = AdaptivePool(embed_dim, num_pooled, **self.pool_options) if num_pooled else None

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self._draw_tokens()
        if self.pool is not None:
            self.pool.reset_parameters()

    def _draw_tokens(self) -> None:
        if self.tokens is not None:  # each drawn separately: equal tokens would stay equal forever
            trunc_normal_(self.tokens, std=0.02)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this part again, as plain data."""
        names = ("num_cls", "num_pooled", "aux_sees_cls", "aux_sees_aux")
        return {name: getattr(self, name) for name in names} | self.pool_options

    def append(self, x: Tensor) -> Tensor:
        """The auxiliary class tokens, if there are any, after the model's own: (B, N, C) -> (B, N + k_a, C)."""
        if self.tokens is None:
            return x
        return torch.cat([x, self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)

    def mask(self, x: Tensor, num_prefix_tokens: int) -> Tensor:
        """The attention mask (1, 1, N + k_a, N + k_a) of tokens x (B, N + k_a, C), in x's dtype."""
        sees = dict(sees_prefix=self.aux_sees_cls, sees_aux=self.aux_sees_aux)
        main = x.shape[1] - self.num_cls
        return aux_attention_mask(main, num_prefix_tokens, self.num_cls, **sees, device=x.device, dtype=x.dtype)


class AdaptivePool(nn.Module):
    """Pools a map of features into k_p tokens, with weights that a large depthwise convolution reads off the map.

        u = LayerNorm(x);  w = softmax over positions of Conv(u);  token_i = LayerNorm(sum over n of w_i[n] u[n])

    It needs only a map, so it also serves backbones without attention:

        pool = AdaptivePool(model.num_features, 6)
        tokens = pool(model.forward_features(images))  # (B, 6, C) from (B, C, H, W)

    Args:
        dim: C.
        num_pooled: k_p.
        kernel_size: Side of the kernel, odd; 11 sees all of a 6 x 6 map from anywhere.
        pool_weight: "spatial": one weight map per token, whose logarithms have about unit variance at first; "channel":
            each channel has its own weights, nearly even at first. The first did better where it was measured.
        pool_norm: "softmax": weights sum to 1; "none": the convolution's output over the number of positions.

    Raises:
        TypeError: If a count is no int.
        ValueError: If a value is out of range.

    Source: MTE (arXiv 2411.15787).
    """

    def __init__(
        self,
        dim: int,
        num_pooled: int = 6,
        *,
        kernel_size: int = 11,
        pool_weight: str = "spatial",
        pool_norm: str = "softmax",
    ) -> None:
        super().__init__()
        check_ints(num_pooled=num_pooled, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        check_choices(POOL_WEIGHTS, pool_weight=pool_weight)
        check_choices(POOL_NORMS, pool_norm=pool_norm)
        self.num_pooled, self.per_channel, self.softmax = num_pooled, pool_weight == "channel", pool_norm == "softmax"
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        out, groups = (num_pooled * dim, dim) if self.per_channel else (num_pooled, 1)
        self.conv = nn.Conv2d(dim, out, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.out_norm = nn.LayerNorm(dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        self.norm.reset_parameters()
        self.out_norm.reset_parameters()
        # Per channel the weights start nearly even, as the tokens would else be mixtures of channels from everywhere.
        trunc_normal_(self.conv.weight, std=0.02 if self.per_channel else self.conv.weight[0].numel() ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled tokens (B, k_p, C) of a map x (B, C, H, W)."""
        u = self.normed(x)
        flat, weights = u.flatten(2), self.weights(u).to(u.dtype)
        equation = "bckn,bcn->bkc" if self.per_channel else "bkn,bcn->bkc"
        return self.out_norm(torch.einsum(equation, weights, flat))

    def normed(self, x: Tensor) -> Tensor:
        """A map (B, C, H, W), normed over its channels."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def weights(self, u: Tensor) -> Tensor:
        """Weights over the N positions of a normed map u (B, C, H, W): (B, C, k_p, N), or (B, k_p, N) if spatial."""
        if self.per_channel and is_plain(self.conv, nn.Conv2d):
            scores = torch.stack(list(self._depthwise(u)), 2)
        else:
            scores = self.conv(u)  # (B, C * k_p or k_p, H, W)
            scores = scores.unflatten(1, (-1, self.num_pooled)) if self.per_channel else scores
        scores = scores.flatten(-2)
        return scores.softmax(dim=-1) if self.softmax else scores / scores.shape[-1]

    def _depthwise(self, u: Tensor) -> Iterator[Tensor]:
        """What the convolution makes of a map, (B, C, H, W) for each token: at once they take CPUs twice as long."""
        for kernel in self.conv.weight.unflatten(0, (-1, self.num_pooled)).unbind(1):  # (C, 1, side, side)
            yield nn.functional.conv2d(u, kernel, padding=self.conv.padding, groups=len(kernel))
