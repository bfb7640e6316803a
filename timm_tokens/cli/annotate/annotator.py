"""The machine annotator of `timm-tokens annotate`: a timm classifier, what it sees of an image, and its label maps."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from timm_tokens.cli.common import models
from timm_tokens.cli.common.datasets import class_numbers
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import DTYPES, WeightOptions
from timm_tokens.data import LabelMap, input_config, input_transform
from timm_tokens.dense import dense_scores
from timm_tokens.ops import top_scores
from timm_tokens.options import option


class Annotator(NamedTuple):
    """A model, its transform of PIL images, and how its maps are made.

    Attributes:
        config: The transform's, as plain data: label maps of another one are others.
        grid: (H, W) of the maps.
        kept: Numbers of the model's classes that maps are made of, in the maps' order; None: all of them.
    """

    model: Any  # an nn.Module, with timm's members
    transform: Callable[[Image.Image], Tensor]
    config: dict
    grid: tuple[int, int]
    top: int
    dtype: torch.dtype
    kept: tuple[int, ...] | None = None

    @property
    def num_classes(self) -> int:
        return self.model.num_classes if self.kept is None else len(self.kept)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> LabelMap:
        """Label maps of transformed images (B, C, h, w), on the CPU: the best classes (B, top, H, W) of every cell."""
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            scores = dense_scores(self.model, images)
        if self.kept is not None:
            scores = scores[..., list(self.kept)]
        values, indices = top_scores(scores, self.top)  # (B, H, W, K) -> (B, H, W, top)
        return LabelMap(*(x.permute(0, 3, 1, 2).cpu() for x in (values.half(), indices.int())))

    def digest(self) -> str:
        """Digest of the weights, the same wherever they were read from and on every device."""
        found = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return f"sha256:{found.hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class AnnotatorOptions(WeightOptions):
    """Model."""

    model: str = option(help="name of a classifier in timm or in this package")
    num_classes: int | None = option(
        None, "number of classes of the checkpoint's classifier (default: the model's own)", at_least=1
    )
    img_size: tuple[int, ...] | None = option(  # type: ignore[assignment]  # here images need not be square
        None, "side of the images in pixels, or height and width (default: the model's own)",
        at_least=1, at_most=16384, aliases=("--image-size",),
    )  # fmt: skip
    folder_classes: bool = option(
        False, "use only the classes that the folders are named after (such as n01440764), in the folders' order"
    )
    top_k: int | None = option(
        None, "number of classes to keep per cell, the most likely ones (default: 5, or all where there are fewer)"
    )
    dtype: str = option("float32", "data type of mixed precision; float32 uses none", choices=DTYPES, group="Machine")


def make_annotator(options: AnnotatorOptions, device: str, folders: list[str] | None = None) -> Annotator:
    """Make the model, and try it on one image, so that what it can't do is known before anything is written.

    With `folders`, maps are made of the classes that these are named after, and not of all the model's.
    """
    classes: dict[str, Any] = {} if options.num_classes is None else {"num_classes": options.num_classes}
    model: Any = models.make_trained(replace(options, img_size=None), classifier=True, **classes)
    size = None if options.img_size is None else (options.img_size[0], options.img_size[-1])
    config = input_config(model, size, use_test_size=True)
    config |= {"crop_mode": "squash", "crop_pct": 1.0}  # the whole image, because the map is the whole image's
    height, width = config["input_size"][1:]
    try:
        if hasattr(model, "set_input_size") and (height, width) != input_config(model)["input_size"][1:]:
            model.set_input_size(img_size=(height, width))
        model = model.to(device).eval()
        with torch.inference_mode():
            shape = dense_scores(model, torch.zeros(1, *config["input_size"], device=device)).shape
    except (RuntimeError, AssertionError, ValueError) as error:
        name = options.model
        raise CommandError(f"{name} can't annotate images of {height} x {width} pixels: {error}") from error
    kept = None if folders is None else _numbers(folders, model.num_classes)
    grid, dtype = (shape[1], shape[2]), getattr(torch, options.dtype)
    count = model.num_classes if kept is None else len(kept)
    top = min(5, count) if options.top_k is None else options.top_k
    if not 1 <= top <= count:
        raise CommandError(f"--top-k must lie in [1, {count}], the classes, got {top}")
    return Annotator(model, input_transform(config), config, grid, top, dtype, kept)


def _numbers(folders: list[str], count: int) -> tuple[int, ...]:
    numbers = class_numbers(folders, count)
    if numbers is None:
        raise CommandError(
            f"--folder-classes needs folders with WordNet names of the model's classes, such as n01440764, or as many "
            f"folders as it has classes, {count}; they are {len(folders)}, such as {folders[:3]}"
        )
    return tuple(numbers.values())
