"""Draw an image's label map, and what token labeling makes of it for a crop.

    timm-tokens draw labels images/tench/1.jpg labels.png --labels labels
    timm-tokens draw labels images/tench/1.jpg labels.png --labels labels --crop 0.2 0.1 0.5 0.5 --flip
    timm-tokens draw labels images/tench/1.jpg labels.png --labels labels --aa rand-m9-mstd0.5-inc1 --seed 3

From left to right: the image with the crop's outline, its label map, the crop, and the targets of the crop's patches.
Each cell has the colour of its most probable class, and the colour is stronger where the class is more probable. The
legend names the classes and the target of the class token. Without --crop, the crop is drawn as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from timm.data.readers.class_map import load_class_map
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from timm_tokens.cli.draw.photo import PictureOptions, check_picture, open_photo
from timm_tokens.cli.errors import CommandError
from timm_tokens.data import TokenLabelStore, TokenLabelTransform
from timm_tokens.data.label_format import LabelMap, image_id
from timm_tokens.data.label_transforms import View
from timm_tokens.ops.labels import crop_maps, warp_token_labels
from timm_tokens.options import option

SIDE = 448  # pixels of a panel's shorter side
_WHOLE = (0.0, 0.0, 1.0, 1.0)


class Targets(NamedTuple):
    """Class probabilities: `cls` (K,) of the class token, `patches` (K, H, W)."""

    cls: Tensor
    patches: Tensor


class Drawn(NamedTuple):
    """The picture's content: targets of the whole image and of the crop, and the crop's `map` (3, 3) into the image."""

    whole: Targets
    crop: Targets
    map: Tensor


@dataclass(frozen=True, kw_only=True)
class Options(PictureOptions):
    """What to draw."""

    labels: Path = option(help="folder of a label store, or of .pt files", metavar="FOLDER")
    name: str | None = option(None, "id of the image in the store (default: the end of its path)", flag="--id")
    crop: tuple[float, float, float, float] | None = option(
        None, "crop as fractions of the image (default: drawn at random as in training)",
        at_least=0, at_most=1, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"),
    )  # fmt: skip
    flip: bool = option(False, "mirror the crop, or without --crop the whole image")
    aa: str | None = option(
        None, "RandAugment of a randomly drawn crop, such as rand-m9-mstd0.5-inc1 (default: none)",
        aliases=("--auto-augment",),
    )  # fmt: skip
    seed: int = option(0, "seed of the randomly drawn crop", at_least=0, below=2**63)
    size: int = option(14, "number of patches per side of the model's grid", at_least=1)
    num_classes: int = option(1000, "number of classes, for .pt files, which do not say it", at_least=1)
    class_map: Path | None = option(
        None, "text file with one class name per line (default: ImageNet's names)", metavar="FILE"
    )


def run(options: Options) -> Drawn:
    """Write the picture."""
    check_picture(options.out)
    photo, crop, flip = open_photo(options.image), options.crop, options.flip
    label, classes = _label(options)
    names = _names(options.class_map, classes)
    drawing = crop is None and not flip
    if options.aa and not drawing:
        raise CommandError("--aa is for a randomly drawn crop: leave --crop and --flip out")
    view = _drawn(photo, options.aa, options.seed) if drawing else _cropped(photo, crop or _WHOLE, flip)
    whole_map = crop_maps(torch.tensor([_WHOLE]))[0]
    rows, columns = label.values.shape[1:]
    whole = _targets(label, whole_map, classes, (rows, columns))
    drawn = Drawn(whole, _targets(label, view.map, classes, (options.size,) * 2), view.map)
    _draw(options.out, photo, view, drawn, names)
    return drawn


def _label(options: Options) -> tuple[LabelMap, int]:
    """The image's label map, and of how many classes."""
    folder, store = options.labels, TokenLabelStore(options.labels)
    parts = image_id(options.image.absolute()).strip("/").split("/")
    ends = ["/".join(parts[i:]) for i in range(len(parts))]  # the longest first
    found = next((end for end in ends if end in store), None) if options.name is None else options.name
    if found is None:
        like = next(iter(store), None)
        raise CommandError(f"no label for {options.image} in {folder}, whose ids are like {like!r}: give --id")
    try:
        label, classes = store[found], store.num_classes or options.num_classes
    except KeyError as error:
        raise CommandError(error.args[0]) from error
    if int(label.indices.max()) >= classes:
        raise CommandError(f"the label has class {int(label.indices.max())}, and --num-classes is {classes}")
    return label, classes


def _names(class_map: Path | None, num_classes: int) -> list[str]:
    if class_map is not None:
        try:
            indices = load_class_map(str(class_map))
        except (AssertionError, OSError, ValueError) as error:
            raise CommandError(f"{class_map} can't be read as class names: {error}") from error
        named = {index: name for name, index in indices.items()}
        return [named.get(k, f"class {k}") for k in range(num_classes)]
    if num_classes == 1000:
        return [text.split(",")[0] for text in ImageNetInfo().label_descriptions()]
    return [f"class {k}" for k in range(num_classes)]


def _drawn(photo: Image.Image, auto_augment: str | None, seed: int) -> View:
    """A view as training draws it, in values from 0 to 1."""
    transform = TokenLabelTransform(SIDE, auto_augment=auto_augment, normalize=False)
    pixels, where = transform(photo, torch.Generator().manual_seed(seed))
    return View(pixels.float() / 255, where)


def _cropped(photo: Image.Image, box: tuple[float, ...], flip: bool) -> View:
    top, left, height, width = box
    if min(height, width) <= 0 or top + height > 1 or left + width > 1:
        raise CommandError(f"--crop takes top, left, height and width inside the image, from 0 to 1, got {box}")
    w, h = photo.size
    corners = (left * w, top * h, (left + width) * w, (top + height) * h)
    pixels = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=corners)
    where = crop_maps(torch.tensor([box]), torch.tensor([flip]))[0]
    return View(to_tensor(ImageOps.mirror(pixels) if flip else pixels), where)


def _targets(label: LabelMap, where: Tensor, num_classes: int, size: tuple[int, int]) -> Targets:
    values, indices = label.values[None], label.indices[None]
    dense = warp_token_labels(values, indices, where[None], num_classes, size, dense=True)[0]  # (K, 1 + N)
    return Targets(dense[:, 0], dense[:, 1:].unflatten(1, size))


def _draw(out: Path, photo: Image.Image, view: View, drawn: Drawn, names: Sequence[str]) -> None:
    from timm_tokens.drawing import LabelPanel, draw_label_maps, save  # not above: matplotlib is an extra

    shown = to_tensor(photo.resize((round(SIDE * photo.width / photo.height), SIDE), Image.Resampling.BICUBIC))
    corners = (torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]]) @ view.map.T)[:, :2]
    panels = [
        LabelPanel("image", shown, corners=corners),
        LabelPanel(f"label map, {_by(drawn.whole)}", shown, drawn.whole.patches, corners),
        LabelPanel("crop", view.image),
        LabelPanel(f"targets, {_by(drawn.crop)}", view.image, drawn.crop.patches),
    ]
    top = drawn.crop.cls.topk(min(5, len(names))).indices.tolist()
    note = "target of the class token: " + ", ".join(f"{names[k]} {drawn.crop.cls[k]:.1%}" for k in top)
    save(draw_label_maps(panels, names, note), out)


def _by(targets: Targets) -> str:
    return " x ".join(str(side) for side in targets.patches.shape[1:])
