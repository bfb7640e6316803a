import pytest
import torch

from timm_tokens.ops import soft_cross_entropy


def slow(logits, target, tau):
    return -(target * (logits.double() / tau).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_equals_the_slow_form(shared, tau):
    logits = torch.randn(3, 4, 9, requires_grad=True)
    target = torch.rand(3, 1 if shared else 4, 9)  # rows need not sum to 1
    weight = torch.randn(3, 4)
    fast, reference = soft_cross_entropy(logits, target, tau), slow(logits, target, tau)
    torch.testing.assert_close(fast, reference.float(), rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad((x * weight).sum(), logits)[0] for x in (fast, reference)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_gradient_by_differences():
    logits, target = torch.randn(2, 3, 4), torch.rand(2, 1, 4)
    step = 1e-2 * torch.randn_like(logits)
    moved = logits.clone().requires_grad_()
    change = soft_cross_entropy(moved + step, target, 0.5).sum() - soft_cross_entropy(moved - step, target, 0.5).sum()
    gradient = torch.autograd.grad(soft_cross_entropy(moved, target, 0.5).sum(), moved)[0]
    torch.testing.assert_close(change, 2 * (gradient * step).sum(), rtol=1e-3, atol=1e-4)


def test_linear_in_the_target():
    logits, targets = torch.randn(5, 3, 8), torch.rand(6, 5, 1, 8)
    each = torch.stack([soft_cross_entropy(logits, target, 0.1) for target in targets])
    torch.testing.assert_close(soft_cross_entropy(logits, targets.mean(0), 0.1), each.mean(0))


def test_from_features():
    """H(P, softmax(W x / tau)) = logsumexp(W x / tau) - <W^T P, x> / tau: the identity that the benchmark times."""
    x, weight, target = torch.randn(4, 3, 6), torch.randn(9, 6), torch.rand(4, 1, 9).softmax(-1)
    logits = x @ weight.T
    fast = (logits / 0.2).logsumexp(-1) - (target @ weight * x).sum(-1) / 0.2
    torch.testing.assert_close(soft_cross_entropy(logits, target, 0.2), fast)


def test_the_target_gets_no_gradient():
    logits, target = torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 3, 4, requires_grad=True)
    soft_cross_entropy(logits, target).sum().backward()
    assert target.grad is None and logits.grad.abs().sum() > 0


def test_half_precision_is_computed_in_float32():
    logits, target = torch.randn(2, 3, 50).bfloat16().requires_grad_(), torch.rand(2, 1, 50).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = soft_cross_entropy(logits, target, 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, slow(logits, target, 0.1).float())
    loss.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_finite_for_huge_logits():
    logits = (1e5 * torch.randn(2, 3, 50)).requires_grad_()
    loss = soft_cross_entropy(logits, torch.rand(2, 1, 50), 0.01)
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 2, 4), (1, 3, 4), (2, 3, 5), (3, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and"):
        soft_cross_entropy(torch.randn(2, 3, 4), torch.rand(shape))
    with pytest.raises(ValueError, match=r"logits must be \(B, T, K\)"):
        soft_cross_entropy(torch.randn(3, 4), torch.rand(3, 4))
