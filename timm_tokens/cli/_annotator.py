"""The machine annotator of `timm-tokens annotate`: a timm classifier, what it sees of an image, and its label maps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from timm_tokens.cli import _models
from timm_tokens.cli._data import model_classes
from timm_tokens.cli._errors import CommandError
from timm_tokens.data import LabelMap
from timm_tokens.dense import dense_scores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Annotator(NamedTuple):
    """A model, its transform of PIL images, and how its maps are made.

    Attributes:
        config: the transform's, as plain data: label maps of another one are others.
        grid: (H, W) of the maps.
        kept: numbers of the model's classes that maps are made of, in the maps' order; None: all of them.
    """

    model: nn.Module
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
        """Label maps of transformed images (B, 3, h, w), on the CPU: the best classes (B, top, H, W) of every cell."""
        with torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            scores = dense_scores(self.model, images)
        if self.kept is not None:
            scores = scores[..., list(self.kept)]
        values, indices = scores.float().topk(self.top, dim=-1)  # (B, H, W, K) -> (B, H, W, top)
        return LabelMap(*(x.permute(0, 3, 1, 2).cpu() for x in (values.half(), indices.int())))


def make_annotator(
    name: str,
    *,
    checkpoint: Path | None,
    num_classes: int | None,
    image_size: Sequence[int] | None,
    top: int,
    dtype: str,
    device: str,
    folders: list[str] | None = None,
) -> Annotator:
    """Make the model, and try it on one image, so that what it can't do is known before anything is written.

    With `folders`, maps are made of the classes that these are named after, and not of all the model's.

    Raises:
        CommandError: the model can't be made, has no spatial map, does not take this size or has too few classes.
    """
    classes = {} if num_classes is None else {"num_classes": num_classes}
    model = _models.create(name, pretrained=checkpoint is None, **classes)
    if checkpoint is not None:
        _models.load_all(model, checkpoint)
    config = _config(model, image_size)
    height, width = config["input_size"][1:]
    try:
        if hasattr(model, "set_input_size") and (height, width) != resolve_model_data_config(model)["input_size"][1:]:
            model.set_input_size(img_size=(height, width))
        model = model.to(device).eval()
        with torch.inference_mode():
            shape = dense_scores(model, torch.zeros(1, 3, height, width, device=device)).shape
    except TypeError as error:
        raise CommandError(str(error)) from error
    except (RuntimeError, AssertionError, ValueError) as error:
        raise CommandError(f"{name} can't annotate images of {height} x {width} pixels: {error}") from error
    annotator = Annotator(model, create_transform(**config), config, tuple(shape[1:3]), top, DTYPES[dtype])
    if folders is not None:
        annotator = annotator._replace(kept=_named(folders, model))
    if not 1 <= top <= annotator.num_classes:
        raise CommandError(f"--top-k must lie in [1, {annotator.num_classes}], the classes, got {top}")
    return annotator


def _named(folders: list[str], model: nn.Module) -> tuple[int, ...]:
    classes = model_classes(folders, model)
    if classes is None:
        raise CommandError(
            f"--folder-classes needs folders with WordNet names of the model's classes, such as n01440764, or as many "
            f"folders as it has classes, {model.num_classes}; they are {len(folders)}, such as {folders[:3]}"
        )
    return tuple(classes.tolist())


def _config(model: nn.Module, image_size: Sequence[int] | None) -> dict:
    """How images become the model's input: the whole image, squashed, because the map is the whole image's."""
    config = resolve_model_data_config(model, use_test_size=True)
    if image_size is not None:
        config["input_size"] = (3, image_size[0], image_size[-1])
    return config | {"crop_mode": "squash", "crop_pct": 1.0}
