import pytest
import torch

from timm_tokens.ops import sinkhorn_assign


def slow_assign(logits, tau, iterations):
    """As SwAV's listing: a matrix whose rows and columns are scaled in turn."""
    q = (logits.double() / tau).exp().T  # (K, B)
    k, b = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q / q.sum(0, keepdim=True)).T.float()


@pytest.mark.parametrize("iterations", [0, 1, 3, 20])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_equals_the_listing(tau, iterations):
    logits = torch.rand(12, 7) * 2 - 1
    torch.testing.assert_close(sinkhorn_assign(logits, tau, iterations), slow_assign(logits, tau, iterations))


def test_prototypes_share_the_batch_equally():
    logits = torch.randn(30, 5) + torch.linspace(0, 4, 5)  # without it the last would have most
    assignment = sinkhorn_assign(logits, 1.0, iterations=100)
    torch.testing.assert_close(assignment.sum(0), torch.full((5,), 6.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(assignment.sum(1), torch.ones(30))


@pytest.mark.parametrize("scale", [1e4, 1e38])
def test_finite_for_huge_logits(scale):
    assignment = sinkhorn_assign(scale * torch.randn(16, 50).clamp(-3, 3))
    assert assignment.isfinite().all()
    torch.testing.assert_close(assignment.sum(1), torch.ones(16))


def test_types_and_gradients():
    assert sinkhorn_assign(torch.randn(4, 3, requires_grad=True).bfloat16()).dtype == torch.float32
    assert sinkhorn_assign(torch.randn(4, 3).double()).dtype == torch.float64
    assert not sinkhorn_assign(torch.randn(4, 3, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 0.1), r"\(B, K\), got \(3,\)"),
        ((torch.zeros(3, 2), 0.0), "tau must be a positive number, got 0.0"),
        ((torch.zeros(3, 2), 0.1, -1), "iterations must not be negative, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_assign(*arguments)
