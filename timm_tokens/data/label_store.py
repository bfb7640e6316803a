"""Read label maps by image: from memory-mapped shards, or from the published layout of one `.pt` file per image."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from timm_tokens.data.label_format import LabelMap, is_image_id, read_label_file
from timm_tokens.data.label_index import INDEX, read_index, shard_path
from timm_tokens.data.label_shard import Shard, load_shard, name_key


class TokenLabelStore(Mapping[str, LabelMap]):
    """Label maps by image id, read-only: `store["n01440764/n01440764_10026"]` is a `LabelMap`.

    A folder with an index holds shards: safetensors files of thousands of maps each. They are memory-mapped when first
    read, separately in every process, so that a store is cheap to open, to pickle and to hand to many workers, and the
    system's page cache is shared by all. Ids are found by hash, in 16 bytes per image; the id itself is then compared.

    Nothing that has changed on the disk is read unnoticed, and nothing is read for that alone: the files' sizes are
    checked when the store is opened, the digests of their headers, ids and checksums when a process first reads it, and
    the checksum of a map when that is read.

    A folder without one is read as the published layout, `<class folder>/<image>.pt`.

    Args:
        folder: Folder of a `TokenLabelWriter`, or of `.pt` files.
        num_classes: K, of `.pt` files, which don't say; a store of another number is refused.

    Attributes:
        num_classes: K of the annotator; None for `.pt` files without the argument.

    Raises:
        FileNotFoundError: No such folder, or nothing in it that is a label.
        ValueError: The index or a shard is corrupt, names the file; the labels are over another number of classes; on
            reading, a label is corrupt or has a class outside [0, K), names the image.
        KeyError: On reading, an image has no label.
    """

    def __init__(self, folder: str | Path, num_classes: int | None = None):
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.num_classes: Any = num_classes if index is None else index.num_classes
        if num_classes not in (None, self.num_classes):
            raise ValueError(f"the labels in {self.folder} are over {self.num_classes} classes, not {num_classes}")
        self._shape = index and index.shape
        self._files: Any = index and [(shard_path(self.folder, entry), entry.digest) for entry in index.shards]
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
        label = shard.label(row)
        low, high = (int(x) for x in label.indices.aminmax())
        if low < 0 or high >= self.num_classes:  # found here, and not as an illegal access on a GPU
            raise ValueError(
                f"label of image {name!r} in {self.folder} is corrupt: classes must be in [0, {self.num_classes}), "
                f"got {low} to {high}: annotate it again"
            )
        return label

    def __contains__(self, name: object) -> bool:
        if self._files is None:
            return is_image_id(str(name)) and self._path(str(name)).is_file()
        return self._find(str(name)) is not None

    def __iter__(self) -> Iterator[str]:
        if self._files is None:
            return (p.relative_to(self.folder).with_suffix("").as_posix() for p in sorted(self.folder.rglob("*.pt")))
        return (shard.name(row) for shard, row in map(self._locate, sorted(self._directory.places)))

    def __len__(self) -> int:
        if self._files is None:
            return sum(1 for _ in self.folder.rglob("*.pt"))
        return len(self._directory.keys)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, num_classes={self.num_classes})"

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_directory"}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pt"

    def _read_file(self, name: str) -> LabelMap:
        if not is_image_id(name):
            raise KeyError(f"no label for image {name!r}: it is no path inside {self.folder}")
        try:
            return read_label_file(self._path(name), name, self.num_classes)
        except FileNotFoundError:
            raise KeyError(f"no label for image {name!r}: there is no {self._path(name)}") from None

    def _find(self, name: str) -> tuple[Shard, int] | None:
        _, keys, places = self._directory
        key = name_key(name)
        at = bisect_left(keys, key)
        if at == len(keys) or keys[at] != key:
            return None
        shard, row = self._locate(places[at])
        return (shard, row) if shard.name(row) == name else None

    def _locate(self, place: int) -> tuple[Shard, int]:
        return self._directory.shards[place >> 32], place & 0xFFFFFFFF

    @cached_property
    def _directory(self) -> "_Directory":
        """The shards, mapped when they are first asked for, once per process."""
        shards = [load_shard(path, digest) for path, digest in self._files]
        for shard in shards:
            check_shape(shard, self._shape or tuple(shards[0].values.shape[1:]))
        none = torch.empty(0, dtype=torch.int64)
        places = torch.cat([none, *((i << 32) + torch.arange(len(shard.keys)) for i, shard in enumerate(shards))])
        keys, order = torch.cat([none, *(shard.keys for shard in shards)]).sort(stable=True)
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]  # two parts may both have annotated an image; the labels are the same
        return _Directory(shards, *(memoryview(cast(Any, x[first].numpy())) for x in (keys, places[order])))


class _Directory(NamedTuple):
    """The shards, and of each image the key, sorted, and the place: the number of its shard and the row in it.

    Memoryviews, whose items are plain ints, an order faster than a tensor's.
    """

    shards: list[Shard]
    keys: memoryview
    places: memoryview


def check_shape(shard: Shard, shape: tuple[int, ...]) -> None:
    """Refuse a shard whose maps are not of the store's shape."""
    found = tuple(shard.values.shape[1:])
    if found != shape:
        raise ValueError(
            f"label shard {shard.path} holds maps of (top, H, W) = {found}, the store's others are {shape}: the "
            "maps of a store have one shape, so write these to another folder"
        )
