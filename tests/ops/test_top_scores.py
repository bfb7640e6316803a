"""Scores of label maps: the annotator's own where that is fair to the classes kept, else relative to all the others."""

import pytest
import torch

from timm_tokens.ops import crop_token_labels, others_share, top_scores


def slow(scores, top):
    """Cell by cell: the probabilities of the classes kept, by the annotator and where each other class scores 0."""
    values, indices = scores.topk(top)
    annotator = scores.double().softmax(0)[indices]
    zeros = torch.zeros(len(scores), dtype=torch.float64).scatter(0, indices, values.double())
    unfair = (1 - zeros.softmax(0)[indices].sum()) - (1 - annotator.sum()) > 0.1
    return annotator if unfair else zeros.softmax(0)[indices], bool(unfair)


def test_equals_the_rule_cell_by_cell():
    seen = set()
    for num_classes, top in [(4, 3), (10, 5), (1000, 5), (1000, 999)]:
        for shift in (-300, -10, -3, -1, 0, 1, 5, 300):
            scores = torch.randn(2, 3, num_classes) * 3 + shift
            values, indices = top_scores(scores, top)
            best = scores.topk(top)
            assert torch.equal(indices, best.indices) and values.shape == (2, 3, top)
            for cell in [(b, h) for b in range(2) for h in range(3)]:
                wanted, unfair = slow(scores[cell], top)
                zeros = torch.zeros(num_classes).scatter(0, indices[cell], values[cell]).softmax(0)
                torch.testing.assert_close(zeros[indices[cell]].double(), wanted, atol=1e-6, rtol=1e-3)
                torch.testing.assert_close(others_share(values, num_classes)[cell], 1 - zeros[indices[cell]].sum())
                assert torch.equal(values[cell], best.values[cell]) != unfair  # as they are, if they may be
                seen.add(unfair)
    assert seen == {True, False}


def test_a_constant_far_below_zero_changes_nothing():
    scores = torch.randn(5, 100) - 20
    values, indices = top_scores(scores, 4)
    lower, same = top_scores(scores - 500, 4)
    assert torch.equal(indices, same)
    torch.testing.assert_close(values, lower, atol=1e-3, rtol=1e-4)


def test_all_classes_are_kept_as_they_are():
    scores = torch.randn(5, 3).half() - 20
    values, indices = top_scores(scores, 3)
    assert values.dtype == torch.float32 and torch.equal(values, scores.float().gather(-1, indices))
    assert others_share(values, 3).tolist() == [0.0] * 5


@pytest.mark.parametrize("shift", [0, -10, -40])
def test_a_target_is_the_annotators_whatever_its_bias(shift):
    scores = (torch.randn(1, 6, 6, 50) * 2 - 9).index_fill(-1, torch.tensor([7]), 4.0) + shift
    values, indices = (x.movedim(-1, 1) for x in top_scores(scores, 5))
    target = crop_token_labels(values.half(), indices, torch.tensor([[0.0, 0, 1, 1]]), 50, 6, dense=True)
    torch.testing.assert_close(target[0, 7, 1:], scores.softmax(-1)[..., 7].flatten(), atol=2e-3, rtol=0)
    assert target[0, 7].min() > 0.99
