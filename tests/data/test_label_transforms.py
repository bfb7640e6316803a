import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader

from timm_tokens.data import LabeledTarget, TokenLabelDataset, TokenLabelStore, TokenLabelTransform, TokenLabelWriter
from timm_tokens.data.rand_augment import _AFFINE, TrackedRandAugment, _run
from timm_tokens.ops import crop_maps, crop_token_labels, warp_token_labels

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def coordinate_image(height=120, width=160):
    """Red tells the row, green the column, blue is full: where blue is not, the view shows what is outside."""
    row = (np.arange(height) + 0.5) / height * 255
    column = (np.arange(width) + 0.5) / width * 255
    red, green = np.broadcast_arrays(row[:, None], column)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 255)], -1).round().astype(np.uint8))


def assert_map_is_true(image, matrix, tolerance=0.012):
    """Every pixel's colour is the place in the original image that the map sends the pixel to."""
    pixels = torch.tensor(np.asarray(image)).double()
    H, W, _ = pixels.shape
    row, column = torch.meshgrid((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W, indexing="ij")
    expected = torch.stack([row, column, torch.ones_like(row)], -1).double() @ matrix.double().T
    outside = (pixels[..., 2] < 255) | (expected[..., :2] < 0.02).any(-1) | (expected[..., :2] > 0.98).any(-1)
    near = torch.nn.functional.max_pool2d(outside[None].float(), 9, 1, 4)[0]  # as far as interpolation carries
    known = near == 0
    assert known.float().mean() > 0.05
    assert (pixels[..., :2] / 255 - expected[..., :2])[known].abs().max() < tolerance


def uint8(**kwargs):
    return TokenLabelTransform(**({"img_size": 96, "normalize": False, "scale": (0.2, 1.0)} | kwargs))


@pytest.mark.parametrize("name", sorted(_AFFINE))
@pytest.mark.parametrize("magnitude", [2, 9])
def test_maps_of_timms_operations(name, magnitude):
    for seed in range(3):  # both signs
        random.seed(seed)
        op = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams={"translate_const": 60, "img_mean": (128,) * 3})
        image, matrix = _run(op, coordinate_image())
        assert not torch.equal(matrix, torch.eye(3))
        assert_map_is_true(image, matrix)


def test_operations_that_are_not_applied_or_move_nothing():
    never = AugmentOp("Rotate", prob=0.0, magnitude=9)
    image = coordinate_image()
    assert _run(never, image)[0] is image
    assert torch.equal(_run(never, image)[1], torch.eye(3))
    colours = AugmentOp("Invert", prob=1.0, magnitude=9)
    assert torch.equal(_run(colours, image)[1], torch.eye(3))


def test_rand_augment_is_timms():
    config, hparams = "rand-m9-n3-mstd0.5-inc1", {"translate_const": 40, "img_mean": (1, 2, 3)}
    ours, timms = TrackedRandAugment(config, hparams), rand_augment_transform(config, dict(hparams))
    assert [repr(op) for op in ours.ops] == [repr(op) for op in timms.ops] and ours.num_layers == 3
    weighted = TrackedRandAugment("rand-m9-tweights", hparams)
    assert not weighted.replacement and weighted.weights.argmax() == 0


@pytest.mark.parametrize("config", ["rand-m9-mstd0.5-inc1", "rand-m9"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_operation_at_every_strength(config, mode):
    """What a run of thousands of images meets, without the thousands: Pillow refuses to posterize to 0 bits."""
    augment = TrackedRandAugment(config, {"translate_const": 5, "img_mean": (128,) * len(mode)})
    images = [Image.new(mode, size, (90,) * len(mode)) for size in ((9, 13), (1, 1), (1, 7))]
    for op in augment.ops:
        op.prob, op.magnitude_std = 1.0, 0.0
        for strength in range(41):
            op.magnitude = strength / 4
            image = images[strength % 3]
            found, matrix = _run(op, image)
            assert (found.mode, found.size) == (mode, image.size) and matrix.isfinite().all()


def test_posterize_keeps_a_bit():
    op = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)  # to 0 bits
    values = np.asarray(_run(op, coordinate_image())[0])
    assert set(np.unique(values)) == {0, 128}


def test_images_of_any_mode_and_size():
    rgb, grey = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8), {"mean": (0.5,), "std": (0.5,)}
    for channels, kwargs in ((3, {}), (1, grey)):
        transform = TokenLabelTransform(16, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, **kwargs)
        for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "F"):
            for size in ((7, 9), (1, 1), (300, 1)):
                view = transform(Image.fromarray(rgb).convert(mode).resize(size))
                assert view.image.shape == (channels, 16, 16) and view.image.isfinite().all()


