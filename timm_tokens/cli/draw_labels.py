"""Draw an image's label map, and what token labeling makes of it for a crop.

    timm-tokens draw labels images/tench/1.jpg labels.png --labels labels
    timm-tokens draw labels images/tench/1.jpg labels.png --labels labels --crop 0.2 0.1 0.5 0.5 --flip
    timm-tokens draw labels images/tench/1.jpg labels.png --labels labels --auto-augment rand-m9-mstd0.5-inc1 --seed 3

From left to right: the image with the crop's outline, its label map, the crop, and the targets of its patches. Each
cell has the colour of its most probable class, the stronger the more probable. Below them the names, and the target of
the class token. Without --crop, the crop is one that training would draw.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo
from timm.data.readers.class_map import load_class_map
from torch import Tensor

from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._files import check_picture, read_image
from timm_tokens.cli._picture import SIDE, from_pil, outline, paint_classes, sheet
from timm_tokens.data import TokenLabelStore, TokenLabelTransform
from timm_tokens.data.label_format import LabelMap, image_id
from timm_tokens.data.label_transforms import View
from timm_tokens.files import replacing
from timm_tokens.ops.labels import crop_maps, warp_token_labels

# Okabe and Ito's colours, which colour-blind readers can tell apart, and grey for all other classes.
_COLOURS = torch.tensor([0xE69F00, 0x56B4E9, 0x009E73, 0xF0E442, 0x0072B2, 0xD55E00, 0xCC79A7, 0x777777])
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


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the sub-command: the keyword arguments of `run`."""
    parser.add_argument("image", type=Path, help="the image to read")
    parser.add_argument("out", type=Path, help="the picture to write; its suffix says how (.png, .jpg, .webp)")
    parser.add_argument("--labels", type=Path, required=True, help="folder of a label store, or of .pt files")
    parser.add_argument("--id", dest="name", help="the image's id in the store (default: the end of its path)")
    parser.add_argument(
        "--crop",
        type=float,
        nargs=4,
        metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"),
        help="fractions of the image (default: drawn as in training)",
    )
    parser.add_argument("--flip", action="store_true", help="mirror the crop, or without one the image")
    parser.add_argument("--auto-augment", help="RandAugment of a drawn crop, such as rand-m9-mstd0.5-inc1")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn crop (default: %(default)s)")
    parser.add_argument("--size", type=int, default=14, help="patches on a side of the model (default: %(default)s)")
    parser.add_argument("--num-classes", type=int, default=1000, help="of .pt files, which don't say (default: 1000)")
    parser.add_argument("--class-map", type=Path, help="class names: a text file, one a line (default: ImageNet's)")


def run(
    *,
    image: str | Path,
    out: str | Path,
    labels: str | Path,
    name: str | None = None,
    crop: Sequence[float] | None = None,
    flip: bool = False,
    auto_augment: str | None = None,
    seed: int = 0,
    size: int = 14,
    num_classes: int = 1000,
    class_map: str | Path | None = None,
) -> Drawn:
    """Write the picture; see the command's --help.

    Raises:
        CommandError: If something is missing or doesn't fit; then nothing is written.
    """
    out = Path(out)
    check_picture(out)
    photo = read_image(Path(image))
    label, classes = _label(Path(labels), Path(image), name, num_classes)
    names = _names(class_map, classes)
    if size < 1:
        raise CommandError(f"--size must be at least 1, got {size}")
    drawing = crop is None and not flip
    if auto_augment and not drawing:
        raise CommandError("--auto-augment is for a drawn crop: leave --crop and --flip out")
    view = _drawn(photo, auto_augment, seed) if drawing else _cropped(photo, tuple(crop or _WHOLE), flip)
    whole_map = crop_maps(torch.tensor([_WHOLE]))[0]
    whole = _targets(label, whole_map, classes, tuple(label.values.shape[1:]))
    drawn = Drawn(whole, _targets(label, view.map, classes, (size, size)), view.map)
    with replacing(out) as partial:
        _picture(photo, view, drawn, names).save(partial)
    return drawn


