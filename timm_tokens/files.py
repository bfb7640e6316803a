"""Files that are there whole or not at all, however the process that writes them ends."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, what killed processes leave is not cleaned up
    fcntl = None  # type: ignore[assignment]  # no such module

_PARTIAL = re.compile(r"\..+\.\d+\.partial(\.[^.]*)?")  # hidden, of a process, and with the suffix of the file to be


@contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` once it is on the disk, and vanishes on failure.

        with replacing(path) as partial:
            image.save(partial)

    The file that is there now goes to `keep`, or is lost. An OSError, of a full disk, say, names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")  # PIL goes by the suffix
    with naming(path), _locked(partial):
        try:
            yield partial
            with partial.open("rb+") as written:  # the file of the lock, or one that was put in its place
                os.fsync(written.fileno())
            if keep is not None and path.is_file():
                path.replace(keep)
            partial.replace(path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write plain data, whole or not at all; what JSON does not know becomes text."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str = "delete it") -> dict[str, Any]:
    """What `write_json` wrote of a dict; empty if there is no such file, a ValueError if it is something else."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is corrupt ({error}): {remedy}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is corrupt (it holds a {type(data).__name__}): {remedy}")
    return data


def remove_partials(folder: Path) -> None:
    """Remove the partial files that killed processes left in a folder; those that are being written are locked."""
    for partial in folder.iterdir() if fcntl and folder.is_dir() else ():
        if _PARTIAL.fullmatch(partial.name):
            with suppress(OSError), partial.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(file, partial):
                    partial.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in errors that don't: writing to a full disk says only that it is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Make the file and hold its lock meanwhile; do without where there are no locks."""
    while fcntl:
        with partial.open("wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, partial):  # or else it was taken for a dead process's before it was locked
                yield
                return
    yield


def _is_at(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk, too."""
    if os.name == "posix":  # elsewhere a folder can't be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
