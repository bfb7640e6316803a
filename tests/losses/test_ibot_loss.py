import pytest
import torch

from timm_tokens.losses import IBOTPatchLoss


def slow_loss(student, teacher, masks, center, tau_s, tau_t):
    """By the definition, image by image."""
    views = []
    for s, t, mask in zip(student, teacher, masks, strict=True):
        images = []
        for i in range(len(s)):
            p = ((t[i] - center) / tau_t).softmax(1)
            losses = -(p * (s[i] / tau_s).log_softmax(1)).sum(1)
            images.append(sum(losses[n] for n in range(len(losses)) if mask[i, n]) / max(1, int(mask[i].sum())))
        views.append(sum(images) / len(images))
    return sum(views) / len(views)


def data(views=2):
    student = [torch.randn(4, 6, 9, requires_grad=True) for _ in range(views)]
    teacher = [torch.randn(4, 6, 9) for _ in range(views)]
    masks = [torch.rand(4, 6) < 0.4 for _ in range(views)]
    masks[0][1] = False  # an image without a mask
    return student, teacher, masks


@pytest.mark.parametrize("views", [1, 2])
def test_equals_the_slow_form(views):
    criterion, center = IBOTPatchLoss(9, tau_student=0.2, tau_teacher=0.05), torch.zeros(9)
    for _ in range(3):
        student, teacher, masks = data(views)
        fast, slow = criterion(student, teacher, masks), slow_loss(student, teacher, masks, center, 0.2, 0.05)
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(torch.autograd.grad(fast, student), torch.autograd.grad(slow, student))
        center = 0.9 * center + 0.1 * torch.cat(teacher).mean((0, 1))
        torch.testing.assert_close(criterion.center.value, center)


def test_masked_rows_alone_give_the_same_loss():
    student, teacher, masks = data()
    whole, rows = IBOTPatchLoss(9), IBOTPatchLoss(9)
    masked = [[x[mask] for x, mask in zip(views, masks, strict=True)] for views in (student, teacher)]
    torch.testing.assert_close(rows(*masked, masks), whole(student, teacher, masks))
    torch.testing.assert_close(rows.center.value, 0.1 * torch.cat(masked[1]).mean(0))


def test_nothing_masked():
    criterion, (student, teacher, masks) = IBOTPatchLoss(9), data()
    none = [torch.zeros_like(mask) for mask in masks]
    loss = criterion([x[m] for x, m in zip(student, none, strict=True)], [torch.empty(0, 9)] * 2, none)
    loss.backward()
    assert loss == 0 and not criterion.center.value.any() and criterion.center.value.isfinite().all()
    assert criterion(student, teacher, none) == 0


def test_the_teacher_gets_no_gradient():
    student, teacher, masks = data()
    teacher = [x.requires_grad_() for x in teacher]
    IBOTPatchLoss(9)(student, teacher, masks).backward()
    assert all(x.grad is None for x in teacher)
    for x, mask in zip(student, masks, strict=True):
        assert x.grad[mask].abs().sum() > 0 and not x.grad[~mask].any()


def test_the_centre_rests_in_evaluation():
    criterion = IBOTPatchLoss(9).eval()
    criterion(*data())
    assert not criterion.center.value.any()


def test_what_does_not_fit_is_refused():
    student, teacher, masks = data()
    with pytest.raises(ValueError, match="one per view, got 2, 1, 2"):
        IBOTPatchLoss(9)(student, teacher[:1], masks)
    with pytest.raises(ValueError, match=r"\(B, N\) = \(4, 6\), or \(M, K\) with M = \d+ masked.*got \(3, 9\)"):
        IBOTPatchLoss(9)([torch.randn(3, 9)], teacher[:1], masks[:1])
    with pytest.raises(ValueError, match="tau_teacher must be positive, got 0"):
        IBOTPatchLoss(9, tau_teacher=0)
