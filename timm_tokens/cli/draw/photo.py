"""What pictures are drawn of and written to: a photo, read and as a model sees it, and the names of picture files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from timm_tokens.cli.common import checks
from timm_tokens.cli.errors import CommandError
from timm_tokens.data import decode_image, input_config, input_transform
from timm_tokens.options import Options, option
from timm_tokens.vit import TokenViT

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


@dataclass(frozen=True, kw_only=True)
class PictureOptions(Options):
    """Picture."""

    image: Path = option(help="image file to read", positional=True)
    out: Path = option(help="picture file to write: .png, .jpg, .webp, .pdf or .svg", positional=True)


def open_photo(path: Path) -> Image.Image:
    """An image file in RGB, upright."""
    if not path.is_file():
        raise CommandError(f"{path} is a folder, not an image" if path.is_dir() else f"no image {path}")
    try:
        return decode_image(path)
    except OSError as error:
        raise CommandError(f"{path} can't be read as an image: {error}") from error


def check_picture(path: Path) -> None:
    """Refuse a name that a picture can't be written by, before any work is done for it."""
    checks.plot(True, "which draws all pictures")
    if path.suffix.lower() not in FORMATS:
        raise CommandError(f"can't write a picture as {path}: end its name in {', '.join(FORMATS)}")
    if path.is_dir():
        raise CommandError(f"can't write a picture as {path}: it is a folder")
    checks.folder(path.parent)


def as_seen(model: nn.Module, photo: Image.Image) -> tuple[Tensor, Tensor]:
    """The image (1, C, h, w) as the model takes it, and (3, h, w) in colours from 0 to 1."""
    config = input_config(model, model.image_size if isinstance(model, TokenViT) else None)
    pixels = input_transform(config)(photo)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return pixels[None], (pixels * std + mean).clamp(0, 1).expand(3, -1, -1)
