"""Depthwise convolutions equal F.conv2d, gradients and all."""

import pytest
import torch
import torch.nn.functional as F

from timm_tokens.ops.depthwise import depthwise_convs


@pytest.mark.parametrize("side", [1, 3, 7, 11])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 70, 5, 3), (3, 2, 1, 1), (2, 2, 9, 14)])
def test_it_equals_conv2d(side, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(3, shape[1], side, side, dtype=torch.float64, requires_grad=True)
    found = torch.stack(depthwise_convs(x, kernels), 2)
    weight = kernels.transpose(0, 1).flatten(0, 1).unsqueeze(1)
    expected = F.conv2d(x, weight, padding=side // 2, groups=shape[1]).unflatten(1, (-1, 3))
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, (x, kernels), grad) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_map_that_is_not_used_gets_no_gradient():
    x, kernels = torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(2, 2, 3, 3, requires_grad=True)
    depthwise_convs(x, kernels)[0].sum().backward()
    assert kernels.grad[0].any() and not kernels.grad[1].any()


def test_mixed_precision():
    x, kernels = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        maps = depthwise_convs(x, kernels)
    assert maps[0].dtype == torch.bfloat16
    grad = torch.randn_like(maps[0].float())
    found = torch.autograd.grad([m.float() for m in maps], (x, kernels), [grad, grad])
    plain = torch.autograd.grad(depthwise_convs(x, kernels), (x, kernels), [grad, grad])
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0.05 * b.abs().max().item(), rtol=0.05)


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (2, 4, 4, 4), (4, 3, 3)])
def test_what_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"must be \(K, C, side, side\) with an odd side, got"):
        depthwise_convs(torch.randn(1, 4, 5, 5), torch.randn(shape))
