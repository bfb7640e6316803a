"""timm's RandAugment, with the affine map of what it did."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from torch import Tensor

_POSTERIZE = {"Posterize", "PosterizeIncreasing", "PosterizeOriginal"}
# timm passes over what it does not know.
_PART = re.compile(r"t(weights|3aw|3a)|(m|n|mmax|inc)\d+|(p|mstd)\d+(\.\d+)?")

# These change colours alone.
_IN_PLACE = _POSTERIZE | {
    "AutoContrast", "Brightness", "BrightnessIncreasing", "Color", "ColorIncreasing", "Contrast", "ContrastIncreasing",
    "Desaturate", "Equalize", "GaussianBlur", "GaussianBlurRand", "Invert", "Sharpness", "SharpnessIncreasing",
    "Solarize", "SolarizeAdd", "SolarizeIncreasing",
}  # fmt: skip


def _matrix(row: tuple[float, float, float], column: tuple[float, float, float]) -> Tensor:
    return torch.tensor([row, column, (0.0, 0.0, 1.0)])


def _rotate(degrees: float, width: int, height: int) -> Tensor:
    # Counter-clockwise about the centre, in pixels: the fractions of an image that is not square would shear.
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    yx, xy = sin * width / height, -sin * height / width
    return _matrix((cos, yx, (1 - cos - yx) / 2), (xy, cos, (1 - cos - xy) / 2))


# From (row, column) after the operation to before it, in fractions, for its argument and the image's width and height.
_AFFINE: dict[str, Callable[..., Tensor]] = {
    "Rotate": _rotate,
    "ShearX": lambda factor, width, height: _matrix((1, 0, 0), (factor * height / width, 1, 0)),
    "ShearY": lambda factor, width, height: _matrix((1, factor * width / height, 0), (0, 1, 0)),
    "TranslateX": lambda pixels, width, height: _matrix((1, 0, 0), (0, 1, pixels / width)),
    "TranslateY": lambda pixels, width, height: _matrix((1, 0, pixels / height), (0, 1, 0)),
    "TranslateXRel": lambda share, width, height: _matrix((1, 0, 0), (0, 1, share)),
    "TranslateYRel": lambda share, width, height: _matrix((1, 0, share), (0, 1, 0)),
}


class TrackedRandAugment:
    """timm's operations, magnitudes and probabilities; returns the image and its (3, 3) map to the image given.

    `config`, such as "rand-m9-mstd0.5-inc1", and `hparams` are as in timm. A config that is no RandAugment, or has
    operations that are not known here, is a ValueError.
    """

    def __init__(self, config: str, hparams: dict):
        if config.split("-")[0] != "rand":
            raise ValueError(f"auto_augment must be a RandAugment, 'rand-...', for labels to follow, got {config!r}")
        odd = [part for part in config.split("-")[1:] if not _PART.fullmatch(part)]
        if odd:
            raise ValueError(f"auto_augment takes parts such as m9, n2, p0.5, mstd0.5, mmax10, inc1, got {odd[0]!r}")
        augment = rand_augment_transform(config, dict(hparams))
        if not 1 <= augment.num_layers <= len(augment.ops):
            raise ValueError(
                f"auto_augment must have from 1 to {len(augment.ops)} operations (n) per image, got {config!r}"
            )
        unknown = sorted({op.name for op in augment.ops} - _IN_PLACE - _AFFINE.keys())
        if unknown:
            known = sorted(_IN_PLACE | _AFFINE.keys())
            raise ValueError(f"labels can't follow {unknown} of {config!r}: choose among {known}")
        self.ops, self.num_layers = augment.ops, augment.num_layers
        weights = augment.choice_weights
        self.weights = torch.ones(len(self.ops)) if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.replacement = weights is None

    def __call__(self, image: Image.Image) -> tuple[Image.Image, Tensor]:
        matrix = torch.eye(3)
        for chosen in torch.multinomial(self.weights, self.num_layers, self.replacement).tolist():
            image, step = _run(self.ops[chosen], image)
            matrix = matrix @ step
        return image, matrix


def _run(op: AugmentOp, image: Image.Image) -> tuple[Image.Image, Tensor]:
    """Run one operation and return its map. It draws its argument within its call, so a copy of it notes that down."""
    drawn: list[float] = []

    def note(image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        drawn.extend(args)
        if op.name in _POSTERIZE:  # to 0 bits, an image that is all black, is what Pillow refuses
            args = tuple(max(bits, 1) for bits in args)
        return cast(Any, op.aug_fn)(image, *args, **kwargs)

    noted = copy.copy(op)
    noted.aug_fn = note
    image = noted(image)
    if not drawn or op.name not in _AFFINE:  # not applied, by its probability, or a change of colours
        return image, torch.eye(3)
    return image, _AFFINE[op.name](*drawn, *image.size)
