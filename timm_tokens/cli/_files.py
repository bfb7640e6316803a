"""Pictures: reading them, and the names that they can be written by."""

from pathlib import Path

from PIL import Image

from timm_tokens.cli._errors import CommandError


def read_image(path: Path) -> Image.Image:
    """An image file in RGB.

    Raises:
        CommandError: If there is none, or it can't be read.
    """
    if not path.is_file():
        raise CommandError(f"{path} is a folder, not an image" if path.is_dir() else f"no image {path}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow raises all of these
        raise CommandError(f"{path} can't be read as an image: {error}") from error


def check_picture(path: Path) -> None:
    """Refuse a name that a picture can't be written by, before any work is done for it."""
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if path.suffix.lower() not in known:
        raise CommandError(f"can't write a picture as {path}: end its name in .png, .jpg or .webp")
    if path.is_dir():
        raise CommandError(f"can't write a picture as {path}: it is a folder")
