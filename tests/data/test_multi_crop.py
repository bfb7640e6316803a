import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from timm_tokens.data import Crop, MultiCrop, dino_crops, swav_crops

PLAIN = Crop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter_prob=0.0, grayscale=0.0, blur=0.0)


def photo(height=40, width=48, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_kinds_and_counts():
    crops = MultiCrop(dino_crops(32, 16, 3))(photo())
    assert [tuple(x.shape) for x in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert all(x.dtype == torch.float32 for x in crops)
    crops = MultiCrop(swav_crops(32, 16))(photo())
    assert [x.shape[1] for x in crops] == [32, 32] + [16] * 6
    assert len(MultiCrop(dino_crops(32, num_local=0))(photo())) == 2


def test_the_papers_numbers():
    first, second, local = dino_crops()
    assert (first.size, first.scale, first.blur, first.solarize) == (224, (0.4, 1.0), 1.0, 0.0)
    assert (second.size, second.scale, second.blur, second.solarize) == (224, (0.4, 1.0), 0.1, 0.2)
    assert (local.size, local.count, local.scale, local.blur, local.solarize) == (96, 8, (0.05, 0.4), 0.5, 0.0)
    for crop in (first, second, local):
        assert crop.ratio == (3 / 4, 4 / 3)
        assert crop.jitter == (0.4, 0.4, 0.2, 0.1) and (crop.jitter_prob, crop.grayscale, crop.flip) == (0.8, 0.2, 0.5)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_a_crop_has_its_aspect_ratio(ratio):
    """Red grows along the rows of the image and green along its columns, so a crop shows how wide and high it was."""
    ramp = np.arange(128, dtype=np.uint8)
    image = Image.fromarray(np.stack([*np.meshgrid(ramp, ramp), np.zeros((128, 128), np.uint8)], axis=2))
    transform = MultiCrop([PLAIN._replace(size=64, scale=(0.3, 0.3), ratio=(ratio, ratio))], (0.0,) * 3, (1 / 255,) * 3)
    for seed in range(4):
        red, green, _ = transform(image, generator(seed))[0]
        width, height = (x.max() - x.min() + 1 for x in (red, green))
        assert abs(width / height - ratio) < 0.05 * ratio and abs(width * height / 128**2 - 0.3) < 0.02


def test_normalisation_is_the_models():
    model = timm.create_model("test_vit", pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)))
    image = photo(8, 8)
    (crop,) = MultiCrop.for_model(model, [PLAIN])(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    expected = (pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.25, 2.0])[:, None, None]
    torch.testing.assert_close(crop, expected)


@pytest.mark.parametrize("size", [4, 8, 32])
def test_tiny_and_grey_images(size):
    crops = [crop._replace(blur=1.0) for crop in dino_crops(size, size // 2, 2)]
    images = MultiCrop(crops, mean=[0.5], std=[0.5])(photo(8, 8))
    assert [tuple(x.shape) for x in images] == [(1, size, size)] * 2 + [(1, size // 2, size // 2)] * 2
    assert all(x.min() >= -1 and x.max() <= 1 for x in images)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"flip": 1.0}, lambda x: x.flip(2)),
        ({"solarize": 1.0}, lambda x: torch.where(x * 255 >= 128, 1 - x, x)),
        ({"grayscale": 1.0}, lambda x: (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).expand(3, 8, 8)),
    ],
)
def test_each_step(change, seen):
    image = photo(8, 8)
    (plain,) = MultiCrop([PLAIN], mean=[0] * 3, std=[1] * 3)(image)
    (changed,) = MultiCrop([PLAIN._replace(**change)], mean=[0] * 3, std=[1] * 3)(image)
    torch.testing.assert_close(changed, seen(plain), atol=1 / 255 + 1e-6, rtol=0)


def test_blur_and_jitter_change_the_image():
    image = photo(8, 8)
    (plain,) = MultiCrop([PLAIN])(image)
    (blurred,) = MultiCrop([PLAIN._replace(blur=1.0, blur_sigma=(2.0, 2.0))])(image)
    (coloured,) = MultiCrop([PLAIN._replace(jitter_prob=1.0)])(image)
    assert blurred.var() < plain.var() / 3 and (coloured - plain).abs().mean() > 0.01


def test_drawn_from_the_generator_alone():
    transform, states = MultiCrop(dino_crops(16, 8, 2)), torch.get_rng_state()
    first, again, other = (transform(photo(), generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[2], first[3])
    assert torch.equal(states, torch.get_rng_state())


def test_as_the_transform_of_a_data_set(tmp_path):
    for i in range(4):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        photo(seed=i).save(tmp_path / str(i % 2) / f"{i}.png")
    loader = DataLoader(ImageFolder(tmp_path, MultiCrop(dino_crops(16, 8, 1))), batch_size=2)
    crops, labels = next(iter(loader))
    assert [tuple(x.shape) for x in crops] == [(2, 3, 16, 16)] * 2 + [(2, 3, 8, 8)] and labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("crops", "message"),
    [
        ([], "crops is empty"),
        ([Crop(0)], "size must be at least 1, got 0"),
        ([Crop(8, count=0)], "count must be at least 1, got 0"),
        ([Crop(8, blur=1.5)], "blur is a probability.* got 1.5"),
        ([Crop(8, scale=(0.5, 0.2))], r"scale must be a range .* got \(0.5, 0.2\)"),
        ([Crop(8, ratio=(4 / 3, 0.75))], r"ratio must be a range of positive numbers, low first, got \(1.33"),
        ([Crop(8, blur=0.0, blur_sigma=(0.0, 2.0))], r"blur_sigma must be .* positive numbers, .* got \(0.0, 2.0\)"),
    ],
)
def test_impossible_crops_are_refused(crops, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(crops)


def test_a_model_of_one_channel_gets_grey_crops():
    model = timm.create_model("test_resnet", in_chans=1)
    transform = MultiCrop.for_model(model, [Crop(24)._replace(jitter_prob=0.0, blur=0.0)])
    assert transform.mean == pytest.approx((sum(model.pretrained_cfg["mean"]) / 3,))
    (crop,) = transform(Image.new("RGB", (40, 40), (255, 102, 0)))
    grey = (0.299 * 255 + 0.587 * 102) / 255
    torch.testing.assert_close(
        crop, torch.full((1, 24, 24), (grey - transform.mean[0]) / transform.std[0]), atol=0.02, rtol=0
    )
