"""The schedule that changes a model's outputs least, found with unlabelled images."""

import itertools

import families
import pytest
import tiny
import torch
from torch.utils.data import DataLoader, TensorDataset

import timm_tokens
from timm_tokens import TokenViT, apply_dtem_merging
from timm_tokens.calibration import block_shares, placements
from timm_tokens.losses import DistillLoss
from timm_tokens.outputs import classifies, outputs
from timm_tokens.replay import Replay, as_batches


def calibrate(model, images, *args, **kwargs):
    return timm_tokens.calibrate(model, images, *args, progress=False, **kwargs)


def divergence(model, schedule, images):
    """How much the outputs with a schedule differ from those without merging, computed the plain way."""
    model.eval().merger.r = schedule
    with torch.no_grad():
        logits = classifies(model)
        plain = TokenViT(model.base, head=model.head).eval()
        return DistillLoss()(outputs(model, images, logits), outputs(plain, images, logits)).item()


@torch.no_grad()
def test_replayed_outputs_are_the_models():
    generator = torch.Generator().manual_seed(0)
    for i, name in enumerate(families.MERGEABLE):
        logits, images = bool(i % 2), families.images(3)
        model = timm_tokens.add_aux_tokens(apply_dtem_merging(families.create(name)), 2, 2).eval()
        replay = Replay(model, images.split(2), logits)
        for step in range(4):
            schedule = tuple(torch.randint(0, 9, (3,), generator=generator).tolist())
            found = replay(schedule, keep=step % 2 == 0)
            assert model.merger.r == schedule
            for got, part in zip(found, images.split(2), strict=True):
                torch.testing.assert_close(got, outputs(model, part, logits), msg=lambda m, name=name: f"{name}: {m}")


def test_only_what_changes_is_computed():
    model, seen = tiny.merging(depth=4), []
    for i, block in enumerate(model.base.blocks):
        block.attn.register_forward_hook(lambda *_, i=i: seen.append(i))
    with torch.no_grad():
        replay = Replay(model, [tiny.images()], logits=True)
        for schedule, keep, expected in (
            ((0, 0, 0, 0), True, [0, 1, 2, 3]), ((0, 0, 3, 1), False, [2, 3]), ((0, 4, 3, 1), True, [1, 2, 3]),
            ((0, 4, 3, 2), False, [3]), ((0, 4, 3, 1), False, []),
        ):  # fmt: skip
            seen.clear()
            replay(schedule, keep)
            assert seen == expected


def test_it_meets_the_budget_and_beats_the_constant_schedule():
    for family, ratio in (("class_token", 0.7), ("rope", 0.6)):
        model, images = tiny.merging(family, depth=5), tiny.images(6)
        found = calibrate(model, images, ratio)
        assert isinstance(found, tuple) and model.merger.r == found and all(type(r) is int for r in found)
        assert 0.95 * ratio < model.flops() / model.flops(0) <= ratio, family
        assert found == tuple(a - b for a, b in itertools.pairwise(model.token_counts()))  # no more than there are
        constant = apply_dtem_merging(model.base, flops_ratio=ratio).merger.r
        assert divergence(model, found, images) < 0.95 * divergence(model, constant, images), family


def test_the_whole_base_merges_nothing():
    assert calibrate(tiny.merging(depth=3), tiny.images(), 1) == (0, 0, 0)


def test_merging_after_the_last_attention_neither_costs_nor_saves_a_class_token_anything():
    logits, features = tiny.merging(depth=3), tiny.merging(depth=3, base_args={"num_classes": 0})
    for model in (logits, features):
        calibrate(model, tiny.images(8), 0.96)
    assert sum(logits.merger.r[:2]) > 0
    assert logits.flops() <= 0.96 * logits.flops(0)
    assert divergence(features, features.merger.r, tiny.images(8)) > 0  # patches change in any block


