"""Bipartite matching: golden numbers, the slow obvious version, and the laws."""

import pytest
import torch

from timm_tokens.ops import bipartite_match, merge, unmerge


def slow_match(metric, r, p):
    """Token by token, as the paper tells it: the surviving positions in output order, and where each token ended."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    n = len(metric)
    evens, odds = range(p + p % 2, n, 2), range(p + 1 - p % 2, n, 2)
    proposals = []
    for i in evens:
        scores = {j: float(metric[i] @ metric[j]) for j in odds}
        if scores:
            j = max(scores, key=scores.get)
            proposals.append((-scores[j], i, j))
    into = {i: j for _, i, j in sorted(proposals)[: min(r, (n - p) // 2)]}
    survivors = [*range(p), *(i for i in evens if i not in into), *odds]
    return [survivors.index(into.get(i, i)) for i in range(n)], survivors


@pytest.mark.parametrize(("n", "p"), [(n, p) for n in (1, 2, 5, 6, 7, 12, 13) for p in (0, 1, 2, 3, 5) if p <= n])
@pytest.mark.parametrize("r", [0, 1, 3, 100])
def test_equals_the_slow_version(n, p, r):
    metric, x, size = torch.randn(3, n, 4), torch.randn(3, n, 5), torch.rand(3, n) + 0.5
    matching = bipartite_match(metric, r, p)
    merged, merged_size = merge(matching, x, size)
    for i in range(3):
        position, survivors = slow_match(metric[i], r, p)
        assert matching.position()[i].tolist() == position
        assert matching.kept()[i].tolist() == survivors
        assert matching.order[i].sort().values.tolist() == list(range(n))
        for slot in range(len(survivors)):
            members = [j for j in range(n) if position[j] == slot]
            weights = size[i, members]
            expected = (x[i, members] * weights[:, None]).sum(0) / weights.sum()
            torch.testing.assert_close(merged[i, slot], expected)
            torch.testing.assert_close(merged_size[i, slot], weights.sum())


@pytest.mark.parametrize("case", range(4))
def test_golden(golden, case):
    numbers = {k.split(".", 1)[1]: v for k, v in golden("matching").items() if k.startswith(f"{case}.")}
    prefix = int(numbers["class_token"]) + int(numbers["distill_token"])
    matching = bipartite_match(numbers["metric"], int(numbers["r"]), prefix)
    merged, size = merge(matching, numbers["x"], numbers["size"])
    source = torch.zeros_like(numbers["source"]).scatter(1, matching.position().unsqueeze(1), 1.0)
    if prefix == 0:  # there the reference leaves unmerged tokens in score order: bring its rows into ours
        rows = (source @ numbers["source"].mT).argmax(dim=-1)
        numbers["source"] = numbers["source"].gather(1, rows.unsqueeze(-1).expand_as(source))
        numbers["merged"] = numbers["merged"].gather(1, rows.unsqueeze(-1).expand_as(merged))
        numbers["merged_size"] = numbers["merged_size"].gather(1, rows)
    torch.testing.assert_close(source, numbers["source"])
    torch.testing.assert_close(merged, numbers["merged"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(size, numbers["merged_size"])
    if case != 2:  # with two prefix tokens the reference's own unmerge forgets that it reordered them
        torch.testing.assert_close(unmerge(matching, merged), numbers["unmerged"], atol=1e-5, rtol=1e-5)


def test_total_size_is_conserved_and_prefix_tokens_pass_untouched():
    x, size = torch.randn(4, 23, 8), torch.rand(4, 23) + 0.5
    size[:, :3] = 1
    merged, merged_size = merge(bipartite_match(x, 7, 3), x, size)
    torch.testing.assert_close(merged_size.sum(1), size.sum(1))
    assert torch.equal(merged[:, :3], x[:, :3])
    assert torch.equal(merged_size[:, :3], size[:, :3])


def test_unmerge_gives_each_token_its_groups_token():
    x = torch.randn(2, 20, 4)
    matching = bipartite_match(x, 6)
    merged, size = merge(matching, x)
    spread = unmerge(matching, merged)
    assert torch.equal(spread, torch.stack([m[p] for m, p in zip(merged, matching.position(), strict=True)]))
    counts = torch.stack([p.bincount(minlength=14) for p in matching.position()])
    assert torch.equal(counts.float(), size)


def test_without_sizes_every_token_counts_once():
    x = torch.randn(2, 20, 4)
    matching = bipartite_match(x, 6)
    for ours, explicit in zip(merge(matching, x), merge(matching, x, torch.ones(2, 20)), strict=True):
        assert torch.equal(ours, explicit)


def test_gradients_reach_tokens_and_sizes():
    x, size = torch.randn(2, 9, 3, dtype=torch.float64), torch.rand(2, 9, dtype=torch.float64) + 0.5
    matching = bipartite_match(x, 3)
    inputs = (x.requires_grad_(), size.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, size: merge(matching, x, size), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_float32_sizes_and_matching(dtype):
    metric, x = torch.randn(2, 30, 8).to(dtype), torch.randn(2, 30, 8)
    matching = bipartite_match(metric, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = bipartite_match(metric, 8)
    assert torch.equal(matching.rows, under_autocast.rows) and torch.equal(matching.into, under_autocast.into)
    merged, size = merge(matching, x.to(dtype))
    assert size.dtype == torch.float32 and merged.dtype == dtype
    torch.testing.assert_close(merged.float(), merge(matching, x)[0], atol=3e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_holds_the_sums_of_large_tokens(dtype):
    x, size = torch.randn(2, 41, 8) * 300, torch.randint(1, 400, (2, 41)).float()
    matching = bipartite_match(torch.randn(2, 41, 4), 20)
    wanted, sizes = merge(matching, x, size)
    merged, half_sizes = merge(matching, x.to(dtype), size)
    assert merged.dtype == dtype and torch.equal(sizes, half_sizes)
    torch.testing.assert_close(merged.float(), wanted, atol=1000 * torch.finfo(dtype).eps, rtol=0)


def test_compiles_to_one_graph():
    def step(metric, x):
        return merge(bipartite_match(metric, 4), x)

    metric, x = torch.randn(2, 17, 4), torch.randn(2, 17, 6)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(metric, x), step(metric, x), strict=True):
        torch.testing.assert_close(ours, eager)


def test_of_equal_tokens_the_first_merge_into_the_first():
    matching = bipartite_match(torch.ones(2, 301, 4), 100)  # more than a sort that is not stable leaves in order
    position = [*range(301)]
    assert matching.kept()[1].tolist() == [0, *position[202::2], *position[1::2]]
    assert matching.destination.eq(51).all()  # behind the class token and the 50 even ones that stay
    assert matching.order[1, 201:].tolist() == position[2:201:2]


def test_numbers_made_once_serve_smaller_inputs():
    metric = torch.randn(3, 17, 4)
    for ours, own in zip(bipartite_match(metric, 4, 1, torch.arange(99)), bipartite_match(metric, 4), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(own))


def test_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"\(B, N, E\), got \(4, 5\)"):
        bipartite_match(torch.randn(4, 5), 1)
    with pytest.raises(ValueError, match="r=-1"):
        bipartite_match(torch.randn(1, 4, 5), -1)
