import pytest
import torch

from timm_tokens.losses import DINOLoss


def slow_loss(student, teacher, center, tau_s, tau_t):
    """By the definition: the mean cross entropy over the pairs of different views."""
    terms = []
    for u, t in enumerate(teacher):
        p = ((t - center) / tau_t).softmax(1)
        for v, s in enumerate(student):
            if u != v:
                terms.append(-(p * (s / tau_s).log_softmax(1)).sum(1).mean())
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("views", "teacher_views"), [(2, 1), (2, 2), (6, 2)])
def test_equals_the_slow_form(views, teacher_views):
    criterion, center = DINOLoss(9, tau_student=0.2, tau_teacher=0.05), torch.zeros(9)
    for _ in range(3):  # the centre moves from call to call, after it was used
        student = [torch.randn(6, 9, requires_grad=True) for _ in range(views)]
        teacher = [torch.randn(6, 9) for _ in range(teacher_views)]
        fast, slow = criterion(student, teacher), slow_loss(student, teacher, center, 0.2, 0.05)
        torch.testing.assert_close(fast, slow)
        gradients = [torch.autograd.grad(x, student, allow_unused=True) for x in (fast, slow)]
        torch.testing.assert_close(*gradients)
        center = 0.9 * center + 0.1 * torch.cat(teacher).mean(0)
        torch.testing.assert_close(criterion.center.value[0], center)


def test_the_centre_rests_in_evaluation():
    criterion, views = DINOLoss(9).eval(), [torch.randn(6, 9), torch.randn(6, 9)]
    criterion(views, views)
    assert not criterion.center.value.any()


def test_temperatures_follow_their_attributes():
    student, teacher = torch.randn(3, 6, 9), torch.randn(2, 6, 9)
    criterion = DINOLoss(9).eval()
    criterion.tau_teacher = 0.07
    torch.testing.assert_close(criterion(student, teacher), DINOLoss(9, tau_teacher=0.07)(student, teacher))


def test_the_teacher_gets_no_gradient():
    student = [torch.randn(6, 9, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(6, 9, requires_grad=True) for _ in range(2)]
    DINOLoss(9)(student, teacher).backward()
    assert all(x.grad is None for x in teacher) and all(x.grad.abs().sum() > 0 for x in student)


def test_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(3, 6, 9).bfloat16(), torch.randn(2, 6, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = DINOLoss(9)(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, DINOLoss(9)(student.float(), teacher.float()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau_student": 0.0}, "tau_student must be positive, got 0.0"),
        ({"tau_teacher": -1.0}, "tau_teacher must be positive, got -1.0"),
        ({"num_prototypes": 0}, "num_prototypes must be at least 1, got 0"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"center_momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DINOLoss(**arguments)


def test_views_that_do_not_fit_are_refused():
    criterion = DINOLoss(9)
    with pytest.raises(ValueError, match="got 1 for the teacher and 1 for the student"):
        criterion([torch.randn(4, 9)], [torch.randn(4, 9)])
    with pytest.raises(ValueError, match=r"\(T, K\) = \(1, 9\), got \(4, 1, 8\)"):
        criterion([torch.randn(4, 8)] * 2, [torch.randn(4, 8)])
    with pytest.raises(ValueError, match=r"views must have shape \(B, K\), got \[\(4, 2, 9\)"):
        criterion([torch.randn(4, 2, 9)] * 2, [torch.randn(4, 9)])
