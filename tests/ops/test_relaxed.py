"""Relaxed merging: golden numbers, the slow obvious version, and the laws."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from timm_tokens.ops import relaxed_merge, relaxed_top_k
from timm_tokens.ops.relaxed import _Choices, relaxed_apply, relaxed_match, relaxed_unmerge


def slow_top_k(scores, k, tau1, tau2, candidates):
    """The paper's iteration over all (row, column) pairs."""
    columns = min(candidates, scores.shape[-1])
    values, index = scores.topk(columns, dim=-1)
    logits, khot = values / tau1, torch.zeros_like(values)
    eps = torch.finfo(torch.float32).eps
    for _ in range(k):
        p = (logits / tau2).flatten(1).softmax(dim=-1).view_as(logits)
        khot = khot + p
        logits = logits + (1 - p.sum(-1, keepdim=True)).clamp(min=eps).log()
    total = khot.detach().sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, index, khot / ((total - 1).clamp(min=0) + 1))


@pytest.mark.parametrize("candidates", [1, 3, 50])
@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("shape", [(2, 12, 13), (1, 10, 9), (3, 9, 1)])
def test_top_k_equals_the_slow_version(shape, k, candidates):
    scores = (torch.rand(shape) * 2 - 1).requires_grad_()
    weights = torch.randn(shape)
    results = []
    for out in (relaxed_top_k(scores, k, candidates=candidates), slow_top_k(scores, k, 0.1, 0.1, candidates)):
        results.append((out, torch.autograd.grad((out * weights).sum(), scores)[0]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-4)
    scale = results[1][1].abs().max()
    torch.testing.assert_close(results[0][1] / scale, results[1][1] / scale, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_top_k_golden(golden, k):
    numbers = golden("dtem")
    assignment = relaxed_top_k(numbers["select.scores"], k, tau1=0.1, tau2=0.1, candidates=3)
    torch.testing.assert_close(assignment, numbers[f"select.assign.k{k}"], atol=1e-5, rtol=1e-5)


def test_top_k_gives_away_at_most_each_row_and_k_in_all():
    assignment = relaxed_top_k(torch.rand(4, 20, 20), 6)
    assert assignment.sum(-1).max() <= 1 + 1e-5
    assert assignment.sum((1, 2)).max() <= 6 + 1e-4
    assert assignment.min() >= 0


def test_top_k_becomes_hard_as_the_temperatures_fall():
    scores = torch.rand(2, 8, 8)
    hard = relaxed_top_k(scores, 3, tau1=0.01, tau2=0.01)
    best, partner = scores.max(-1)
    expected = torch.zeros_like(scores)
    for image in range(2):
        rows = best[image].topk(3).indices
        expected[image, rows, partner[image, rows]] = 1
    torch.testing.assert_close(hard, expected, atol=0.15, rtol=0)


def slow_merge(x, size, metric, r, effective, p):
    """One image at a time, with loops, as the specification tells it."""
    out = []
    for xi, si, mi in zip(x, size, metric, strict=True):
        a, b = list(range(p, effective, 2)), list(range(p + 1, effective, 2))
        m = F.normalize(mi, dim=-1)
        share = slow_top_k((m[a] @ m[b].T)[None], r, 0.1, 0.1, 3)[0]
        xi, si = xi.clone(), si.clone()
        for column, j in enumerate(b):
            given = share[:, column] * si[a]
            total = si[j] + given.sum()
            xi[j] = (si[j] * xi[j] + (given[:, None] * xi[a]).sum(0)) / total
            si[j] = total
        si[a] = si[a] * (1 - share.sum(-1)).clamp(0, 1)
        order = [*range(p), *sorted([*a, *b], key=lambda i: -si[i]), *range(effective, len(si))]
        out.append((xi[order], si[order]))
    return [torch.stack(column) for column in zip(*out, strict=True)]


@pytest.mark.parametrize(("n", "effective", "p", "r"), [(17, 17, 1, 3), (17, 12, 1, 4), (16, 11, 0, 5), (20, 20, 5, 2)])
def test_merge_equals_the_slow_version(n, effective, p, r):
    x, size, metric = torch.randn(2, n, 6), torch.rand(2, n) + 0.5, torch.randn(2, n, 4)
    merged, sizes, left = relaxed_merge(x, size, metric, r, effective, num_prefix_tokens=p)
    expected, expected_sizes = slow_merge(x, size, metric, r, effective, p)
    assert left == effective - r
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sizes, expected_sizes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sizes.sum(1), size.sum(1), atol=1e-4, rtol=1e-5)


def test_merge_of_nothing_changes_nothing():
    x, size = torch.randn(2, 5, 3), torch.ones(2, 5)
    assert relaxed_merge(x, size, x, 0, 5)[0] is x
    assert relaxed_merge(x, size, x, 3, 2)[2] == 2  # one token beside the prefix: nothing to merge with


@pytest.mark.parametrize(("effective", "p"), [(15, 1), (14, 1), (12, 0), (11, 4)])
def test_unmerge_is_the_transpose_of_the_merge(effective, p):
    """What a patch reads back from the tokens is weighted as what it gave: sums over patches equal sums over sizes."""
    x, size = torch.randn(2, 15, 6), torch.ones(2, 15)
    assignment = relaxed_match(x, 3, effective, num_prefix_tokens=p, tau1=0.1, tau2=0.1, candidates=3)
    _, sizes, matching = relaxed_apply(assignment, x, size, effective, p)
    y = torch.randn(2, 15, 3)
    spread = relaxed_unmerge(matching, y)
    torch.testing.assert_close(spread.sum(1), (sizes.unsqueeze(-1) * y).sum(1), atol=1e-4, rtol=1e-4)
    assert torch.equal(spread[:, :p], y[:, :p])


def test_autocast_leaves_sizes_in_float32():
    x, size = torch.randn(2, 21, 16), torch.ones(2, 21)
    plain = relaxed_merge(x, size, x, 5, 21)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = relaxed_merge(x, size, x, 5, 21)
    assert mixed[1].dtype == torch.float32
    torch.testing.assert_close(mixed[1], plain[1], atol=1e-5, rtol=1e-5)


def test_compiles_to_one_graph():
    def step(x, size):
        return relaxed_merge(x, size, x, 4, 17)[:2]

    x, size = torch.randn(2, 17, 4), torch.ones(2, 17)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x, size), step(x, size), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("k", [0, 1, 4])
def test_the_gradient_of_choices_and_its_own(k):
    row = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda row: _Choices.apply(row, k, 0.5), row)
    assert gradgradcheck(lambda row: _Choices.apply(row, k, 0.5), row)
