"""A bias on keys that learns: the same attention and gradients, without a matrix of scores kept."""

import pytest
import tiny
import torch
from torch.nn.functional import scaled_dot_product_attention

from timm_tokens.ops.attention import LearnableBias, aligned, size_bias


def attention(bias, **options):
    """Attention under a bias (2, 1, 1, 7), its gradients, and the shapes of what it keeps for them."""
    generator, kept = torch.Generator().manual_seed(0), []
    q, k, v, out = torch.randn(4, 2, 3, 7, 4, dtype=torch.float64, generator=generator).unbind()
    inputs = [t.requires_grad_() for t in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        result = scaled_dot_product_attention(*inputs, attn_mask=bias, **options)
    return [result, *torch.autograd.grad(result, [*inputs, bias], out)], kept


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": False, "dropout_p": 0.0}])
def test_a_learnable_bias_is_the_same_bias(options):
    size = torch.rand(2, 7) * 3
    bias = size_bias(size).double().requires_grad_()
    expected, all_kept = attention(bias, **options)
    results, kept = attention(bias.as_subclass(LearnableBias), **options)
    for ours, torchs in zip(results, expected, strict=True):
        assert type(ours) is torch.Tensor or ours is results[-1]
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), torchs, atol=1e-10, rtol=1e-10)
    assert any(shape[-2:] == (7, 7) for shape in all_kept)
    assert not any(shape[-2:] == (7, 7) for shape in kept)


@pytest.mark.parametrize("freeze", [False, True])
def test_training_a_merger_keeps_no_matrix_of_scores(freeze):
    model, kept = tiny.merging(base_args=dict(reg_tokens=1)).freeze_base(freeze).train(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        model(tiny.images())
    assert not any(shape[-2:] == (18, 18) for shape in kept)


def test_everywhere_else_it_is_a_tensor():
    bias = torch.randn(1, 1, 1, 5, requires_grad=True).as_subclass(LearnableBias)
    assert type(torch.zeros(1, 2, 5, 5) + bias) is torch.Tensor
    assert torch.equal(torch.zeros(1, 1, 1, 5) + bias, bias.as_subclass(torch.Tensor))


def test_a_bias_on_a_gpu_has_padded_rows():
    class OnGPU(torch.Tensor):
        is_cuda = True

    bias = torch.randn(2, 1, 1, 37)
    rows = aligned(bias.as_subclass(OnGPU), torch.bfloat16)
    assert rows.stride() == (40, 40, 40, 1) and torch.equal(rows.as_subclass(torch.Tensor), bias.bfloat16())
    assert aligned(bias, torch.bfloat16).is_contiguous()
