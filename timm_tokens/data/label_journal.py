"""The journal of a label writer: maps that are not in a shard yet, each safe from the moment it is appended."""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from timm_tokens.data.label_format import LabelMap

# A record: checksum of what follows it; bytes of the name; top, H, W; then the name, the values and the indices.
_HEAD = struct.Struct("<I4I")


class LabelJournal:
    """An append-only file of label maps. A record that a kill cut short is dropped when the file is opened again.

    Args:
        path: Made if need be.
    """

    def __init__(self, path: Path):
        # Unbuffered: a record is the system's, and outlives the process, as soon as append returns.
        self._file = path.open("a+b", buffering=0)

    def append(self, name: str, label: LabelMap) -> None:
        """Write one record."""
        encoded = name.encode()
        body = struct.pack("<4I", len(encoded), *label.values.shape) + encoded
        body += b"".join(x.contiguous().numpy().tobytes() for x in label)
        record = struct.pack("<I", zlib.crc32(body)) + body
        start, written = self._file.seek(0, 2), self._file.write(record)
        if written < len(record):  # a full disk; a torn record would hide those after it
            self._file.truncate(start)
            raise OSError(f"wrote {written} of {len(record)} bytes of the label of {name!r}: is the disk full?")

    def recover(self) -> list[tuple[str, LabelMap]]:
        """All whole records; what follows the last one is cut off."""
        self._file.seek(0)
        data = self._file.read()
        records, end = [], 0
        for name, label, place in _records(data):
            records.append((name, label))
            end = place
        self._file.truncate(end)
        return records

    def clear(self) -> None:
        """Forget all records, which a shard holds now."""
        self._file.truncate(0)

    def close(self) -> None:
        """Close the file; an empty one goes."""
        path, empty = Path(self._file.name), self._file.seek(0, 2) == 0
        self._file.close()
        if empty:
            path.unlink()


def _records(data: bytes) -> Iterator[tuple[str, LabelMap, int]]:
    """Whole records of a journal with the place where each ends."""
    start = 0
    while start + _HEAD.size <= len(data):
        checksum, length, *shape = _HEAD.unpack_from(data, start)
        cells = shape[0] * shape[1] * shape[2]
        values = start + _HEAD.size + length
        indices, end = values + 2 * cells, values + 6 * cells
        if end > len(data) or zlib.crc32(memoryview(data)[start + 4 : end]) != checksum:
            return
        name = data[start + _HEAD.size : values].decode()
        parts = (values, indices, torch.float16), (indices, end, torch.int32)
        yield name, LabelMap(*(_tensor(data[a:b], dtype).view(shape) for a, b, dtype in parts)), end
        start = end


def _tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)  # a bytearray, because tensors are writable
