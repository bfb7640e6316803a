"""Data sets for the commands: a folder of class folders, or a name that timm knows."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, create_dataset, infer_imagenet_subset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset

from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import ImageOptions
from timm_tokens.data import Images, open_folder
from timm_tokens.data.images import classes_of

_TRAINING, _VALIDATION = ("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test")
_NAMED = "or a data set of timm with its prefix, such as torch/cifar10"
RECORD = "images.json"  # in a folder of results: which images were left out of it


def open_dataset(data: str | Path, root: str | Path | None = None, split: str | None = None) -> Any:
    """A data set of images, without a transform: `Images`, or a stream of timm.

    Args:
        data: A folder with one folder of images per class (or that of the split in it), a tar of them, or the name of a
            data set in timm, such as "torch/cifar10", "hfds/cifar10".
        root: Where a data set with a name is kept.
        split: Which split; of a folder, the folder in it. None: "train", if the folder has one; "": all of a folder.
    """
    if Path(data).exists():
        found = _find(Path(data), "train" if split is None else split)
        if split and found is None:
            raise CommandError(f"no folder {Path(data) / split}: leave out --split to take the images in {data}")
        return open_folder(found or data)
    if not _has_name(str(data)):
        raise CommandError(f"no folder {data}: give a folder with one folder of images per class, {_NAMED}")
    return _create(str(data), root, "train" if split is None else split)


def _has_name(data: str) -> bool:
    """Whether it is the name of a data set, and not a folder's; timm would take any other name for no name at all."""
    prefix, _, name = data.partition("/")
    return bool(name) and prefix.lower() in ("torch", "hfds", "hfids", "tfds", "wds")


def open_split(options: ImageOptions, split: str, class_map: dict[str, int] | None = None) -> Any:
    """A split of the images, as `open_dataset` gives it; `class_map` numbers the classes, of folders only."""
    if options.data_dir is None:
        raise CommandError("--data-dir is missing: a folder with train/<class>/ and val/<class>/")
    if _has_name(options.dataset):
        return _create(options.dataset, options.data_dir, split)
    if options.dataset:
        raise CommandError(f"no data set {options.dataset}: give none, for the images in --data-dir, {_NAMED}")
    root = _find(options.data_dir, split)
    if root is None:
        raise CommandError(f"no folder {options.data_dir / split}: --data-dir must have {split}/<class>/ with images")
    return open_folder(root, class_map)


def _find(root: Path, split: str) -> Path | None:
    """The folder of a split, which may have another of its names."""
    names = next((names for names in (_TRAINING, _VALIDATION) if split in names), ())
    return next((root / name for name in (split, *names) if name and (root / name).is_dir()), None)


def _create(name: str, root: str | Path | None, split: str) -> Any:
    """timm.data.create_dataset as `Images`, or a stream; its refusals become one line."""
    what = " in ".join(str(part) for part in (name, root) if part)
    try:
        dataset = create_dataset(name, None if root is None else str(root), split=split, search_split=False)
    except (AssertionError, OSError, RuntimeError, ValueError, TypeError, ImportError, KeyError) as error:
        raise CommandError(f"no images of {what}, split {split!r}: {str(error) or 'timm has no such set'}") from error
    if not len(dataset):
        raise CommandError(f"no images of {what}, split {split!r}")
    return dataset if isinstance(dataset, IterableDataset) else Images(dataset)


def tell(notes: list[str], what: str | Path = "") -> None:
    """Print what was left out of a data set, and where."""
    for note in notes:
        print(f"{what}: {note}" if what else note, file=sys.stderr)


def identity(dataset: Any) -> dict[str, str]:
    """What tells a data set from others: where it is, and a digest of its images' names and sizes, or their number."""
    reader = source_of(dataset)
    where = str(Path(getattr(reader, "root", None) or "").resolve())
    if isinstance(reader, ReaderImageFolder):
        files = [(os.path.relpath(path, reader.root), Path(path).stat().st_size) for path, _ in reader.samples]
        return {"data": where, "images": hashlib.sha256(json.dumps(files).encode()).hexdigest()}
    # Data sets with a name do not change; what they print has their split.
    what = f"{where} {type(reader).__name__} {getattr(reader, 'split', reader)!r}"
    return {"data": what, "images": str(len(dataset))}


def class_names(dataset: Dataset) -> list[str] | None:
    """The names of the classes by their numbers in the data set; None where it has none."""
    return classes_of(source_of(dataset))


def source_of(dataset: Dataset) -> Any:
    """What knows a data set's files and classes: timm's reader, or the data set of torchvision."""
    inner = dataset.dataset if isinstance(dataset, Images) else dataset
    return getattr(inner, "reader", inner)


def class_numbers(names: list[str] | None, count: int) -> dict[str, int] | None:
    """The number that each class of a data set has among a model's so many, None if it can't be told.

    Classes named by WordNet numbers (n01440764) are ImageNet's; otherwise as many classes as the model has are taken to
    be the same, in the same order.
    """
    if not names:
        return None
    subset = infer_imagenet_subset({"num_classes": count})
    known = {synset: i for i, synset in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
    if all(name in known for name in names):
        return {name: known[name] for name in names}
    return {name: i for i, name in enumerate(names)} if len(names) == count else None