@pytest.mark.parametrize("seed", range(6))
def test_map_of_crop_and_flips(seed):
    view = uint8(img_size=(96, 128), vflip=0.5)(coordinate_image(), torch.Generator().manual_seed(seed))
    assert view.image.shape == (3, 96, 128) and view.image.dtype == torch.uint8
    assert_map_is_true(view.image.permute(1, 2, 0), view.map)


@pytest.mark.parametrize("crop_last", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_map_of_the_whole_augmentation(seed, crop_last, monkeypatch):
    # Only what moves points, since colours are what tells the place here; several layers, so that maps are composed.
    monkeypatch.setattr(
        "timm.data.auto_augment._RAND_TRANSFORMS", sorted(_AFFINE.keys() - {"TranslateX", "TranslateY"})
    )
    transform = uint8(auto_augment="rand-m5-n3-p1", vflip=0.5, crop_last=crop_last)
    view = transform(coordinate_image(), torch.Generator().manual_seed(seed))
    assert_map_is_true(view.image.permute(1, 2, 0), view.map, tolerance=0.03)


def test_crop_last_augments_the_whole_image(monkeypatch):
    seen = []
    monkeypatch.setattr(
        TrackedRandAugment, "__call__", lambda self, image: seen.append(image.size) or (image, torch.eye(3))
    )
    for crop_last in (False, True):
        uint8(auto_augment="rand-m9", crop_last=crop_last)(coordinate_image())
    assert seen == [(96, 96), (160, 120)]


def test_labels_follow_a_crop_as_roi_align_says():
    values, indices = torch.randn(1, 5, 9, 9), torch.rand(1, 20, 9, 9).argsort(1)[:, :5]
    for seed in range(8):
        view = uint8(hflip=0.5)(coordinate_image(), torch.Generator().manual_seed(seed))
        scale, shift = view.map.diagonal()[:2], view.map[:2, 2]
        flip = scale[1:] < 0
        box = torch.stack([shift[0], torch.minimum(shift[1], shift[1] + scale[1]), scale[0], scale[1].abs()])[None]
        torch.testing.assert_close(crop_maps(box, flip)[0], view.map)
        expected = crop_token_labels(values, indices, box, 20, 7, flip=flip, dense=True)
        got = warp_token_labels(values, indices, view.map[None], 20, 7, dense=True)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_interpolation_reaches_every_step():
    transform = TokenLabelTransform(32, auto_augment="rand-m9", interpolation="bilinear")
    assert [mode.value for mode in transform.interpolations] == ["bilinear"]
    assert {op.kwargs["resample"] for op in transform.rand_augment.ops} == {Image.Resampling.BILINEAR}


def test_a_generator_decides_everything_and_nothing_else_moves():
    transform = TokenLabelTransform(64, auto_augment="rand-m9-mstd0.5-inc1", re_prob=1.0, re_mode="pixel")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    views = [transform(coordinate_image(), torch.Generator().manual_seed(3)) for _ in range(2)]
    other = transform(coordinate_image(), torch.Generator().manual_seed(4))
    assert torch.equal(views[0].image, views[1].image) and torch.equal(views[0].map, views[1].map)
    assert not torch.equal(views[0].image, other.image)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])


def test_without_a_generator_torchs_own_decides():
    views = []
    for _ in range(2):
        torch.manual_seed(5)
        views += [TokenLabelTransform(32)(coordinate_image()) for _ in range(2)]
    assert torch.equal(views[0].image, views[2].image) and torch.equal(views[1].image, views[3].image)
    assert not torch.equal(views[0].map, views[1].map)


