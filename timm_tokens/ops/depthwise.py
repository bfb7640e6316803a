"""Depthwise convolution by several large kernels a channel, with a weight gradient that CPUs are fast at."""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS = 64  # at once in the weight gradient, which takes side times the memory of so much of the map


def depthwise_convs(x: Tensor, kernels: Tensor) -> tuple[Tensor, ...]:
    """The maps (B, C, H, W) that each of K depthwise kernels makes of a map (B, C, H, W), zeros around it.

    What F.conv2d(x, weight, padding=side // 2, groups=C) gives for a weight of (K C, 1, side, side), channel by
    channel K kernels. With more than one kernel a channel, and in the gradient of large ones, that takes several times
    longer on CPUs; here the gradient of the kernels is a matrix product for each channel.

    Args:
        kernels: (K, C, side, side), side odd.

    Raises:
        ValueError: If shapes do not fit.
    """
    if kernels.ndim != 4 or x.ndim != 4 or kernels.shape[1] != x.shape[1] or kernels.shape[-1] % 2 == 0:
        raise ValueError(
            f"kernels must be (K, C, side, side) with an odd side, got {tuple(kernels.shape)} for {tuple(x.shape)}"
        )
    if not torch.is_grad_enabled():  # there torch 2.6 can't compile a function with a gradient of its own
        return tuple(_conv(x, kernel) for kernel in kernels)
    maps: tuple[Tensor, ...] = _DepthwiseConvs.apply(x, kernels)
    return maps


class _DepthwiseConvs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, kernels)
        return tuple(_conv(x, kernel) for kernel in kernels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, kernels = ctx.saved_tensors
        flipped = kernels.flip(-2, -1).to(grads[0].dtype)
        of_x = reduce(torch.add, (_conv(grad, kernel) for grad, kernel in zip(grads, flipped, strict=True)))
        parts = zip(*(torch.split(part, CHANNELS, 1) for part in (x, *grads)), strict=True)
        of_kernels = torch.cat([_of_kernels(part, torch.stack(given), kernels.shape[-1]) for part, *given in parts], 1)
        return of_x.to(x.dtype), of_kernels.to(kernels.dtype)


def _conv(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel.unsqueeze(1), padding=kernel.shape[-1] // 2, groups=len(kernel))


def _of_kernels(x: Tensor, grads: Tensor, side: int) -> Tensor:
    """The gradient (K, C, side, side) of the kernels, by grads (K, B, C, H, W) of what they made of x (B, C, H, W).

    For each row of the kernel: products of all columns of x and of the gradient, summed where they are as far apart.
    """
    count, width, reach = len(grads), x.shape[-1], side // 2
    rows = F.pad(x.transpose(0, 1), (0, 0, reach, reach)).unfold(2, side, 1)  # (C, B, H, W, side)
    rows = rows.permute(0, 4, 3, 1, 2).flatten(3).flatten(1, 2)  # -> (C, side W, B H)
    given = grads.permute(2, 1, 3, 0, 4).flatten(3).flatten(1, 2)  # -> (C, B H, K W)
    products = (rows.to(given.dtype) @ given).view(-1, side, width, count, width)
    sums = products.new_zeros(len(products), side, count, 2 * width - 1)
    for column in range(width):  # of the gradient
        sums[..., width - 1 - column : 2 * width - 1 - column] += products[..., column].transpose(2, 3)
    return F.pad(sums, (reach + 1 - width,) * 2).permute(2, 0, 1, 3)
