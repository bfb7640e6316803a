"""Images of every kind give the pixels that a viewer shows; what can't be read is an OSError with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from timm_tokens.data.decoding import decode_image, image_suffixes, to_rgb

GREY16 = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)


def photo(height=24, width=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, format, **options):
    image.save(file := io.BytesIO(), format, **options)
    return file


def decoded(image, format, **options):
    return np.asarray(decode_image(encoded(image, format, **options))).astype(int)


def png(width, height, bits, kind, rows):
    """A PNG as Pillow can't write it, from the bytes of its rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    stream = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    body = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def test_lossless_formats_give_their_pixels():
    image = photo()
    for format in ("PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI", "DDS"):
        assert (decoded(image, format) == np.asarray(image)).all(), format
    for format, options in (("WEBP", {"lossless": True}), ("JPEG2000", {})):
        assert (decoded(image, format, **options) == np.asarray(image)).all(), format


def test_lossy_formats_come_near():
    smooth = photo(3, 4).resize((32, 24), Image.Resampling.BICUBIC)
    for format in ("JPEG", "WEBP", "MPO", *(["AVIF"] if "AVIF" in Image.SAVE else [])):
        assert abs(decoded(smooth, format) - np.asarray(smooth)).mean() < 8, format


def test_turned_upright_as_exif_says():
    image = photo()
    formats = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    for format, options in formats.items():
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x112] = orientation
            file = encoded(image, format, exif=exif, **options)
            with Image.open(file) as opened:
                expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
            assert (np.asarray(decode_image(file)) == expected).all(), (format, orientation)
            assert expected.shape == ((24, 32, 3) if orientation < 5 else (32, 24, 3))
    exif[0x112] = 6  # what the camera's top was is now on the right
    top = Image.fromarray(np.repeat([[255], [0]], 16, 0).repeat(32, 1).astype(np.uint8))
    turned = decoded(top, "PNG", exif=exif)
    assert (turned[:, :16] == 0).all() and (turned[:, 16:] == 255).all()


def test_an_image_is_turned_once():
    exif = Image.Exif()
    exif[0x112] = 6
    once = decode_image(encoded(photo(), "PNG", exif=exif))
    assert once.info == {} and to_rgb(once).tobytes() == once.tobytes()
    given = Image.open(encoded(photo(), "PNG", exif=exif))
    assert to_rgb(given).size == (24, 32) and given.size == (32, 24)  # the data set's own image stays as it is


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_costs_nothing():
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        file = encoded(photo(), "JPEG", exif=exif)
        assert decode_image(file).size == (32, 24)


