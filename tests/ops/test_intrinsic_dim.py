"""Local intrinsic dimensionality against its definition, on known dimensions, and where it degenerates."""

import math

import pytest
import torch

from timm_tokens.ops import local_intrinsic_dimensionality


def slow(x, k):
    """The definition, one point at a time in float64."""
    result = []
    for point in x.double():
        near = (x.double() - point).square().sum(-1).sqrt().sort().values[1:k]
        result.append(-(k - 1) / (near / near[-1]).log().sum())
    return torch.stack(result)


@pytest.mark.parametrize(("points", "dim", "k"), [(30, 4, 3), (80, 64, 21), (25, 3, 25), (21, 640, 21)])
def test_equals_the_definition(points, dim, k):
    x = torch.randn(points, dim) + 3
    torch.testing.assert_close(local_intrinsic_dimensionality(x, k).double(), slow(x, k), atol=0, rtol=1e-5)


@pytest.mark.parametrize("case", [0, 1])
def test_golden(golden, case):
    data = golden("esfr")
    lid = local_intrinsic_dimensionality(data[f"{case}.preprocessed"])
    torch.testing.assert_close(lid.mean(), data[f"{case}.lid_k21"][0], atol=1e-4, rtol=0)


def test_leading_dimensions_are_a_batch():
    x = torch.randn(2, 3, 30, 8)
    lid = local_intrinsic_dimensionality(x, 7)
    assert lid.shape == (2, 3, 30)
    torch.testing.assert_close(lid[1, 2], local_intrinsic_dimensionality(x[1, 2], 7))


def test_finds_the_dimension_that_points_fill():
    flat = torch.rand(3000, 2) @ torch.randn(2, 50)
    assert local_intrinsic_dimensionality(flat).median().item() == pytest.approx(2, rel=0.1)


def test_scale_and_offset_do_not_matter():
    x = torch.randn(40, 6)
    torch.testing.assert_close(
        local_intrinsic_dimensionality(x * 1e3 + 5), local_intrinsic_dimensionality(x), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_squares_of_any_size_stay_in_range(scale):
    x = torch.randn(40, 6)
    torch.testing.assert_close(local_intrinsic_dimensionality(x * scale), local_intrinsic_dimensionality(x))


def test_near_duplicates_are_not_lost_to_rounding():
    x = torch.randn(40, 256)
    x[1] = x[0] + 1e-5 * torch.randn(256)
    torch.testing.assert_close(local_intrinsic_dimensionality(x).double(), slow(x, 21), atol=0, rtol=1e-4)


def test_coinciding_points_have_dimension_zero():
    x = torch.randn(40, 64)
    x[5] = x[30]
    lid = local_intrinsic_dimensionality(x)
    assert (lid == 0).nonzero().flatten().tolist() == [5, 30]
    assert local_intrinsic_dimensionality(torch.zeros(40, 8)).eq(0).all()
    assert local_intrinsic_dimensionality(torch.randn(1, 64).expand(40, -1)).eq(0).all()


def test_equidistant_points_have_infinite_dimension():
    assert local_intrinsic_dimensionality(torch.eye(30)).eq(math.inf).all()


def test_half_precision_keeps_its_type():
    x = torch.randn(30, 100).mul(50).half()
    lid = local_intrinsic_dimensionality(x)  # the squared distances overflow float16
    assert lid.dtype == torch.float16
    torch.testing.assert_close(lid.double(), slow(x, 21), atol=0, rtol=1e-3)


@pytest.mark.parametrize(("points", "k"), [(20, 21), (30, 2), (30, 0)])
def test_refuses_neighbours_that_do_not_fit(points, k):
    with pytest.raises(ValueError, match=rf"k = {k} .* do not fit {points} points"):
        local_intrinsic_dimensionality(torch.randn(points, 4), k)


def test_the_way_with_a_gradient_and_the_compiled_one_give_the_same():
    x = torch.randn(3, 30, 8)
    expected = local_intrinsic_dimensionality(x, 7)
    leaf = x.clone().requires_grad_()
    followed = local_intrinsic_dimensionality(leaf, 7)
    torch.testing.assert_close(followed, expected)
    assert torch.autograd.grad(followed.sum(), leaf)[0].isfinite().all()
    compiled = torch.compile(local_intrinsic_dimensionality, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 7), expected)


def test_compiles_without_what_inductor_warns_of():
    """The lowering of diagonal calls what torch itself has deprecated."""
    called = []

    def backend(graph, example):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x = torch.randn(3, 30, 8)
    compiled = torch.compile(local_intrinsic_dimensionality, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, 7), local_intrinsic_dimensionality(x, 7))
    assert called and not any("diagonal" in name for name in called)
