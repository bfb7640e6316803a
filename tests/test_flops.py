"""FLOPs from shapes alone equal those that torch counts while the model runs."""

import pytest
import timm
import torch
from families import DRIVABLE, MERGEABLE, create, images
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_tokens import TokenViT, apply_dtem_merging


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
    assert model.flops(image_size=(48, 48)) == counted(model, images(1))
    assert model.costs((48, 48)).flops((0,) * 3, features=True) == counted(model.base, images(1))


@pytest.mark.parametrize("metric", ["learned", "keys"])
@pytest.mark.parametrize("family", MERGEABLE)
def test_with_merging(family, metric):
    model = apply_dtem_merging(create(family), r=7, metric=metric).eval()
    assert model.flops(image_size=(48, 48)) == counted(model, images(1))
    assert model.flops(r=[7], image_size=(48, 48)) < model.flops(r=0, image_size=(48, 48))
    model.merger.r = [3]
    assert model.flops(image_size=(48, 48)) == counted(model, images(1))


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
    full = model.flops(0)
    assert model.flops() <= ratio * full
    assert model.merger.r == 0 or model.flops(model.merger.r - 1) > ratio * full