def test_sixteen_bits_are_scaled_as_a_whole():
    expected = (GREY16 / 257).round()[..., None].repeat(3, 2)
    grey = Image.fromarray(GREY16)
    big_endian = Image.frombytes("I;16B", (32, 24), GREY16.astype(">u2").tobytes())
    wide = Image.fromarray(GREY16.astype(np.int32))
    cases = {"png": (grey, "PNG"), "tiff": (grey, "TIFF"), "big endian": (big_endian, "TIFF"), "pgm": (wide, "PPM")}
    cases |= {"jpeg 2000": (grey, "JPEG2000"), "32 bits": (wide, "TIFF")}
    for name, (image, format) in cases.items():
        assert abs(decoded(image, format) - expected).max() <= 1, name
    dim = Image.fromarray((GREY16 // 256).astype(np.uint16))  # it is dark, and stays so
    assert decoded(dim, "PNG").max() == 1 and decoded(dim, "PNG").mean() < 1
    rows = np.stack([GREY16] * 3, axis=2).astype(">u2").reshape(24, 96)
    colour = np.asarray(decode_image(png(32, 24, 16, 2, [row.tobytes() for row in rows])))
    assert abs(colour.astype(int) - expected).max() <= 1


def test_floats_and_integers_of_32_bits():
    share = (GREY16 / 65535).astype(np.float32)
    eight = (share * 255).round()[..., None].repeat(3, 2)
    for scale in (1, 1.05, 255, 65535):
        got = decoded(Image.fromarray(share * np.float32(scale)), "TIFF")
        assert abs(got - (eight * (1.05 if scale == 1.05 else 1)).clip(0, 255)).max() <= 1, scale
    for low, high in ((-1000, 3000), (0, 1e6)):  # such as of a tomograph: from the least to the largest
        assert abs(decoded(Image.fromarray(low + share * np.float32(high - low)), "TIFF") - eight).max() <= 1
    counts = Image.fromarray((share * 255).round().astype(np.int32))
    assert (decoded(counts, "TIFF") == eight).all()
    assert decoded(Image.fromarray(np.full((4, 4), 1e6, np.float32)), "TIFF").max() == 0  # constant, and no division
    share[3, 4] = np.nan
    with pytest.raises(OSError, match="it has pixels that are not finite"):
        decode_image(encoded(Image.fromarray(share), "TIFF"))


def test_other_modes():
    image = photo()
    for mode, format in (("1", "PNG"), ("1", "TIFF"), ("1", "PPM"), ("L", "PNG"), ("P", "PNG"), ("P", "GIF")):
        assert (decoded(image.convert(mode), format) == np.asarray(image.convert(mode).convert("RGB"))).all(), mode
    assert set(np.unique(decoded(image.convert("1"), "PNG"))) == {0, 255}
    for format in ("TIFF", "JPEG"):  # Pillow writes JPEGs as Adobe does, with its values inverted
        smooth = Image.new("CMYK", (32, 24), (255, 0, 0, 0))
        assert abs(decoded(smooth, format) - [0, 255, 255]).max() <= 3, format
    lab = Image.new("LAB", (4, 4), (255, 128, 128))
    assert abs(decoded(lab, "TIFF") - 255).max() <= 3


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (4, 2), (200, 100, 0, 255))
    image.putalpha(Image.fromarray(np.array([[255, 0, 128, 255]] * 2, np.uint8)))
    half = [round(255 + (c - 255) * 128 / 255) for c in (200, 100, 0)]
    for format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        pixels = decoded(image, format, **options)
        assert (pixels[:, 0] == [200, 100, 0]).all() and (pixels[:, 1] == 255).all(), format
        assert abs(pixels[:, 2] - half).max() <= 1, format
    grey = decoded(image.convert("LA"), "PNG")
    assert (grey[:, 1] == 255).all() and (grey[:, 0] == image.convert("L").getpixel((0, 0))).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for format, transparency in (("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0]))):
        assert decoded(palette, format, transparency=transparency).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert (decoded(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3)) == 255).all()
    assert (decoded(Image.new("L", (2, 2), 7), "PNG", transparency=7) == 255).all()


def test_the_first_of_several_frames():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for format, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        assert (decoded(first, format, save_all=True, append_images=[second], **options) == [255, 0, 0]).all(), format


def test_text_of_any_length_is_skipped():
    image, lines = photo(), PngImagePlugin.PngInfo()
    lines.add_text("note", "x" * 3_000_000, zip=True)
    many = PngImagePlugin.PngInfo()
    for i in range(80):
        many.add_itxt(f"note {i}", "x" * 900_000, zip=True)
    for options in ({"pnginfo": lines}, {"pnginfo": many}, {"icc_profile": bytes(3_000_000)}):
        with pytest.raises(ValueError, match=r"Decompressed data too large|Too much memory"):
            Image.open(encoded(image, "PNG", **options)).load()
        assert (decoded(image, "PNG", **options) == np.asarray(image)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_what_cannot_be_read():
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA"):
        whole = encoded(photo(48, 64), format).getvalue()
        for size in (0, 20, len(whole) * 2 // 3):
            with pytest.raises(OSError, match=r"^\w.*\w"):
                decode_image(io.BytesIO(whole[:size]))
    for content in (b"", b"<html>not found</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"):
        with pytest.raises(OSError, match=r"^it is empty, or of no format that Pillow knows$"):
            decode_image(io.BytesIO(content))
    with pytest.raises(OSError, match=r"^Image size \(400000000 pixels\) exceeds limit"):
        decode_image(png(20000, 20000, 1, 0, [bytes(2500)]))
    with pytest.raises(OSError, match=r"^its sides are 2 x 2001, more than 1000 to 1$"):
        decode_image(encoded(Image.new("L", (2, 2001)), "PNG"))
    with pytest.raises(OSError, match=r"^No such file or directory$"):
        decode_image("nowhere.jpg")


def test_suffixes():
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic"} <= image_suffixes()
    assert not {".txt", ".pdf", ".eps", ".mpg", ".h5", ".svg", ".db", ""} & image_suffixes()


def test_a_draft_is_smaller_and_meets_the_same_errors():
    whole = encoded(photo(240, 320), "JPEG").getvalue()
    assert decode_image(io.BytesIO(whole), draft=1).size == (40, 30)
    with pytest.raises(OSError, match="truncated"):
        decode_image(io.BytesIO(whole[: len(whole) * 9 // 10]), draft=1)
