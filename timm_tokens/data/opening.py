"""Open a folder of images, or a tar of one."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, get_img_extensions, set_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from timm_tokens.data.decoding import image_suffixes
from timm_tokens.data.folders import NO_SUFFIX, FolderReader
from timm_tokens.data.images import Images


def open_folder(root: str | Path, class_map: dict[str, int] | None = None) -> Images:
    """Images in class folders, or in a tar of class folders, without a transform.

        images = open_folder("images/train")
        images = images.without(unreadable(images))
        print(*images.notes(), sep="\n")
        images.transform = timm.data.create_transform(224)

    Args:
        root: The folder, or the tar.
        class_map: Numbers by class name; images of other classes are left out. None: the classes found, sorted.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
        ValueError: The tar can't be read.
    """
    if not Path(root).is_file():
        return Images(ImageDataset(str(root), reader=FolderReader(root, class_map)))
    try:
        with _every_suffix():
            reader: Any = ReaderImageInTar(str(root), class_map=class_map or "")
        with tarfile.open(root) as tar:
            names = [member.name for member in tar if member.isfile() and not member.name.endswith(".tar")]
    except (tarfile.TarError, ValueError, EOFError, AssertionError) as error:  # ValueError: no image
        raise ValueError(f"{root} can't be read as a tar of images: {str(error) or 'it is none'}") from error
    taken = {sample[0].name for sample in reader.samples}
    reader.left_out = {NO_SUFFIX: [name for name in names if name not in taken]}
    return Images(ImageDataset(str(root), reader=reader))


@contextmanager
def _every_suffix() -> Iterator[None]:
    """Have timm take all suffixes that are taken here, while a tar is opened: its reader has no argument for them."""
    before = get_img_extensions()
    set_img_extensions(sorted(image_suffixes()))
    try:
        yield
    finally:
        set_img_extensions(before)
