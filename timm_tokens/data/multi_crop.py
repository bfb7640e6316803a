"""Several augmented crops of one image, for learning without labels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from timm_tokens.data.model_input import input_config
from timm_tokens.seeding import drawn_from


class Crop(NamedTuple):
    """One kind of crop. All are plain values, so `crop._replace(flip=0.0)` makes a variant.

    Attributes:
        size: Side, in pixels.
        count: How many of the kind an image gives.
        scale: Range of the area, as a share of the image's.
        flip: Probability of a left-right flip.
        jitter: How far brightness, contrast, saturation and hue may change.
        jitter_prob: Probability that they change.
        grayscale: Probability that the colour goes.
        blur: Probability of a Gaussian blur.
        solarize: Probability that the brighter half of the values is inverted.
        ratio: Range of the aspect ratio.
        blur_sigma: Range of the blur, in pixels.
    """

    size: int
    count: int = 1  # type: ignore[assignment]  # it hides the method of tuples
    scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_prob: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.5
    solarize: float = 0.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    blur_sigma: tuple[float, float] = (0.1, 2.0)


def dino_crops(
    global_size: int = 224,
    local_size: int = 96,
    num_local: int = 8,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
) -> list[Crop]:
    """DINO's crops: two global ones, of which the second alone is solarised, and the local ones.

    With num_local=0 and global_scale=(0.08, 1.0) they are MoBY's.

    Source: DINO (arXiv 2104.14294), section 3.1 and appendix; BYOL (arXiv 2006.07733) for the colours.
    """
    first = Crop(global_size, 1, global_scale, blur=1.0)
    second = Crop(global_size, 1, global_scale, blur=0.1, solarize=0.2)
    local = [Crop(local_size, num_local, local_scale)] if num_local else []
    return [first, second, *local]


def swav_crops(
    global_size: int = 224,
    local_size: int = 96,
    num_local: int = 6,
    global_scale: tuple[float, float] = (0.14, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.14),
) -> list[Crop]:
    """SwAV's crops: two global ones and the local ones, all with the strong colour distortion of SimCLR.

    Source: SwAV (arXiv 2006.09882), section 4 and appendix; SimCLR (arXiv 2002.05709), appendix A.
    """
    jitter = (0.8, 0.8, 0.8, 0.2)
    local = [Crop(local_size, num_local, local_scale, jitter=jitter)] if num_local else []
    return [Crop(global_size, 2, global_scale, jitter=jitter), *local]


class MultiCrop:
    """Turn an image into a list of normalised crops (C, size, size), those of the first kind first.

        transform = MultiCrop.for_model(vit, dino_crops(num_local=6))
        dataset = ImageFolder("images", transform)        # torchvision's or timm's; a batch is a list of crops

    Args:
        crops: The kinds of crops.
        mean: Mean of the normalisation, one value per channel; a single value makes the crops grey.
        std: Standard deviation of the normalisation.
        interpolation: "bicubic", "bilinear" or "nearest".

    Raises:
        ValueError: If there is no crop, or a size, count, range or probability is impossible.
    """

    def __init__(
        self,
        crops: Sequence[Crop],
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        interpolation: str = "bicubic",
    ) -> None:
        _check(crops)
        self.crops, self.mean, self.std = tuple(crops), tuple(mean), tuple(std)
        self.interpolation = interpolation
        self.mode = "L" if len(self.mean) == 1 else "RGB"
        kinds = [(crop, _transform(crop, mean, std, InterpolationMode(interpolation))) for crop in crops]
        self.steps = [kind for kind in kinds for _ in range(kind[0].count)]  # of each crop that an image gives

    @classmethod
    def for_model(cls, model: nn.Module, crops: Sequence[Crop], interpolation: str | None = None) -> "MultiCrop":
        """With the channels and the normalisation that a timm model expects, and its interpolation if None is given."""
        config = input_config(model)
        return cls(crops, config["mean"], config["std"], interpolation or config["interpolation"])

    def __call__(self, image: Image.Image | Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Draw all crops of a PIL image, or of a uint8 tensor (C, H, W).

        All randomness comes from the generator, or from torch's own where none is given.
        """
        if isinstance(image, Image.Image):
            image = v2.functional.pil_to_tensor(image.convert(self.mode))
        with drawn_from(generator):
            return [transform(image) for _, transform in self.steps]

    def __repr__(self) -> str:
        return f"MultiCrop({list(self.crops)}, mean={self.mean}, std={self.std})"


def blur_reach(crop: Crop) -> int:
    """How many pixels the blur reaches; reflection can't reach further than the side."""
    return min(math.ceil(3 * crop.blur_sigma[1]), crop.size - 1)


def _transform(crop: Crop, mean: Sequence[float], std: Sequence[float], interpolation: InterpolationMode) -> v2.Compose:
    """One kind of crop as a pipeline of uint8 tensors, with the steps of probability 0 left out."""
    reach = blur_reach(crop)
    steps = [
        (1.0, v2.RandomResizedCrop(crop.size, crop.scale, crop.ratio, interpolation, antialias=True)),
        (crop.flip, v2.RandomHorizontalFlip(crop.flip)),
        (crop.jitter_prob, v2.RandomApply([v2.ColorJitter(*crop.jitter)], crop.jitter_prob)),
        (crop.grayscale, v2.RandomGrayscale(crop.grayscale)),
        (crop.blur, v2.RandomApply([v2.GaussianBlur(2 * reach + 1, crop.blur_sigma)], crop.blur)),
        (crop.solarize, v2.RandomSolarize(128, crop.solarize)),
        (1.0, v2.ToDtype(torch.float32, scale=True)),
        (1.0, v2.Normalize(list(mean), list(std))),
    ]
    return v2.Compose([step for probability, step in steps if probability > 0])


def _check(crops: Sequence[Crop]) -> None:
    if not crops:
        raise ValueError("crops is empty: give at least one kind, such as those of dino_crops()")
    for crop in crops:
        for name in ("size", "count"):
            if getattr(crop, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(crop, name)} in {crop}")
        for name in ("flip", "jitter_prob", "grayscale", "blur", "solarize"):
            if not 0 <= getattr(crop, name) <= 1:
                raise ValueError(f"{name} is a probability, in [0, 1], got {getattr(crop, name)} in {crop}")
        if not 0 < crop.scale[0] <= crop.scale[1] <= 1:
            raise ValueError(f"scale must be a range of shares in (0, 1], low first, got {crop.scale} in {crop}")
        for name in ("ratio", "blur_sigma"):
            low, high = getattr(crop, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be a range of positive numbers, low first, got {low, high} in {crop}")