def _label(folder: Path, image: Path, name: str | None, num_classes: int) -> tuple[LabelMap, int]:
    """The image's label map, and of how many classes."""
    try:
        store = TokenLabelStore(folder)
        parts = image_id(image.absolute()).strip("/").split("/")
        ends = ["/".join(parts[i:]) for i in range(len(parts))]  # the longest first
        found = name or next((end for end in ends if end in store), None)
        if found is None:
            like = next(iter(store), None)
            raise CommandError(f"no label for {image} in {folder}, whose ids are like {like!r}: give --id")
        label, classes = store[found], store.num_classes or num_classes
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(error.args[0] if isinstance(error, KeyError) else str(error)) from error
    if int(label.indices.max()) >= classes:
        raise CommandError(f"the label has class {int(label.indices.max())}, and --num-classes is {classes}")
    return label, classes


def _names(class_map: str | Path | None, num_classes: int) -> list[str]:
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
    try:
        transform = TokenLabelTransform(SIDE, auto_augment=auto_augment, normalize=False)
    except ValueError as error:
        raise CommandError(str(error)) from error
    pixels, where = transform(photo, torch.Generator().manual_seed(seed))
    return View(pixels.float() / 255, where)


def _cropped(photo: Image.Image, box: tuple[float, ...], flip: bool) -> View:
    top, left, height, width = box
    if min(top, left) < 0 or min(height, width) <= 0 or top + height > 1 or left + width > 1:
        raise CommandError(f"--crop takes top, left, height and width inside the image, from 0 to 1, got {box}")
    w, h = photo.size
    corners = (left * w, top * h, (left + width) * w, (top + height) * h)
    pixels = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=corners)
    where = crop_maps(torch.tensor([box]), torch.tensor([flip]))[0]
    return View(from_pil(ImageOps.mirror(pixels) if flip else pixels), where)


def _targets(label: LabelMap, where: Tensor, num_classes: int, size: tuple[int, int]) -> Targets:
    values, indices = label.values[None], label.indices[None]
    dense = warp_token_labels(values, indices, where[None], num_classes, size, dense=True)[0]  # (K, 1 + N)
    return Targets(dense[:, 0], dense[:, 1:].unflatten(1, size))


def _picture(photo: Image.Image, view: View, drawn: Drawn, names: Sequence[str]) -> Image.Image:
    shown = from_pil(photo.resize((round(SIDE * photo.width / photo.height), SIDE), Image.Resampling.BICUBIC))
    corners = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 1]]) @ view.map.T
    corners = [(float(row), float(column)) for row, column in corners[:, :2]]
    legend = _legend(drawn)
    colours = torch.stack([(_COLOURS >> shift) & 255 for shift in (16, 8, 0)], dim=1) / 255

    def paint(targets: Targets, image: Tensor) -> Tensor:
        probability, best = targets.patches.max(dim=0)
        slots = torch.full((len(names),), len(_COLOURS) - 1)
        slots[legend] = torch.arange(len(legend))
        return paint_classes(slots[best], 0.8 * probability, colours, image)

    panels = [
        ("image", outline(shown, corners)),
        (f"label map, {_by(drawn.whole)}", outline(paint(drawn.whole, shown), corners)),
        ("crop", view.image),
        (f"targets, {_by(drawn.crop)}", paint(drawn.crop, view.image)),
    ]
    entries = [(names[k], colours[i]) for i, k in enumerate(legend)]
    if len(legend) == len(_COLOURS) - 1:
        entries.append(("other classes", colours[-1]))
    top = drawn.crop.cls.topk(min(5, len(names))).indices.tolist()
    note = "target of the class token: " + ", ".join(f"{names[k]} {drawn.crop.cls[k]:.1%}" for k in top)
    return sheet(panels, entries, note)


def _legend(drawn: Drawn) -> list[int]:
    """The classes that get a colour: those most often the best of a cell."""
    best = torch.cat([targets.patches.argmax(dim=0).flatten() for targets in (drawn.whole, drawn.crop)])
    classes, counts = best.unique(return_counts=True)
    return classes[counts.argsort(descending=True, stable=True)][: len(_COLOURS) - 1].tolist()


def _by(targets: Targets) -> str:
    return " x ".join(str(side) for side in targets.patches.shape[1:])
