"""Data sets for the sub-commands: a folder of class folders, or a name that timm knows."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_dataset, infer_imagenet_subset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import ImageOptions

_VALIDATION = ("val", "valid", "validation", "eval", "test")
_NAMED = "or a data set of timm with its prefix, such as torch/cifar10"


def open_dataset(data: str | Path, root: str | Path | None = None, split: str = "train") -> Dataset:
    """A data set of images, without a transform.

    Args:
        data: a folder with one folder of images a class (or that of the split in it), a tar of them, or the name of a
            data set in timm, such as "torch/cifar10", "hfds/cifar10".
        root: where a data set with a name is kept.
        split: of the data set.

    Raises:
        CommandError: there is no such data set.
    """
    if Path(data).exists():
        return create("", data, split)
    if not _has_name(str(data)):
        raise CommandError(f"no folder {data}: give a folder with one folder of images a class, {_NAMED}")
    return create(str(data), root, split)


def _has_name(data: str) -> bool:
    """Whether it is the name of a data set, and not a folder's; timm would take any other name for no name at all."""
    prefix, _, name = data.partition("/")
    return bool(name) and prefix.lower() in ("torch", "hfds", "hfids", "tfds", "wds")


def open_split(options: ImageOptions, split: str, class_map: dict[str, int] | None = None) -> Dataset:
    """A split of the images, without a transform; `class_map` numbers the classes, of folders only.

    Raises:
        CommandError: There is no such data set, or no image in it.
    """
    if options.data_dir is None:
        raise CommandError("--data-dir is missing: a folder with train/<class>/ and val/<class>/")
    root, numbered = options.data_dir, {"class_map": class_map}
    if not options.dataset:
        root = _split_folder(root, split)
    elif not _has_name(options.dataset):
        raise CommandError(f"no data set {options.dataset}: give none, for the images in --data-dir, {_NAMED}")
    elif class_map is not None:
        numbered = {}  # its classes are numbered already
    return create(options.dataset, root, split, search_split=False, **numbered)


def _split_folder(root: Path, split: str) -> Path:
    names = _VALIDATION if split in _VALIDATION else (split,)
    found = next((root / name for name in (split, *names) if (root / name).is_dir()), None)
    if found is None:
        raise CommandError(f"no folder {root / split}: --data-dir must have {split}/<class>/ with images")
    return found


def create(name: str, root: str | Path | None, split: str, **options: Any) -> Dataset:
    """timm.data.create_dataset, whose refusals become one line.

    Raises:
        CommandError: there is no such data set, or no image in it.
    """
    what = " in ".join(str(part) for part in (name, root) if part)
    try:
        dataset = create_dataset(name, None if root is None else str(root), split=split, **options)
    except (AssertionError, OSError, RuntimeError, ValueError, TypeError, ImportError, KeyError) as error:
        raise CommandError(f"no images of {what}, split {split!r}: {str(error) or 'timm has no such set'}") from error
    if not len(dataset):
        raise CommandError(f"no images of {what}, split {split!r}")
    return dataset


def identity(dataset: Dataset) -> dict[str, str]:
    """What tells a data set from others: where it is, and a digest of its images' names and sizes, or their number."""
    reader = getattr(dataset, "reader", dataset)
    where = str(Path(getattr(reader, "root", None) or "").resolve())
    if isinstance(reader, ReaderImageFolder):
        files = [(os.path.relpath(path, reader.root), Path(path).stat().st_size) for path, _ in reader.samples]
        return {"data": where, "images": hashlib.sha256(json.dumps(files).encode()).hexdigest()}
    # Data sets with a name do not change; what they print has their split.
    return {
        "data": f"{where} {type(reader).__name__} {getattr(reader, 'split', reader)!r}",
        "images": str(len(dataset)),
    }


def class_names(dataset: Dataset) -> list[str] | None:
    """The names of the classes by their numbers in the data set; None where it has none."""
    reader = getattr(dataset, "reader", dataset)
    for name in ("class_to_idx", "class_name_to_idx"):
        numbers = getattr(reader, name, None)
        if numbers:
            return sorted(numbers, key=numbers.get)
    return list(getattr(reader, "classes", ())) or None


def class_targets(dataset: Dataset) -> list[int] | None:
    """The class of every image, without reading images; None where the data set does not say."""
    reader = getattr(dataset, "reader", dataset)
    targets = getattr(reader, "targets", None)
    if targets is not None:
        return [int(target) for target in targets]
    samples = getattr(reader, "samples", None)
    return None if samples is None else [int(target) for _, target in samples]


def model_classes(names: list[str] | None, model: nn.Module) -> Tensor | None:
    """The model's class for each class of a data set: (K,) int64, or None if it can't be told.

    Classes named by WordNet numbers (n01440764) are ImageNet's; otherwise as many classes as the model has are taken to
    be the same, in the same order.
    """
    if not names:
        return None
    subset = infer_imagenet_subset(model)
    known = {synset: i for i, synset in enumerate(ImageNetInfo(subset).label_names())} if subset else {}
    if all(name in known for name in names):
        return torch.tensor([known[name] for name in names])
    return torch.arange(len(names)) if len(names) == model.num_classes else None
