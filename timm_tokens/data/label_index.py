"""The index of a label store: what its maps are, and which files they are in."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from timm_tokens.files import write_json

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
    """The index of a store; None if there is none.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The index is malformed; names the file, and says what is wrong.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no label store in {folder}: there is no such folder")
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt ({error}): delete it and run the writer again") from error
    if not isinstance(index, dict):
        raise ValueError(f"{path} must hold the index of a label store, got a {type(index).__name__}")
    if index.get("format") != FORMAT or index.get("version") != VERSION:
        raise ValueError(
            f"{path} must be of format {FORMAT!r}, version {VERSION}, "
            f"got {index.get('format')!r}, version {index.get('version')}"
        )
    return _checked(path, index)


def write_index(folder: Path, index: Index) -> None:
    """Put an index in the place of the one that is there."""
    shards = [{name: value for name, value in entry._asdict().items() if value is not None} for entry in index.shards]
    stored = {"format": FORMAT, "version": VERSION, "num_classes": index.num_classes, "shape": index.shape}
    write_json(folder / INDEX, stored | {"shards": shards})


def shard_path(folder: Path, entry: ShardEntry) -> Path:
    """The path of a shard in the index, whole by its size.

    Raises:
        ValueError: It is missing, of another size, or a link to a place outside the folder.
    """
    path = folder / entry.file
    if not path.is_file():
        raise ValueError(f"label shard {path} is in the index but missing: copy it again, or delete {INDEX} and resume")
    if path.resolve().parent != folder.resolve():
        raise ValueError(f"label shard {path} is a link to {path.resolve()}, outside its folder: copy the file itself")
    if path.stat().st_size != entry.bytes:
        raise ValueError(f"label shard {path} must be {entry.bytes} bytes, got {path.stat().st_size}: copy it again")
    return path


def _checked(path: Path, index: dict[str, Any]) -> Index:
    """The index with every value of the type and in the range that it must have."""
    given: Any = (index.get(name) for name in ("num_classes", "shape", "shards"))
    num_classes, shape, shards = given
    wrong = None
    if not _count(num_classes):
        wrong = f"num_classes must be a number from 1 on, got {num_classes!r}"
    elif shape is not None and not (isinstance(shape, list) and len(shape) == 3 and all(map(_count, shape))):
        wrong = f"shape must be [top, H, W] or null, got {shape!r}"
    elif not isinstance(shards, list):
        wrong = f"shards must be a list, got {shards!r}"
    else:
        wrong = next((_wrong_entry(shard) for shard in shards if _wrong_entry(shard)), None)
    if wrong is not None:
        raise ValueError(f"{path} is corrupt ({wrong}): delete it and run the writer again")
    entries = tuple(ShardEntry(shard["file"], shard["bytes"], shard.get("digest")) for shard in shards)
    return Index(num_classes, None if shape is None else tuple(shape), entries)


def _wrong_entry(shard: Any) -> str | None:
    """What is wrong with an entry; names of other folders' files are, too."""
    if not isinstance(shard, dict):
        return f"a shard must be an object, got {shard!r}"
    file, size, digest = (shard.get(name) for name in ("file", "bytes", "digest"))
    if not (isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:\0")):
        return f"a shard's file must be the name of a .safetensors file in the folder itself, got {file!r}"
    if not _count(size):
        return f"the bytes of {file!r} must be a number from 1 on, got {size!r}"
    if not isinstance(digest, str | None):
        return f"the digest of {file!r} must be text, got {digest!r}"
    return None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