def test_normalisation_and_erasing_leave_the_map_alone():
    seed = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    plain = TokenLabelTransform(64, normalize=False)(coordinate_image(), seed())
    normal = TokenLabelTransform(64, mean=MEAN, std=STD)(coordinate_image(), seed())
    erased = TokenLabelTransform(64, mean=MEAN, std=STD, re_prob=1.0)(coordinate_image(), seed())
    flat = TokenLabelTransform(64, mean=MEAN, std=STD, re_prob=1.0, re_mode="const")(coordinate_image(), seed())
    assert torch.equal((flat.image == 0).all(0), (erased.image != normal.image).any(0))
    torch.testing.assert_close(normal.image, plain.image / 127.5 - 1)
    changed = (erased.image != normal.image).any(0)
    assert 0.01 < changed.float().mean() < 0.4 and erased.image[:, changed].std() > 0.8  # noise, as published
    assert torch.equal(plain.map, normal.map) and torch.equal(plain.map, erased.map)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"auto_augment": "augmix-m3"}, "must be a RandAugment, 'rand-...', .* got 'augmix-m3'"),
        ({"re_prob": 0.25, "normalize": False}, "re_prob=0.25 needs normalize=True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLabelTransform(**arguments)


def test_unknown_operations_are_refused(monkeypatch):
    monkeypatch.delitem(_AFFINE, "Rotate")
    with pytest.raises(ValueError, match=r"labels can't follow \['Rotate'\] of 'rand-m9'"):
        TokenLabelTransform(auto_augment="rand-m9")


# --- the data set ---


@pytest.fixture
def folders(tmp_path):
    """Six images in two classes, and a store with labels of class 10 * class + image."""
    with TokenLabelWriter(tmp_path / "labels", 100) as writer:
        for i in range(6):
            folder = tmp_path / "images" / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            coordinate_image(40, 50).save(folder / f"img{i}.png")
            writer.add(f"{'ab'[i % 2]}/img{i}", torch.full((1, 4, 4), 9.0), torch.full((1, 4, 4), 10 * (i % 2) + i))
    return tmp_path / "images", tmp_path / "labels"


def make(folders, **kwargs):
    images, labels = folders
    return TokenLabelDataset(create_dataset("", images), TokenLabelStore(labels), TokenLabelTransform(32, **kwargs))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_batches(folders, workers):
    dataset = make(folders)
    images, target = next(iter(DataLoader(dataset, 6, num_workers=workers)))
    assert len(dataset) == 6 and dataset.missing_labels() == []
    assert images.shape == (6, 3, 32, 32) and isinstance(target, LabeledTarget)
    assert target.label.tolist() == [0, 0, 0, 1, 1, 1]
    assert target.indices[:, 0, 0, 0].tolist() == [0, 2, 4, 11, 13, 15]  # each label with its image
    assert (target.values.dtype, target.indices.dtype) == (torch.float16, torch.int32)
    labels = warp_token_labels(target.values, target.indices, target.map, 100, 2, dense=True)
    assert labels.argmax(1).eq(target.indices[:, 0, :1, 0]).all()


def test_timms_prefetch_loader_takes_it(folders):
    loader = PrefetchLoader(DataLoader(make(folders, normalize=False), 3), device=torch.device("cpu"))
    batches = list(loader)
    assert len(batches) == 2
    images, target = batches[0]
    assert images.dtype == torch.float32 and isinstance(target, LabeledTarget) and target.map.shape == (3, 3, 3)


def test_a_missing_label_names_the_image(folders):
    images, _ = folders
    coordinate_image(40, 50).save(images / "a" / "new.png")
    dataset = make(folders)
    assert dataset.missing_labels() == ["a/new"]
    with pytest.raises(KeyError, match="no label for image 'a/new'"):
        dataset[3]


def test_a_damaged_image_is_named_and_not_replaced_by_the_next(folders):
    images, _ = folders
    (images / "a" / "img2.png").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"image 'a/img2\.png' can't be read: it is empty"):
        make(folders)[1]


def test_streams_are_refused(folders):
    stream = IterableImageDataset(folders[0], reader=[])
    with pytest.raises(TypeError, match=r"must be indexed, such as a timm.data.ImageDataset, got IterableImageDataset"):
        TokenLabelDataset(stream, {}, TokenLabelTransform())
