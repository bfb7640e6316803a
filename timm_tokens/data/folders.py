"""Images in class folders, or in a tar of them: which files are taken, and which are left out and why."""
# ruff: noqa: PTH112, PTH113, PTH118, PTH119, PTH120, PTH122 (pathlib is slow for a million files)

import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import basename, dirname, isdir, isfile, join, realpath, splitext
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, get_img_extensions, set_img_extensions
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from timm_tokens.data.decoding import image_suffixes
from timm_tokens.data.images import Images, left_out_lines

_NO_SUFFIX = "no images by their suffix"


class FolderReader(ReaderImageFolder):
    """timm's reader of class folders, for images of every format, with a record of what it leaves out.

    The class of an image is the name of the folder that it lies in. Suffixes may be in upper case, and links are
    followed. Hidden files and folders, whose names start with a dot, are left out. So are images beside the class
    folders; but where there are no class folders, all images are of one class, named "". A folder without any image is
    a FileNotFoundError that says what else is there.

    Args:
        root: The folder that holds the class folders.
        class_map: As of `open_folder`.

    Attributes:
        samples: (path, class number) of each image, in natural order of the paths.
        class_to_idx: Numbers by class name.
        left_out: Names of files and folders, relative to the root, by the reason why they were left out.
        joined: Names of the folders, relative to the root, of each class that several folders have the name of.
    """

    def __init__(self, root: str | Path, class_map: dict[str, int] | str | None = None):
        self.root = str(root)
        left_out: dict[str, list[str]] = defaultdict(list)
        folders: dict[str, set[str]] = defaultdict(set)
        names: list[str] = []
        for name, fault in _walk(self.root, "", (realpath(self.root),)):
            (left_out[fault] if fault else names).append(name)
        loose = [name for name in names if not dirname(name)]
        if len(loose) < len(names):
            left_out["in no class folder"] += loose
            names = [name for name in names if dirname(name)]
        classes = {name: basename(dirname(name)) for name in names}
        found = sorted({*classes.values()}, key=_natural)
        numbers = load_class_map(class_map, self.root) if class_map else None
        self.class_to_idx = numbers or {name: i for i, name in enumerate(found)}
        left_out["of none of the classes"] += [name for name in names if classes[name] not in self.class_to_idx]
        names = sorted((name for name in names if classes[name] in self.class_to_idx), key=_natural)
        self.left_out = {why: sorted(which, key=_natural) for why, which in left_out.items() if which}
        if not names:
            raise FileNotFoundError("; ".join([f"no images in {root}", *left_out_lines(self.left_out)]))
        self.samples = [(join(self.root, name), self.class_to_idx[classes[name]]) for name in names]
        for name in names:
            folders[classes[name]].add(dirname(name))
        self.joined = {name: sorted(which) for name, which in folders.items() if len(which) > 1}


def open_folder(root: str | Path, class_map: dict[str, int] | str | None = None) -> Images:
    """Images in class folders, or in a tar of class folders, without a transform.

        images = open_folder("images/train")
        images = images.without(unreadable(images))
        print(images.notes())
        images.transform = timm.data.create_transform(224)

    Args:
        root: The folder, or the tar.
        class_map: Numbers by class name, or a file of names as timm's `load_class_map` reads it; images of other
            classes are left out. None: the classes found, in natural order.

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
    reader.left_out = {_NO_SUFFIX: [name for name in names if name not in taken]}
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


def _walk(folder: str, name: str, above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Names of all files, hidden folders and empty folders, and why they are left out, which is empty for images.

    Links back to a folder above are not followed.
    """
    with os.scandir(folder) as entries:
        found = sorted((entry.name, _kind(entry)) for entry in entries)
    if not found and name:
        yield name, "empty folders"
    for entry, kind in found:
        path, below = join(folder, entry), join(name, entry)
        if entry.startswith("."):
            yield below, "hidden"
        elif kind != "folder":
            yield below, _fault(below, kind)
        elif (real := realpath(path)) not in above:
            yield from _walk(path, below, (*above, real))


def _fault(name: str, kind: str) -> str:
    if splitext(name)[1].lower() not in image_suffixes():
        return _NO_SUFFIX
    if kind == "other":
        return "no files, or links to none"
    return "" if name == name.encode(errors="ignore").decode() else "names that are not UTF-8"


def _kind(entry: os.DirEntry) -> str:
    """ "folder", "file" or "other", of what a link leads to; a file that is no link is not looked at for it."""
    link = entry.is_symlink()
    if isdir(entry.path) if link else entry.is_dir():
        return "folder"
    return "file" if (isfile(entry.path) if link else entry.is_file()) else "other"


def _natural(name: str) -> list[str | int]:
    """Sorts 2 before 10, as timm does."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]