def test_it_is_the_same_each_time_and_in_any_form():
    images, results = tiny.images(9), []
    loader = DataLoader(TensorDataset(images, torch.arange(9)), batch_size=4)
    for given in (images, loader, iter(images.split(5)), list(images)):
        model = tiny.merging(depth=3).train()
        model.merger.eval()
        results.append(calibrate(model, given, 0.7))
        assert model.training and not model.merger.training
    assert len(set(results)) == 1


def test_fewer_blocks():
    model, images = tiny.merging(depth=6), tiny.images(4)
    for most, ratio in ((1, 0.8), (2, 0.45), (3, 0.6)):
        found = calibrate(model, images, ratio, max_blocks=most)
        assert sum(r > 0 for r in found) <= most and model.flops() <= ratio * model.flops(0)


def test_placements():
    assert placements(3, None) == placements(3, 3) == [(0, 1, 2), (1, 2), (2,)]
    assert placements(5, 2) == [
        (0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (1, 3), (2, 4), (0, 3), (1, 4), (0, 4),
    ]  # fmt: skip
    assert placements(12, 6)[-2:] == [(0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11)]
    assert placements(3, 1) == [(0,), (1,), (2,)]


def test_shares_are_interpolated():
    assert block_shares(6, (1, 2, 3, 4), [1, 2, 3, 5]) == pytest.approx([0, 1 / 11, 2 / 11, 3 / 11, 5 / 11, 0])
    assert block_shares(3, (2,), [7, 7, 2]) == [0, 0, 1]
    assert block_shares(4, (0, 3), [3, 9, 1]) == [0.75, 0, 0, 0.25]


def test_images_of_other_sizes_are_counted_as_they_are():
    model = tiny.merging(depth=3, base_args={"dynamic_img_size": True})
    calibrate(model, torch.randn(4, 3, 64, 48), 0.7)
    assert 0.65 < model.flops(image_size=(64, 48)) / model.flops(0, image_size=(64, 48)) <= 0.7


def refused(match, *args, model=None, error=ValueError, **kwargs):
    model = tiny.merging(r=(3, 1)) if model is None else model
    was = model.merger.r if isinstance(model, TokenViT) and model.merger is not None else None
    modes = [module.training for module in model.modules()]
    with pytest.raises(error, match=match):
        calibrate(model, *args, **kwargs)
    assert was is None or model.merger.r == was
    assert modes == [module.training for module in model.modules()]


def test_bad_input_is_refused_in_words():
    images = tiny.images()
    refused("merges no tokens", images, model=tiny.base())
    refused("merges no tokens", images, model=TokenViT(tiny.base()))
    for none in ([], images[:0], iter(())):
        refused("there are no images", none)
    refused(r"shape \(B, 3, H, W\) or \(3, H, W\), got \(3, 32\)", images[0, 0].expand(3, 32, 32)[:, :, 0])
    refused("got a str", ["a.jpg"], error=TypeError)
    refused(r"one size, got \(3, 32, 32\), \(3, 64, 64\)", [images, torch.zeros(1, 3, 64, 64)])
    for ratio in (0, 1.2, -1, float("nan")):
        refused(r"flops_ratio must lie in \(0, 1\]", images, ratio)
    refused(r"flops_ratio=0\.1 can't be reached: merging all .* in 2 of 2 blocks leaves 0\.733 of", images, 0.1)
    refused("merged in 1 of 4 blocks leaves", images, 0.5, model=tiny.merging(depth=4), max_blocks=1)
    for most in (0, 3, 1.5, True):
        refused("max_blocks must be an int from 1 to 2", images, 0.9, max_blocks=most)
    broken = images.clone()
    broken[1, 0, 3, 3] = torch.nan
    refused("outputs for these images are not finite", broken, 0.8)


def test_batches_are_bounded():
    batches = as_batches([torch.zeros(3, 8, 8), torch.zeros(70, 3, 8, 8)], 32, torch.device("cpu"))
    assert [len(batch) for batch in batches] == [32, 32, 7]
