import pytest
import torch

from timm_tokens.losses import MIRALoss
from timm_tokens.ops import assignment_information, mira_assign, sinkhorn_assign


def slow_loss(student, assignments, tau):
    """By the definition: the mean cross entropy over all pairs of different views."""
    terms = [
        -(w * (logits / tau).log_softmax(1)).sum(1).mean()
        for i, w in enumerate(assignments)
        for j, logits in enumerate(student)
        if i != j
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("views", "teacher_views"), [(2, 1), (2, 2), (3, 3), (8, 2)])
def test_equals_the_slow_form(views, teacher_views):
    student = [torch.randn(6, 9, requires_grad=True) for _ in range(views)]
    assignments = [torch.randn(6, 9).softmax(1) for _ in range(teacher_views)]
    criterion = MIRALoss(0.3, assign=lambda given: given)
    fast, slow = criterion(student, assignments).loss, slow_loss(student, assignments, 0.3)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast, student, allow_unused=True), torch.autograd.grad(slow, student, allow_unused=True)
    )


def test_the_labels_come_from_the_teacher():
    student, teacher = torch.randn(4, 6, 9), torch.randn(2, 6, 9)  # stacked views serve as well as lists
    terms = MIRALoss(tau_student=0.2, tau_teacher=0.3, beta=0.6, iterations=7)(student, teacher)
    assignments = [mira_assign(logits, 0.3, 0.6, 7) for logits in teacher]
    torch.testing.assert_close(terms.loss, slow_loss(student, assignments, 0.2))
    information = [assignment_information(w) for w in assignments]
    for name in ("entropy", "marginal_entropy", "mutual_information"):
        expected = sum(getattr(i, name) for i in information) / 2
        torch.testing.assert_close(getattr(terms, name), expected)


def test_other_pseudo_labels():
    student, teacher = torch.randn(3, 6, 9), torch.randn(2, 6, 9)
    terms = MIRALoss(0.2, assign=sinkhorn_assign)(student, teacher)
    torch.testing.assert_close(terms.loss, slow_loss(student, [sinkhorn_assign(z) for z in teacher], 0.2))


def test_beta_of_a_call():
    student, teacher = torch.randn(3, 6, 9), torch.randn(2, 6, 9)
    assert MIRALoss(beta=0.75)(student, teacher, beta=0.5) == MIRALoss(beta=0.5)(student, teacher)
    plain = MIRALoss(beta=0.75)(student, teacher, beta=0)  # 0 is a value, not "the loss's own"
    assert plain.mutual_information < MIRALoss(beta=0.75)(student, teacher).mutual_information


def test_only_the_loss_and_the_student_have_a_gradient():
    student = [torch.randn(6, 9, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(6, 9, requires_grad=True) for _ in range(2)]
    terms = MIRALoss()(student, teacher)
    assert [term.requires_grad for term in terms] == [True, False, False, False]
    terms.loss.backward()
    assert all(x.grad is None for x in teacher) and all(x.grad.abs().sum() > 0 for x in student)


def test_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(3, 6, 9).bfloat16(), torch.randn(2, 6, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = MIRALoss()(student, teacher)
    assert {term.dtype for term in terms} == {torch.float32}
    torch.testing.assert_close(terms, MIRALoss()(student.float(), teacher.float()))


def test_finite_for_huge_logits():
    student, teacher = (1e4 * torch.randn(2, 6, 9)).requires_grad_(), 1e4 * torch.randn(2, 6, 9)
    terms = MIRALoss()(student, teacher)
    terms.loss.backward()
    assert all(term.isfinite() for term in terms) and student.grad.isfinite().all()


def test_compiles_without_breaks():
    student, teacher = torch.randn(3, 8, 9), torch.randn(2, 8, 9)
    criterion = MIRALoss(iterations=3)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), criterion(student, teacher))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau_student": 0.0}, "tau_student must be positive, got 0.0"),
        ({"tau_teacher": -1.0}, "tau must be a positive number.*got tau=-1.0"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"iterations": -1}, "iterations must not be negative, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MIRALoss(**arguments)


@pytest.mark.parametrize(
    ("views", "teacher_views", "message"),
    [(1, 1, "got 1 for the teacher and 1 for the student"), (2, 3, "got 3 .* and 2"), (2, 0, "got 0 .* and 2")],
)
def test_views_without_a_pair_are_refused(views, teacher_views, message):
    with pytest.raises(ValueError, match=message):
        MIRALoss()([torch.randn(4, 3)] * views, [torch.randn(4, 3)] * teacher_views)


def test_views_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"same shape \(B, K\), got \[\(4, 3\), \(5, 3\)\]"):
        MIRALoss()([torch.randn(4, 3), torch.randn(5, 3)], [torch.randn(4, 3)])


def test_beta_of_a_call_is_checked():
    with pytest.raises(ValueError, match=r"got 1\.5"):
        MIRALoss()(torch.randn(2, 4, 3), torch.randn(2, 4, 3), beta=1.5)
