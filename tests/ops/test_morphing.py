import pytest
import torch
import torch.nn.functional as F

from timm_tokens.ops import draw_morph_rounds, morph, morph_groups
from timm_tokens.ops.morphing import group_means


def slow_groups(tokens, rounds, prefix=0):
    """Groups as lists of members, one image, by the definition: the means of the groups are compared in each round."""
    groups = [[i] for i in range(len(tokens))]
    for r in rounds:
        if r == 0:
            continue
        means = F.normalize(torch.stack([tokens[members].double().mean(0) for members in groups]), dim=1)
        even = [i for i in range(len(groups)) if i >= prefix and i % 2 == 0]
        odd = [i for i in range(len(groups)) if i >= prefix and i % 2 == 1]
        partner = {i: max(odd, key=lambda j, i=i: float(means[i] @ means[j])) for i in even}
        chosen = sorted(even, key=lambda i: -float(means[i] @ means[partner[i]]))[:r]
        for i in chosen:
            groups[partner[i]] = groups[partner[i]] + groups[i]
        groups = groups[:prefix] + [groups[i] for i in even if i not in chosen] + [groups[i] for i in odd]
    ids = torch.empty(len(tokens), dtype=torch.int64)
    for number, members in enumerate(groups):
        ids[members] = number
    return ids


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("n", "rounds"), [(7, [1]), (16, [2, 2, 2]), (16, [1, 0, 3]), (25, [10, 5, 2]), (30, [3] * 6), (31, [0]), (12, [])]
)
def test_groups_equal_the_slow_form(n, rounds, prefix):
    tokens = torch.randn(3, n, 8)
    groups = morph_groups(tokens, rounds, num_prefix_tokens=prefix)
    expected = torch.stack([slow_groups(image, rounds, prefix) for image in tokens])
    assert torch.equal(groups, expected)


def test_groups_of_the_reference(golden):
    golden = golden("dtm")
    for case in "012":
        r, count = int(golden[f"{case}.r"][-1]), int(golden[f"{case}.iterations"][-1])
        groups = morph_groups(golden[f"{case}.target"], [r] * count, num_prefix_tokens=1)
        assert torch.equal(groups, golden[f"{case}.last_source"].argmax(1))  # (B, G, N), one group a token


def test_every_group_has_a_token_and_the_prefix_stays_alone():
    groups = morph_groups(torch.randn(4, 50, 6), [20, 10, 5], num_prefix_tokens=3)
    assert groups.dtype == torch.int64
    for image in groups:
        sizes = image.bincount()
        assert len(sizes) == 15 and sizes.min() >= 1 and sizes.sum() == 50
        assert image[:3].tolist() == [0, 1, 2] and sizes[:3].tolist() == [1, 1, 1]


def test_more_rounds_only_join_groups():
    tokens = torch.randn(2, 40, 6)
    fine, coarse = morph_groups(tokens, [8, 8]), morph_groups(tokens, [8, 8, 8])
    for image in range(2):
        pairs = {(int(f), int(c)) for f, c in zip(fine[image], coarse[image], strict=True)}
        assert len(pairs) == len(fine[image].unique())  # each fine group lies in one coarse group


@pytest.mark.parametrize("convert", [lambda x: x.double(), lambda x: 100 * x, lambda x: 1e-3 * x])
def test_neither_scale_nor_type_matters(convert):
    tokens = torch.randn(2, 30, 16)
    assert torch.equal(morph_groups(convert(tokens), [6] * 4), morph_groups(tokens, [6] * 4))


def test_autocast_changes_no_group():
    tokens = torch.randn(2, 64, 16) + 5  # alike to three digits: bfloat16 would confuse them
    with torch.autocast("cpu", torch.bfloat16):
        groups = morph_groups(tokens, [10, 10])
    assert torch.equal(groups, morph_groups(tokens, [10, 10]))


def test_tokens_that_are_zero_or_cancel():
    tokens = torch.randn(1, 4, 6)
    tokens = torch.cat([torch.zeros(1, 4, 6), tokens, -tokens], dim=1)
    groups = morph_groups(tokens, [4, 2, 1])
    assert sorted(groups.unique().tolist()) == list(range(5))


@pytest.mark.parametrize("prefix", [0, 1])
def test_morph_is_the_mean_of_the_group(prefix):
    x = torch.randn(2, 20, 5, dtype=torch.float64)
    groups = morph_groups(torch.randn(2, 20, 8), [6, 3], num_prefix_tokens=prefix)
    same = (groups[:, :, None] == groups[:, None, :]).double()  # (B, N, N)
    expected = same / same.sum(2, keepdim=True) @ x
    torch.testing.assert_close(morph(x, groups), expected)
    torch.testing.assert_close(morph(morph(x, groups), groups), expected)
    torch.testing.assert_close(expected.mean(1), x.mean(1))


