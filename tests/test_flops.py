"""FLOPs from shapes alone equal those that torch counts while the model runs."""

import pytest
import timm
import torch
from families import DRIVABLE, MERGEABLE, create, images
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_tokens import TokenViT, apply_dtem_merging, flops


def counted(model, x):
    """What one more image costs: some timm models make rotary tables by matrix products, once a batch."""
    return (_counted(model, torch.cat([x, x])) - _counted(model, x)) // 2


def _counted(model, x):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", DRIVABLE)
def test_without_merging(family):
    model = TokenViT(create(family)).eval()
    costs = model.costs((48, 48))
    assert costs.flops((0,) * 3) == counted(model, images(1))
    assert costs.flops((0,) * 3, features=True) == counted(model.base, images(1))


LEARNED = ["vit", "naflex", "rope_mixed", "lvvit", "differential"]  # a linear map per token, whatever the family


@pytest.mark.parametrize(("family", "metric"), [(f, "keys") for f in MERGEABLE] + [(f, "learned") for f in LEARNED])
def test_with_merging(family, metric):
    model = apply_dtem_merging(create(family), r=[7, 0, 3], metric=metric).eval()
    costs = model.costs((48, 48))
    assert costs.flops(model.merger.schedule) == counted(model, images(1)) < costs.flops((0,) * 3)


class Repeated(nn.Module):
    def __init__(self, module, times):
        super().__init__()
        self.module, self.times = module, times

    def forward(self, x):
        for _ in range(self.times):
            x = self.module(x)
        return x


class LowRank(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(48, rank)), nn.Parameter(torch.randn(rank, 48))

    def forward(self, x):
        return x @ self.down @ self.up


def test_equal_blocks_are_counted_once_and_others_each(monkeypatch):
    calls, count = [], flops._block_cost
    monkeypatch.setattr(flops, "_block_cost", lambda i, *rest: calls.append(i) or count(i, *rest))
    model = apply_dtem_merging(create("vit"), r=3).eval()
    assert model.flops(image_size=(48, 48)) == counted(model, images(1)) and calls == [0]
    model.base.blocks[0].mlp.fc1, model.base.blocks[0].mlp.fc2 = nn.Linear(48, 24), nn.Linear(24, 48)
    model.base.blocks[1].mlp = Repeated(model.base.blocks[1].mlp, 1)
    model.base.blocks[2].mlp = Repeated(model.base.blocks[2].mlp, 2)
    assert model.flops(image_size=(48, 48)) == counted(model, images(1)) and calls == [0, 0, 1, 2]
    twin = apply_dtem_merging(create("vit"), r=3).eval()
    for i, block in enumerate(twin.base.blocks):
        block.mlp = LowRank(4 + i)
    twin.merger.embed[1] = nn.Sequential(nn.Linear(48, 9), nn.Linear(9, 16))
    assert twin.flops(image_size=(48, 48)) == counted(twin, images(1))


def test_other_image_sizes():
    model = apply_dtem_merging(create("vit", dynamic_img_size=True), r=5).eval()
    assert model.flops(image_size=(64, 40)) == counted(model, torch.randn(1, 3, 64, 40))


def test_the_papers_numbers():
    """DTEM, table 2: DeiT-S at r = 12 needs 2.89 GFLOPs instead of 4.60."""
    model = timm.create_model("deit_small_dtem")
    costs = model.costs()
    assert costs.flops((12,) * 12, features=True) / 1e9 == pytest.approx(2.89, abs=0.005)
    assert costs.flops((0,) * 12, features=True) / 1e9 == pytest.approx(4.60, abs=0.005)
    # the class token alone needs the last MLP: 196 or 64 patches less in it, and nothing to compare in the last block
    assert model.flops(0) / 1e9 == pytest.approx(4.37, abs=0.005)
    assert model.flops(12) / 1e9 == pytest.approx(2.82, abs=0.005)


@pytest.mark.parametrize("ratio", [1.0, 0.8, 0.63])
def test_flops_ratio_is_reached_with_the_smallest_r(ratio):
    model = apply_dtem_merging(create("vit"), flops_ratio=ratio)
    costs, r = model.costs(), model.merger.r
    full = costs.flops((0,) * 3)
    assert costs.flops((r,) * 3) <= ratio * full
    assert r == 0 or costs.flops((r - 1,) * 3) > ratio * full
