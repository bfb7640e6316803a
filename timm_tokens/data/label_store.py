"""Read label maps by image: from memory-mapped shards, or from the published layout of one `.pt` file an image."""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from timm_tokens.data.label_format import LabelMap, check_label_map, read_label_file

INDEX = "index.json"
FORMAT = "timm-tokens label store"
VERSION = 1


class TokenLabelStore(Mapping[str, LabelMap]):
    """Label maps by image id, read-only: `store["n01440764/n01440764_10026"]` is a `LabelMap`.

    A folder with an index holds shards: safetensors files of thousands of maps each. They are memory-mapped when first
    read, separately in every process, so that a store is cheap to open, to pickle and to hand to many workers, and the
    system's page cache is shared by all. Ids are found by hash, in 16 bytes an image; the id itself is then compared.

    A folder without one is read as the published layout, `<class folder>/<image>.pt`.

    Args:
        folder: of a `TokenLabelWriter`, or of `.pt` files.
        num_classes: K, of `.pt` files, which don't say; a store of another number is refused.

    Attributes:
        num_classes: K of the annotator; None for `.pt` files without the argument.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that is a label.
        ValueError: the index or a shard is damaged, or the labels are over another number of classes; on reading, a
            label is damaged or has a class outside [0, K); names the image.
        KeyError: on reading, an image has no label.
    """

    def __init__(self, folder: str | Path, num_classes: int | None = None):
        self.folder = Path(folder)
        self._shards = self._keys = self._places = None
        index = read_index(self.folder)
        self.num_classes = num_classes if index is None else index["num_classes"]
        if num_classes not in (None, self.num_classes):
            raise ValueError(f"the labels in {self.folder} are over {self.num_classes} classes, not {num_classes}")
        self._files = index and [check_shard(self.folder, shard) for shard in index["shards"]]
        if index is None and next(self.folder.rglob("*.pt"), None) is None:
            raise FileNotFoundError(f"no label store in {self.folder}: it holds neither {INDEX} nor .pt files")

    def __getitem__(self, name: str) -> LabelMap:
        if self._files is None:
            return self._read_file(name)
        place = self._find(name)
        if place is None:
            raise KeyError(
                f"no label for image {name!r} in {self.folder}, of {len(self)}: annotate it, or leave it out"
            )
        shard, row = place
        # Copies: a view would keep the whole shard's mapping alive, and pickle it.
        label = LabelMap(shard.values[row].clone(), shard.indices[row].clone())
        low, high = (int(x) for x in label.indices.aminmax())
        if low < 0 or high >= self.num_classes:  # found here, and not as an illegal access on a GPU
            raise ValueError(
                f"label of image {name!r} in {self.folder} is damaged: classes must be in [0, {self.num_classes}), "
                f"got {low} to {high}: annotate it again"
            )
        return label

    def __contains__(self, name: object) -> bool:
        if self._files is None:
            return self._path(str(name)).is_file()
        return self._find(str(name)) is not None

    def __iter__(self) -> Iterator[str]:
        if self._files is None:
            return (p.relative_to(self.folder).with_suffix("").as_posix() for p in sorted(self.folder.rglob("*.pt")))
        self._open()
        return (shard.name(row) for shard, row in map(self._locate, sorted(self._places)))

    def __len__(self) -> int:
        if self._files is None:
            return sum(1 for _ in self.folder.rglob("*.pt"))
        self._open()
        return len(self._keys)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, num_classes={self.num_classes})"

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_shards": None, "_keys": None, "_places": None}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def _read_file(self, name: str) -> LabelMap:
        try:
            return check_label_map(name, read_label_file(self._path(name), name), self.num_classes)
        except FileNotFoundError:
            raise KeyError(f"no label for image {name!r}: there is no {self._path(name)}") from None

    def _find(self, name: str) -> tuple["Shard", int] | None:
        self._open()
        key = name_key(name)
        at = bisect_left(self._keys, key)
        if at == len(self._keys) or self._keys[at] != key:
            return None
        shard, row = self._locate(self._places[at])
        return (shard, row) if shard.name(row) == name else None

    def _locate(self, place: int) -> tuple["Shard", int]:
        return self._shards[place >> 32], place & 0xFFFFFFFF

    def _open(self) -> None:
        """Map the shards and sort the keys, once a process."""
        if self._shards is not None:
            return
        shards = [load_shard(path) for path in self._files]
        keys = [shard.keys for shard in shards]
        places = [(i << 32) + torch.arange(len(key)) for i, key in enumerate(keys)]
        none = torch.empty(0, dtype=torch.int64)
        keys, order = torch.cat([none, *keys]).sort(stable=True)
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]  # two parts may both have annotated an image; the labels are the same
        self._keys = memoryview(keys[first].numpy())  # whose items are plain ints, an order faster than a tensor's
        self._places = memoryview(torch.cat([none, *places])[order][first].numpy())
        self._shards = shards


class Shard(NamedTuple):
    """A shard of n maps: `values` and `indices` (n, top, H, W), `keys` (n,) and the joined names with their ends."""

    values: Tensor
    indices: Tensor
    keys: Tensor
    names: memoryview
    name_ends: memoryview

    def name(self, row: int) -> str:
        """The image id of a row."""
        return bytes(self.names[self.name_ends[row] : self.name_ends[row + 1]]).decode()


def name_key(name: str) -> int:
    """A 64-bit key of an image id, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def load_shard(path: Path) -> Shard:
    """Memory-map one shard."""
    try:
        tensors = load_file(path)
        views = {name: memoryview(tensors.pop(name).numpy()) for name in ("names", "name_ends")}
        return Shard(**tensors, **views)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"label shard {path} can't be read ({error}): delete it and annotate again") from error


def read_index(folder: Path) -> dict | None:
    """The index of a store; None if there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no label store in {folder}: there is no such folder")
    try:
        index = json.loads((folder / INDEX).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / INDEX} is damaged ({error}): delete it and run the writer again") from error
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(
            f"{folder / INDEX} must be of format {FORMAT!r}, version {VERSION}, "
            f"got {index.get('format')!r}, version {index.get('version')}"
        )
    return index


def check_shard(folder: Path, shard: dict) -> Path:
    """The path of a shard in the index, whole by its size."""
    path = folder / shard["file"]
    if not path.is_file():
        raise ValueError(f"label shard {path} is in the index but missing: copy it again, or delete {INDEX} and resume")
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(f"label shard {path} must be {shard['bytes']} bytes, got {path.stat().st_size}: copy it again")
    return path
