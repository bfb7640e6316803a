"""Crops made on the device, in batches, are those that the loader would make, but for rounding."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from timm_tokens import seeding
from timm_tokens.data import Crop, DeviceCrops, MultiCrop, dino_crops, swav_crops
from timm_tokens.data.device_crops import blur, crop_resize, jitter

CPU = torch.device("cpu")
STRONG = Crop(48, 2, (0.2, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), jitter_prob=1.0, grayscale=0.3, blur=0.5, solarize=0.3)


def photo(seed, width=96, height=96):
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return v2.functional.to_pil_image((255 * smooth[0]).byte())


def both(crops, images, **options):
    """The crops of images, (V, B, C, h, w) by kind, as the loader and as the device make them, in [0, 255]."""
    plain, drawn = MultiCrop(crops, [0.0] * 3, [1 / 255] * 3), []
    device = DeviceCrops(plain, **options)
    expected = []
    for number, image in enumerate(images):
        with seeding.seeded(number):
            expected.append(plain(image))
        with seeding.seeded(number):
            drawn.append(device.draw(image))
    found = device((torch.stack([x for x, _ in drawn]), torch.stack([row for _, row in drawn])), CPU)
    return found, [torch.stack(same) for same in zip(*expected, strict=True)]


@pytest.mark.parametrize("crops", [dino_crops(48, 24, 3), swav_crops(48, 24, 3), [STRONG]], ids=["dino", "swav", "all"])
def test_they_are_the_loaders(crops):
    found, expected = both(crops, [photo(seed) for seed in range(12)])
    assert [x.shape for x in found] == [x.shape for x in expected]
    for x, y in zip(found, expected, strict=True):
        error = (x - y).abs()
        # Of 255. Whole numbers are rounded down after each change, and some past the 128 from which solarising inverts.
        assert error.mean() < 2 and (error > 8).float().mean() < 0.02


def test_images_of_any_shape_are_cut_at_the_same_place():
    plain = [Crop(32, 4, (0.3, 1.0), jitter_prob=0.0, grayscale=0.0, blur=0.0)]
    found, expected = both(plain, [photo(seed, 120, 75) for seed in range(6)], side=128)
    assert max((x - y).abs().mean() for x, y in zip(found, expected, strict=True)) < 1


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resizing_is_torchvisions(mode):
    images = torch.rand(3, 3, 40, 40)
    boxes = torch.tensor([[0, 0, 40, 40], [3, 5, 30, 20], [10, 12, 8, 9]])
    found = crop_resize(images, boxes / 40, 16, mode)
    for image, x, (top, left, height, width) in zip(images, found, boxes.tolist(), strict=True):
        resized = v2.functional.resized_crop(
            image, top, left, height, width, [16, 16], InterpolationMode(mode), antialias=True
        )
        torch.testing.assert_close(x, resized.clamp(0, 1), atol=1e-5, rtol=0)


def test_colours_and_blur_are_torchvisions():
    images = torch.rand(5, 3, 20, 20)
    order = torch.stack([torch.randperm(4) for _ in range(5)])
    factors = torch.rand(5, 4) + 0.5
    factors[:, 3] -= 1
    order[4] = -1
    changes = (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation)
    changes = (*changes, v2.functional.adjust_hue)
    for x, image, numbers, each in zip(jitter(images, order, factors), images, order, factors, strict=True):
        for number in numbers.tolist():
            image = image if number < 0 else changes[number](image, each[number].item())
        torch.testing.assert_close(x, image, atol=1e-4, rtol=0)
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0])
    for x, image, each in zip(blur(images, sigma.view(-1, 1, 1, 1), 6), images, sigma.tolist(), strict=True):
        torch.testing.assert_close(x, v2.functional.gaussian_blur(image, [13, 13], [each, each]), atol=1e-5, rtol=0)


def test_grey_images_stay_grey():
    crops = DeviceCrops(MultiCrop(swav_crops(32, 16, 1), [0.5], [0.5]))
    image, drawn = crops.draw(Image.new("L", (50, 40), 100))
    assert image.shape == (1, 64, 64) and [x.shape for x in crops((image[None], drawn[None]), CPU)] == [
        (1, 1, 32, 32), (1, 1, 32, 32), (1, 1, 16, 16),
    ]  # fmt: skip


def test_what_is_not_antialiased_is_refused():
    with pytest.raises(ValueError, match="bicubic or bilinear, got interpolation 'nearest'"):
        DeviceCrops(MultiCrop(dino_crops(), interpolation="nearest"))
