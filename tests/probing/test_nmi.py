"""Agreement of assignments with classes: scikit-learn's number, and more tokens at a time."""

import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from timm_tokens.probing import assignment_nmi, ensemble_assignments, ensemble_nmi


@pytest.mark.parametrize("prototypes", [1, 2, 30, 65536])
@pytest.mark.parametrize("classes", [1, 10])
def test_equals_scikit_learn(prototypes, classes):
    labels = torch.randint(classes, (500,))
    assignments = (labels * 7919 + torch.randint(3, (500,))) % prototypes
    expected = normalized_mutual_info_score(labels.numpy(), assignments.numpy())
    assert assignment_nmi(assignments, labels) == pytest.approx(expected, abs=1e-9)


def test_names_do_not_matter_and_independence_is_zero():
    labels = torch.arange(12) // 3
    assert assignment_nmi(1000 - 10 * labels, labels) == pytest.approx(1)
    assert assignment_nmi(torch.arange(12) % 3, labels) == pytest.approx(0, abs=1e-9)


def test_tokens_are_averaged_one_by_one():
    probabilities = torch.randn(4, 60, 9).softmax(-1)
    labels = torch.randint(5, (60,))
    slow = [probabilities[: t + 1].mean(0).argmax(-1) for t in range(4)]
    assert torch.equal(ensemble_assignments(probabilities), torch.stack(slow))
    expected = [normalized_mutual_info_score(labels.numpy(), row.numpy()) for row in slow]
    assert ensemble_nmi(probabilities, labels) == pytest.approx(expected)


def test_independent_tokens_agree_with_the_classes_better_together():
    labels = torch.randint(5, (400,))
    logits = torch.nn.functional.one_hot(labels, 5) + torch.randn(6, 400, 5)
    nmi = ensemble_nmi(logits.softmax(-1), labels)
    assert nmi[-1] > nmi[2] > nmi[0] + 0.1


@pytest.mark.parametrize(
    ("assignments", "labels", "message"),
    [
        (torch.zeros(3, 2).long(), torch.zeros(3).long(), r"both be \(N,\), N at least 1, got \(3, 2\) and \(3,\)"),
        (torch.zeros(0).long(), torch.zeros(0).long(), r"N at least 1, got \(0,\)"),
        (torch.zeros(3), torch.zeros(3).long(), "must be integers, got torch.float32 and torch.int64: take the argmax"),
    ],
)
def test_refuses_in_words(assignments, labels, message):
    with pytest.raises(ValueError, match=message):
        assignment_nmi(assignments, labels)
    with pytest.raises(ValueError, match=r"probabilities must be \(T, B, K\), got \(3, 2\)"):
        ensemble_assignments(torch.zeros(3, 2))
