"""What a stored label map is: one image's, its checks, and the published layout of one `.pt` file per image."""

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from timm.data import is_img_extension
from torch import Tensor

from timm_tokens.files import replacing

# The published layout keeps classes in half precision, exact up to here.
_LARGEST_HALF_CLASS = 2048


class LabelMap(NamedTuple):
    """The best classes of every cell: `values` (top, H, W) float16 scores before the softmax, `indices` int32."""

    values: Tensor
    indices: Tensor


def image_id(filename: str | Path) -> str:
    """The name of an image in a label store: its path inside the data set, without the extension of an image.

    `n01440764/n01440764_10026.JPEG` becomes `n01440764/n01440764_10026`, which is also where the published layout keeps
    its label, plus `.pt`.
    """
    path = PurePosixPath(Path(filename).as_posix())
    return str(path.with_suffix("") if is_img_extension(path.suffix.lower()) else path)


def is_image_id(name: str) -> bool:
    """Whether a name is a relative path that stays inside its folder, on every system: no "..", backslash or drive."""
    odd = "\\" in name or "\0" in name or re.match("[A-Za-z]:", name)
    return not odd and not any(part in ("", ".", "..") for part in name.split("/"))


def check_image_id(name: str) -> str:
    """The name, or a ValueError where a label of this name would not stay inside its folder."""
    if not is_image_id(name):
        raise ValueError(
            f"image id {name!r} must be a relative path such as 'class/image', without '..', empty parts, backslashes "
            "and drive letters, so that its label stays inside the store's folder: rename the image"
        )
    return name


def check_label_map(name: str, label: LabelMap, num_classes: int | None) -> LabelMap:
    """The label as float16 and int32, or a ValueError that names the image."""
    values, indices = label
    if values.ndim != 3 or values.shape != indices.shape or not values.numel():
        raise ValueError(
            f"label map of {name!r}: values and indices must both be (top, H, W), "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if indices.is_floating_point():
        raise ValueError(f"label map of {name!r}: classes must be integers, got {indices.dtype}")
    low, high = (int(x) for x in indices.aminmax())
    if low < 0 or (num_classes is not None and high >= num_classes):
        limit = "inf" if num_classes is None else num_classes
        raise ValueError(f"label map of {name!r}: classes must be in [0, {limit}), got {low} to {high}")
    half = values.half()
    if not half.isfinite().all():
        raise ValueError(f"label map of {name!r}: scores must be finite in float16, got {values.aminmax()}")
    return LabelMap(half, indices.int())


def read_label_file(path: Path, name: str, num_classes: int | None) -> LabelMap:
    """Read one file of the published layout: a (2, top, H, W) tensor, scores and then classes.

    Any other content is a ValueError that names the image.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load raises many kinds for a corrupt file
        raise ValueError(f"label file of {name!r} can't be read, make it again: {path}: {error}") from error
    if not isinstance(stored, Tensor) or stored.ndim != 4 or len(stored) != 2:
        got = tuple(stored.shape) if isinstance(stored, Tensor) else type(stored).__name__
        raise ValueError(f"label file of {name!r} must hold a (2, top, H, W) tensor, got {got}: {path}")
    values, indices = stored
    if not torch.equal(indices, indices.round()):
        raise ValueError(f"label file of {name!r} holds classes that are not whole numbers: {path}")
    return check_label_map(name, LabelMap(values, indices.int()), num_classes)


def write_label_file(path: str | Path, label: LabelMap, name: str | None = None) -> None:
    """Write one file of the published layout; a class that is too large for half precision is a ValueError."""
    path = Path(path)
    if int(label.indices.max()) > _LARGEST_HALF_CLASS:
        raise ValueError(
            f"label map of {name or str(path)!r}: the .pt layout keeps classes in half precision, exact up to "
            f"{_LARGEST_HALF_CLASS}, got {int(label.indices.max())}: keep it in a TokenLabelStore"
        )
    with replacing(path) as partial:
        torch.save(torch.stack([label.values.half(), label.indices.half()]), partial)
