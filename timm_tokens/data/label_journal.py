"""The journal of a label writer: maps that are not in a shard yet, each safe from the moment it is appended."""

import math
import struct
import zlib
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
        data, start, records = bytearray(self._file.read()), 0, []  # a bytearray, because tensors are writable
        while start + _HEAD.size <= len(data):
            checksum, length, *shape = _HEAD.unpack_from(data, start)
            name = start + _HEAD.size
            values = name + length
            indices, end = values + 2 * math.prod(shape), values + 6 * math.prod(shape)
            if end > len(data) or zlib.crc32(memoryview(data)[start + 4 : end]) != checksum:
                break
            parts = (values, indices, torch.float16), (indices, end, torch.int32)
            label = LabelMap(*(torch.frombuffer(data[a:b], dtype=dtype).view(shape) for a, b, dtype in parts))
            records.append((data[name:values].decode(), label))
            start = end
        self._file.truncate(start)
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
