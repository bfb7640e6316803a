"""What torch.jit.trace records of one image is right for any batch: no path is chosen by the example's batch size."""

import pytest
import torch

from timm_tokens import ops


def merged(metric, x):
    matching = ops.bipartite_match(metric, 4)
    x, size = ops.merge(matching, x)
    return x, size, ops.unmerge(matching, x)


def relaxed(metric, x):
    return ops.relaxed_merge(x, torch.ones(x.shape[:2]), metric, 4, 17)[:2]


def labels(values, boxes):
    indices = values.argsort(dim=1)
    return ops.crop_token_labels(values, indices, boxes, 20, 4), ops.crop_token_labels(
        values, indices, boxes, 20, 4, dense=True
    )


CASES = {
    "merge": (merged, (17, 4), (17, 6)),
    "relaxed_merge": (relaxed, (17, 4), (17, 6)),
    "morph": (lambda x: ops.morph(x, ops.morph_groups(x, [3, 2])), (16, 6)),
    "lid": (lambda x: ops.local_intrinsic_dimensionality(x, 5), (30, 6)),
    "crop_token_labels": (labels, (3, 8, 8), (4,)),
    "sparse_cross_entropy": (
        lambda z, excess: ops.sparse_cross_entropy(z, excess.argsort(dim=2), excess, torch.full(z.shape[:2], 0.01)),
        (5, 20),
        (5, 2),
    ),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_traced_with_one_and_called_with_three(name):
    function, *shapes = CASES[name]
    one, three = ([torch.rand(batch, *shape) * 0.4 + 0.1 for shape in shapes] for batch in (1, 3))
    traced = torch.jit.trace(function, one, check_trace=False)
    torch.testing.assert_close(traced(*three), function(*three))
