"""Merging costs few operations: each is a call that a single image waits for, and on a GPU a kernel to launch."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Counter(TorchDispatchMode):
    """Counts the operations that torch dispatches, views left out."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **kwargs or {})


@torch.no_grad()
def operations(model, images):
    with Counter() as counter:
        model(images)
    return counter.count


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("metric", "most"), [("learned", 18), ("keys", 20)])
def test_operations_that_merging_adds_to_a_block(metric, most, batch):
    images, models = tiny.images(batch), [tiny.merging(depth=depth, metric=metric) for depth in (2, 3)]
    block = operations(models[1].base, images) - operations(models[0].base, images)
    merging_block = operations(models[1], images) - operations(models[0], images)
    assert merging_block - block == most
