import pytest
import torch

from timm_tokens.ops import kmeans_groups, superpixel_features


def slow_kmeans(points, count, rounds):
    """Of one image, by loops."""
    means = [points[i * len(points) // count] for i in range(count)]

    def nearest(point):
        return min(range(count), key=lambda g: float((point - means[g]).square().sum()))

    for _ in range(rounds):
        groups = [nearest(point) for point in points]
        for g in range(count):
            members = [point for point, group in zip(points, groups, strict=True) if group == g]
            if members:
                means[g] = torch.stack(members).mean(0)
    return [nearest(point) for point in points]


def test_equals_the_slow_form():
    x = torch.randn(3, 20, 4)
    for count, rounds, prefix in ((1, 2, 0), (5, 1, 0), (7, 10, 0), (6, 4, 2), (19, 3, 1)):
        found = kmeans_groups(x, count, rounds=rounds, num_prefix_tokens=prefix)
        for groups, points in zip(found.tolist(), x, strict=True):
            assert groups[:prefix] == list(range(prefix))
            expected = [g + prefix for g in slow_kmeans(points[prefix:], count, rounds)]
            assert groups[prefix:] == expected or count == 20 - prefix, (count, rounds, prefix)


def test_as_many_groups_as_tokens_leave_each_alone():
    x = torch.zeros(2, 6, 3)  # though they are all alike
    assert torch.equal(kmeans_groups(x, 6), torch.arange(6).expand(2, 6))
    assert torch.equal(kmeans_groups(x, 4, num_prefix_tokens=2), torch.arange(6).expand(2, 6))


def test_clusters_that_are_apart_are_found_and_a_group_may_be_empty():
    kinds = torch.arange(12) % 3
    x = (10.0 * torch.eye(3))[kinds].unsqueeze(0) + 0.1 * torch.randn(1, 12, 3)
    groups = kmeans_groups(x, 5)[0]
    assert all(len(set(groups[kinds == k].tolist()) & set(groups[kinds != k].tolist())) == 0 for k in range(3))
    assert len(set(kmeans_groups(torch.ones(1, 8, 2), 3)[0].tolist())) == 1


def test_one_graph_compiles():
    x = torch.randn(2, 16, 8)
    compiled = torch.compile(lambda x: kmeans_groups(x, 5), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), kmeans_groups(x, 5))


def test_superpixels_are_of_one_colour_and_near():
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, :, 16:] = 2.0
    points = superpixel_features(images, (4, 4))
    assert points.shape == (1, 16, 5)
    assert points[0, 3].tolist() == pytest.approx([2, 2, 2, 0, 2])  # the top right patch
    groups = kmeans_groups(points, 2)[0].view(4, 4)
    assert (groups[:, :2] == groups[0, 0]).all() and (groups[:, 2:] == groups[0, 3]).all()
    rows = kmeans_groups(superpixel_features(torch.zeros(1, 3, 32, 32), (4, 4)), 4)[0].view(4, 4)
    for g in rows.unique():
        where = (rows == g).nonzero().float()
        assert (where - where.mean(0)).abs().max() < 2  # without colours, near patches


def test_refusals():
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"num_groups must be between 1 and the 4 tokens to group, got {count}"):
            kmeans_groups(torch.zeros(1, 4, 2), count)
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, C\), got \(4, 2\)"):
        kmeans_groups(torch.zeros(4, 2), 1)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        kmeans_groups(torch.zeros(1, 4, 2), 1, rounds=0)
