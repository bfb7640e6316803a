"""The index of a label store: what its maps are, and which files they are in."""

from pathlib import Path
from typing import Any, NamedTuple, cast

from timm_tokens.files import read_json, write_json

INDEX = "index.json"
FORMAT = "timm-tokens label store"
VERSION = 1


class ShardEntry(NamedTuple):
    """A shard in the index: its file's name and size, and the digest of its directory (None in stores of old)."""

    file: str
    bytes: int
    digest: str | None


class Index(NamedTuple):
    """What a store holds: K of the annotator, the shape (top, H, W) of all maps (None without any), and the shards."""

    num_classes: int
    shape: tuple[int, int, int] | None
    shards: tuple[ShardEntry, ...]


def read_index(folder: Path) -> Index | None:
    """The index of a store, None if there is none; a malformed one is a ValueError that names the file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no label store in {folder}: there is no such folder")
    path, remedy = folder / INDEX, "delete it and run the writer again"
    if not path.exists():
        return None
    index = read_json(path, remedy)
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(
            f"{path} must be of format {FORMAT!r}, version {VERSION}, "
            f"got {index.get('format')!r}, version {index.get('version')}"
        )
    try:
        return _parsed(index)
    except ValueError as error:
        raise ValueError(f"{path} is corrupt ({error}): {remedy}") from None


def write_index(folder: Path, index: Index) -> None:
    """Put an index in the place of the one that is there."""
    stored = {"format": FORMAT, "version": VERSION, "num_classes": index.num_classes, "shape": index.shape}
    write_json(folder / INDEX, stored | {"shards": [entry._asdict() for entry in index.shards]})


def shard_path(folder: Path, entry: ShardEntry) -> Path:
    """The path of a shard in the index, which is there, in the folder itself, and whole by its size."""
    path = folder / entry.file
    if not path.is_file():
        raise ValueError(f"label shard {path} is in the index but missing: copy it again, or delete {INDEX} and resume")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"label shard {path} is a link to {path.resolve()}, outside its folder: copy the file itself")
    if path.stat().st_size != entry.bytes:
        raise ValueError(f"label shard {path} must be {entry.bytes} bytes, got {path.stat().st_size}: copy it again")
    return path


def _parsed(index: dict[str, Any]) -> Index:
    """The index with every value of the type and in the range that it must have."""
    given: Any = (index.get(name) for name in Index._fields)
    num_classes, shape, shards = given
    if not _count(num_classes):
        raise ValueError(f"num_classes must be a number from 1 on, got {num_classes!r}")
    if shape is not None and not (isinstance(shape, list) and len(shape) == 3 and all(map(_count, shape))):
        raise ValueError(f"shape must be [top, H, W] or null, got {shape!r}")
    if not isinstance(shards, list):
        raise ValueError(f"shards must be a list, got {shards!r}")
    entries, sides = tuple(_parsed_entry(shard) for shard in shards), cast(Any, shape and tuple(shape))
    return Index(num_classes, sides, entries)


def _parsed_entry(shard: Any) -> ShardEntry:
    if not isinstance(shard, dict):
        raise ValueError(f"a shard must be an object, got {shard!r}")
    given: Any = (shard.get(name) for name in ShardEntry._fields)
    file, size, digest = given
    if not (isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:\0")):
        raise ValueError(f"a shard's file must be the name of a .safetensors file in the folder itself, got {file!r}")
    if not _count(size):
        raise ValueError(f"the bytes of {file!r} must be a number from 1 on, got {size!r}")
    if not isinstance(digest, str | None):
        raise ValueError(f"the digest of {file!r} must be text, got {digest!r}")
    return ShardEntry(file, size, digest)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
