"""One image file to pixels, by one rule for every command and task: upright, opaque, in 8 bits, whatever its format."""

from contextlib import nullcontext, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# Pillow knows these by name, but they need other programs (Ghostscript, Windows), or are no pictures.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# Taken for images even where this Pillow can't open them, so that they are reported and not passed over.
_ALWAYS = {".avif", ".heic", ".heif", ".jp2", ".jxl", ".mpo", ".tif", ".tiff", ".webp"}
_FIRST = ("JPEG", "PNG", "WEBP")  # tried before the others: most files are of these
_MOST_ELONGATED = 1000  # resized to a model's input by its shorter side, a longer strip would fill the memory
_PNG = b"\x89PNG\r\n\x1a\n"


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case and with their dots, of the files that are taken for images."""
    known = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in _NO_PICTURES}
    return frozenset(known | _ALWAYS)


def decode_image(file: str | Path | IO[bytes], *, draft: int | None = None) -> Image.Image:
    """Read an image in RGB, as all commands and tasks do.

    * It is turned upright as its EXIF orientation says. Of several frames or pages the first is read.
    * What is transparent shows white.
    * Grey of 16 bits is scaled as a whole: 65535 is white. Integers of 32 bits and floats are scaled by the smallest of
      1 (floats only), 255 and 65535 that holds them; where none does, or some are negative, from the least to the
      largest.
    * Text of any length in a PNG is skipped.

    Args:
        file: Its path, or the file itself, opened for reading and seekable.
        draft: Side, in pixels, that is enough: JPEGs are then read at an eighth of their size or more, which is faster
            and meets the same errors.

    Raises:
        OSError: It can't be read whole, has more pixels than Pillow's limit (twice `PIL.Image.MAX_IMAGE_PIXELS`), or
            sides more than 1000 to 1; the message is the reason alone, without the file's name.
    """
    try:
        opened = Path(file).open("rb") if isinstance(file, (str, Path)) else nullcontext(file)  # noqa: SIM115
        with opened as stream:
            try:
                return _decode(stream, draft)
            except ValueError:  # Pillow takes only so much text, and says so by this error
                stream.seek(0)
                data = stream.read()
                if not data.startswith(_PNG):
                    raise
                return _decode(BytesIO(_without_text(data)), draft)
    except Exception as error:  # whatever Pillow's many parsers raise on what they did not expect
        raise OSError(reason(error)) from error


def _decode(stream: IO[bytes], draft: int | None) -> Image.Image:
    with Image.open(stream, formats=_formats()) as image:
        if max(image.size) > _MOST_ELONGATED * min(image.size):
            raise ValueError(f"its sides are {image.width} x {image.height}, more than {_MOST_ELONGATED} to 1")
        if draft is not None:
            image.draft("RGB", (draft, draft))
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """What `decode_image` makes of an image that Pillow has opened; errors are Pillow's, of many kinds."""
    image.load()
    with suppress(Exception):  # a broken EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    pixels = _opaque(_eight_bit(image))
    pixels.info = {}  # the EXIF block among it, so that nothing turns the image again
    return pixels


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return (*_FIRST, *(kind for kind in Image.ID if kind not in _NO_PICTURES and kind not in _FIRST))


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        return cast(Image.Image, ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite")
    black, white = _range(image, float(values.min()), float(values.max()))
    scaled = (values - black) * (255 / max(white - black, 1e-12))
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def _range(image: Image.Image, low: float, high: float) -> tuple[float, float]:
    """The values that become black and white."""
    if image.mode != "F" and (image.mode != "I" or image.format in ("JPEG2000", "PNG", "PPM")):
        return 0, 65535  # these formats have 16 bits at most, for which older versions of Pillow take "I"
    whites, slack = ((1, 255, 65535), 0.1) if image.mode == "F" else ((255, 65535), 0)  # floats may overshoot a little
    fitting = (white for white in whites if -slack * high <= low and high <= (1 + slack) * white)
    white = next(fitting, None)
    return (low, high) if white is None else (0, white)


def _opaque(image: Image.Image) -> Image.Image:
    """In RGB; what is transparent shows white."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _without_text(data: bytes) -> bytes:
    """A PNG without its text and its colour profile, the two of which Pillow takes only so much."""
    kept, at = [_PNG], len(_PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def reason(error: Exception) -> str:
    """Why an image can't be read, in one line without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, or of no format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
