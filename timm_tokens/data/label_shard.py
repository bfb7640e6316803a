"""A shard of a label store: a safetensors file of thousands of maps, with a checksum of each."""

import hashlib
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from timm_tokens.data.label_format import LabelMap
from timm_tokens.data.label_index import FORMAT, ShardEntry

_DIRECTORY = ("keys", "names", "name_ends", "checksums")


class Shard(NamedTuple):
    """A shard of n maps, memory-mapped.

    Attributes:
        path: The shard's file.
        values, indices: (n, top, H, W) float16 and int32.
        keys: (n,) int64, see `name_key`.
        names: The image ids one after the other, as UTF-8.
        name_ends: n + 1 places in them, from 0 on.
        checksums: Checksum of each map; None in stores of older versions.
    """

    path: Path
    values: Tensor
    indices: Tensor
    keys: Tensor
    names: memoryview
    name_ends: memoryview
    checksums: memoryview | None

    def name(self, row: int) -> str:
        """The image id of a row."""
        return bytes(self.names[self.name_ends[row] : self.name_ends[row + 1]]).decode()

    def label(self, row: int) -> LabelMap:
        """The map of a row; one that is not what was written is a ValueError."""
        # Copies: a view would keep the whole shard's mapping alive, and pickle it.
        label = LabelMap(self.values[row].clone(), self.indices[row].clone())
        if self.checksums is not None and checksum(label) != self.checksums[row]:
            raise ValueError(
                f"label of image {self.name(row)!r} in {self.path} is corrupt: copy the file again, or delete it and "
                "annotate again"
            )
        return label


def name_key(name: str) -> int:
    """A 64-bit key of an image id, the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def checksum(label: LabelMap) -> int:
    """CRC-32 of a label map."""
    values, indices = (cast(Any, x.contiguous().numpy()) for x in label)  # a buffer, which its stubs don't say
    return zlib.crc32(indices, zlib.crc32(values))


def write_shard(path: Path, labels: dict[str, LabelMap]) -> None:
    """Write label maps, all of one shape, by image id."""
    encoded = [name.encode() for name in labels]
    tensors = {
        "values": torch.stack([label.values for label in labels.values()]),
        "indices": torch.stack([label.indices for label in labels.values()]),
        "keys": torch.tensor([name_key(name) for name in labels]),
        "names": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        "name_ends": torch.tensor([0, *map(len, encoded)]).cumsum(0),
        "checksums": torch.tensor([checksum(label) for label in labels.values()]),
    }
    path.write_bytes(save(tensors, {"format": FORMAT}))  # save_file would leave a file of another name if it is killed


def load_shard(path: Path, digest: str | None = None) -> Shard:
    """Memory-map one shard and check its directory: header, names and checksums, which its maps are checked by later.

    The digest is that of the directory, in the index. A corrupt shard is a ValueError that names the file.
    """
    try:
        tensors = load_file(path)
        if digest is not None and _digest(path, tensors) != digest:
            raise ValueError("its digest is not that in the index")
        return _shard(path, tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"label shard {path} can't be read ({error}): delete it and annotate again") from error


def shard_entry(path: Path) -> ShardEntry:
    """What the index says of a shard."""
    return ShardEntry(path.name, path.stat().st_size, _digest(path, load_file(path)))


def _digest(path: Path, tensors: dict[str, Tensor]) -> str:
    """Digest of everything in a shard but its maps: header, names and checksums."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        found.update(file.read(int.from_bytes(file.read(8), "little")))
    for name in _DIRECTORY:
        if name in tensors:
            found.update(cast(Any, tensors[name].numpy()))
    return found.hexdigest()


def _shard(path: Path, tensors: dict[str, Tensor]) -> Shard:
    """The tensors of a file as a shard, if they are one's."""
    values, indices, keys, names, ends = (tensors[x] for x in ("values", "indices", "keys", "names", "name_ends"))
    sums, count = tensors.get("checksums"), len(keys)
    found = {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    wanted = {"values": (torch.float16, (count, *values.shape[1:])), "indices": (torch.int32, tuple(values.shape))}
    wanted |= {"keys": (torch.int64, (count,)), "names": (torch.uint8, (names.numel(),))}
    wanted |= {"name_ends": (torch.int64, (count + 1,))} | ({} if sums is None else {"checksums": found["keys"]})
    if found != wanted or values.ndim != 4:
        raise ValueError(f"it must hold {wanted}, it holds {found}")
    if ends[0] != 0 or ends[-1] != len(names) or (ends.diff() < 1).any():
        raise ValueError("its names have no proper ends")
    views: Any = (x if x is None else memoryview(cast(Any, x.numpy())) for x in (names, ends, sums))
    return Shard(path, values, indices, keys, *views)
