"""Augment an image and remember where every point went, so that its label map can follow.

The geometric steps are affine. Their maps, from the new image to the old one, are multiplied into a single one, and the
label map is sampled once, on the training device, by `timm_tokens.ops.warp_token_labels`.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, str_to_pil_interp
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from timm_tokens.data.rand_augment import TrackedRandAugment
from timm_tokens.ops.ranges import check_counts, check_spans, check_within
from timm_tokens.seeding import drawn_from


class View(NamedTuple):
    """An augmented image (3, H, W) and the `map` (3, 3) from (row, column, 1) in it to the same in the original image.

    Rows and columns are fractions, from 0 at the top left corner to 1.
    """

    image: Tensor
    map: Tensor


class TokenLabelTransform:
    """timm's training augmentation, PIL image to `View`: random resized crop, flips, RandAugment, random erasing.

    Arguments and defaults are those of timm's `transforms_imagenet_train`, and `re_mode` that of its training script.
    Erasing and the colour operations of RandAugment leave the label where it is. Images of other modes are converted.

    Args:
        img_size: Side of the view, or (height, width).
        scale: Range of the crop's area, as a share of the image's.
        ratio: Range of the crop's aspect ratio.
        hflip: Probability of a left-right flip.
        vflip: Probability of an upside-down flip.
        auto_augment: RandAugment as timm writes it, such as "rand-m9-mstd0.5-inc1"; None for none.
        interpolation: "bicubic", "bilinear", ..., or "random", one of these two for each view.
        mean: Mean of the normalisation, one value per channel; a single value makes views grey. RandAugment fills
            with it what comes from outside the image.
        std: Standard deviation of the normalisation.
        normalize: False for uint8 images, which timm's `PrefetchLoader` normalises, and erases, itself.
        re_prob: Probability of random erasing.
        re_mode: "pixel" fills erased boxes with noise, "rand" with one random colour, "const" with 0.
        re_count: Erased boxes, at most.
        crop_last: Whether flips and RandAugment precede the crop, as in the code of token labeling. It is slower:
            they then work on the whole image.

    Raises:
        ValueError: `auto_augment` is not a RandAugment of operations known to be affine or to leave points in place;
            erasing is asked of images that are not normalised; a size, range or probability is impossible.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        auto_augment: str | None = None,
        interpolation: str = "random",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        normalize: bool = True,
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        re_count: int = 1,
        crop_last: bool = False,
    ):
        if re_prob and not normalize:
            raise ValueError(f"re_prob={re_prob} needs normalize=True: give it to timm's PrefetchLoader instead")
        self.size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_counts(**{f"img_size[{i}]": side for i, side in enumerate(self.size)})
        check_spans(high=1.0, scale=scale)
        check_spans(ratio=ratio)
        check_within(hflip=hflip, vflip=vflip, re_prob=re_prob)
        self.mode = "L" if len(mean) == 1 else "RGB"
        self.scale, self.ratio, self.hflip, self.vflip = scale, ratio, hflip, vflip
        names = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
        self.interpolations = [InterpolationMode(name) for name in names]
        self.normalize = (list(mean), list(std)) if normalize else None
        fill = {
            "img_mean": tuple(min(255, round(255 * x)) for x in mean),
            "translate_const": int(min(self.size) * 0.45),
        }
        if interpolation != "random":
            fill["interpolation"] = str_to_pil_interp(interpolation)
        self.rand_augment = TrackedRandAugment(auto_augment, fill) if auto_augment else None
        changes: list[Callable] = [self._flip] if self.rand_augment is None else [self._flip, self.rand_augment]
        self.steps = [*changes, self._crop] if crop_last else [self._crop, *changes]
        self.erase = RandomErasing(re_prob, mode=re_mode, max_count=re_count, device="cpu") if re_prob else None

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> View:
        """Draw one view. All of its randomness comes from the generator, or from torch's own where none is given."""
        image, matrix = image if image.mode == self.mode else image.convert(self.mode), torch.eye(3)
        with drawn_from(generator):
            for step in self.steps:
                image, back = step(image)
                matrix = matrix @ back
            tensor = TF.pil_to_tensor(image)
            if self.normalize is not None:
                tensor = TF.normalize(tensor.float().div_(255), *self.normalize, inplace=True)
            if self.erase is not None:
                tensor = self.erase(tensor)
        return View(tensor, matrix)

    def _crop(self, image: Image.Image) -> tuple[Image.Image, Tensor]:
        (width, height), (top, left, h, w) = image.size, RandomResizedCrop.get_params(image, self.scale, self.ratio)
        interpolation = random.choice(self.interpolations)
        image = TF.resized_crop(image, top, left, h, w, self.size, interpolation)
        return image, torch.tensor([[h / height, 0, top / height], [0, w / width, left / width], [0, 0, 1]])

    def _flip(self, image: Image.Image) -> tuple[Image.Image, Tensor]:
        matrix = torch.eye(3)
        if random.random() < self.hflip:
            image, matrix = TF.hflip(image), matrix @ _FLIP_COLUMNS
        if random.random() < self.vflip:
            image, matrix = TF.vflip(image), matrix @ _FLIP_ROWS
        return image, matrix


_FLIP_COLUMNS = torch.tensor([[1.0, 0, 0], [0, -1, 1], [0, 0, 1]])
_FLIP_ROWS = torch.tensor([[-1.0, 0, 1], [0, 1, 0], [0, 0, 1]])