def test_morph_gradient():
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([[0, 1, 0, 2, 1, 0], [3, 3, 3, 3, 3, 3]])
    assert torch.autograd.gradcheck(morph, (x, groups))


def test_morph_averages_half_precision_in_float32():
    x = torch.full((1, 4096, 2), 1.0, dtype=torch.bfloat16)  # a running bfloat16 sum would stop at 256
    out = morph(x, torch.zeros(1, 4096, dtype=torch.int64))
    assert out.dtype == torch.bfloat16 and torch.equal(out, x)


def test_means_of_empty_groups_are_zero():
    means = group_means(torch.ones(1, 2, 3), torch.tensor([[2, 2]]), 4)
    assert means.sum(2).tolist() == [[0, 0, 3, 0]]


def test_drawn_rounds_can_be_morphed_and_come_from_the_generator():
    draws = [draw_morph_rounds(21, num_prefix_tokens=2, generator=torch.Generator().manual_seed(i)) for i in range(80)]
    assert draws[:5] == [
        draw_morph_rounds(21, num_prefix_tokens=2, generator=torch.Generator().manual_seed(i)) for i in range(5)
    ]
    assert {len(rounds) for rounds in draws} == set(range(1, 15))
    target = torch.randn(1, 21, 4)
    for rounds in draws:
        assert len(morph_groups(target, rounds, num_prefix_tokens=2).unique()) == 21 - sum(rounds)


def test_drawn_rounds_share_the_merges_and_the_last_takes_the_remainder():
    generator = torch.Generator().manual_seed(0)
    draws = [draw_morph_rounds(196, min_tokens=98, max_rounds=6, generator=generator) for _ in range(2000)]
    for rounds in draws:
        share = sum(rounds) // len(rounds)
        assert all(r == share for r in rounds[:-1]) and 0 <= rounds[-1] - share < len(rounds)
    assert {sum(rounds) for rounds in draws} == set(range(99))  # 98 to 196 tokens to end with, both reached


def test_a_drawn_round_merges_at_most_half():
    generator = torch.Generator().manual_seed(0)
    draws = {draw_morph_rounds(10, max_rounds=1, generator=generator) for _ in range(200)}
    assert draws == {(r,) for r in range(6)}


@pytest.mark.parametrize(
    ("rounds", "prefix", "error", "message"),
    [
        ([3, -1], 0, ValueError, r"rounds\[1\] = -1"),
        ([6], 0, ValueError, r"rounds\[0\] = 6: .* 5 of 10; use more rounds"),
        ([5], 1, ValueError, r"4 of 9"),
        ([5, 3], 0, ValueError, r"rounds\[1\] = 3: .* 2 of 5"),
        ([2.5], 0, TypeError, r"sequence of ints.*got \[2\.5\]"),
        ([True], 0, TypeError, "sequence of ints"),
        (3, 0, TypeError, "sequence of ints.*got 3"),
        ([1], 11, ValueError, "between 0 and the 10 tokens, got 11"),
        ([1], -1, ValueError, "got -1"),
    ],
)
def test_bad_rounds_are_refused(rounds, prefix, error, message):
    with pytest.raises(error, match=message):
        morph_groups(torch.randn(1, 10, 4), rounds, num_prefix_tokens=prefix)


def test_bad_tensors_are_refused():
    with pytest.raises(ValueError, match=r"\(B, N, C\), got \(10, 4\)"):
        morph_groups(torch.randn(10, 4), [1])
    with pytest.raises(TypeError, match=r"floating-point, got torch\.int64"):
        morph_groups(torch.ones(1, 10, 4, dtype=torch.int64), [1])
    with pytest.raises(ValueError, match=r"got \(1, 10, 4\) and \(1, 9\)"):
        morph(torch.randn(1, 10, 4), torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"int64, got torch\.int32"):
        morph(torch.randn(1, 10, 4), torch.zeros(1, 10, dtype=torch.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"min_tokens": 10}, "the 9 tokens .* got 10"), ({"min_tokens": -1}, "got -1"), ({"max_rounds": 0}, "got 0")],
)
def test_bad_draws_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_morph_rounds(10, num_prefix_tokens=1, **arguments)


def test_compiles_without_breaks():
    def forward(x, target):
        return morph(x, morph_groups(target, [5, 4], num_prefix_tokens=1))

    x, target = torch.randn(2, 20, 4), torch.randn(2, 20, 8)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), forward(x, target))
