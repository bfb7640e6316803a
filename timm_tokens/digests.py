"""Files of weights that carry a digest of themselves, so that a single changed byte is noticed when they are read.

Both kinds stay what they are to everybody else: torch and timm load them as always. The digest is in the file, and not
beside it, so that no kill can part the two. In a checkpoint of torch.save, which is a zip archive, it is the archive's
comment; in a safetensors file it is an entry of the metadata.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

_MARK, _LENGTH = b"sha256:", len("sha256:") + 64
_BLANK = "0" * 64  # stands in the place of a safetensors file's digest while that is computed


def save_checkpoint(path: Path, state: Any) -> None:
    """torch.save with a digest. The same state gives the same bytes, whatever the path is."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch says of a failed write names places in its source
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        comment = _MARK + _sha256(path).hexdigest().encode()
        file.seek(-2, 2)  # an archive ends with the length of its comment, 0
        file.write(_LENGTH.to_bytes(2, "little") + comment)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with a digest.

    safetensors' own save_file is not used: it writes to a file of another name, which a kill leaves in the folder.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    data = save(tensors, (metadata or {}) | {"sha256": _BLANK})
    digest = hashlib.sha256(data).hexdigest()
    path.write_bytes(data.replace(_BLANK.encode(), digest.encode(), 1))


def is_whole(path: Path) -> bool | None:
    """Whether a file is as it was written; None if it has no digest. safetensors' own errors are not caught."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get("sha256")
        if digest is None:
            return None
        data = path.read_bytes().replace(digest.encode(), _BLANK.encode(), 1)
        return hashlib.sha256(data).hexdigest() == digest
    return _is_whole_archive(path)


def _is_whole_archive(path: Path) -> bool | None:
    start = path.stat().st_size - _LENGTH - 2
    with path.open("rb") as file:
        file.seek(max(0, start))
        length, comment = file.read(2), file.read()
    if start <= 0 or not comment.startswith(_MARK):
        return None
    digest = _sha256(path, start)
    digest.update(b"\0\0")  # as torch.save wrote it, without a comment
    return length == _LENGTH.to_bytes(2, "little") and _MARK + digest.hexdigest().encode() == comment


def _sha256(path: Path, length: int | None = None) -> Any:
    """The digest of the first bytes of a file, or of all."""
    digest, left = hashlib.sha256(), path.stat().st_size if length is None else length
    with path.open("rb") as file:
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
    return digest
