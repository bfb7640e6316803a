"""Write label maps into shards, so that a run can be killed at any time and resumed without loss."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from timm_tokens.data.label_format import LabelMap, check_image_id, check_label_map, write_label_file
from timm_tokens.data.label_index import Index, read_index, write_index
from timm_tokens.data.label_journal import LabelJournal
from timm_tokens.data.label_shard import load_shard, name_key, shard_entry, write_shard
from timm_tokens.data.label_store import TokenLabelStore, check_shape
from timm_tokens.files import remove_partials, replacing


class TokenLabelWriter:
    """Collects label maps into shards of a folder that `TokenLabelStore` reads. Use it as a context manager.

    Every map goes to a journal at once. When `shard_size` maps are there they become a shard: written beside, synced,
    renamed, entered in the index; only then is the journal emptied. So after a kill at any point the next writer
    continues with every map that `add` had returned for, and no file is ever half a shard. All maps have one shape, and
    ids are relative paths that stay inside a folder.

        with TokenLabelWriter(folder, num_classes=1000) as writer:
            for name, image in images:
                if name not in writer:
                    writer.add(name, *annotate(image))

    Args:
        folder: Made if need be; a folder of an earlier run is continued.
        num_classes: K of the annotator.
        shard_size: Maps in each shard.
        part: Number of this process, where several fill one folder together; each needs its own.

    Raises:
        ValueError: The folder holds labels for another number of classes.
        BlockingIOError: Another writer is at work on this part of the folder.
    """

    def __init__(self, folder: str | Path, num_classes: int, *, shard_size: int = 4096, part: int = 0):
        if shard_size < 1 or num_classes < 1 or part < 0:
            raise ValueError(
                f"shard_size and num_classes must be at least 1, part at least 0: {shard_size}, {num_classes}, {part}"
            )
        self.folder, self.num_classes, self.shard_size, self.part = Path(folder), num_classes, shard_size, part
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / f".part-{part:05d}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise BlockingIOError(
                f"another writer is at work on part {part} of {self.folder}: wait for it, or give each its own part"
            ) from None
        self._journal = LabelJournal(self.folder / f"part-{part:05d}.journal")
        try:
            self._resume()
        except BaseException:
            self._release()
            raise

    def add(self, name: str, values: Tensor, indices: Tensor) -> None:
        """Store the label map of one image: values (top, H, W) scores, indices (top, H, W) classes. Safe on return.

        Raises:
            ValueError: The map or the id is not valid, the map has another shape than the others, those of other parts
                too, or the image has one already.
        """
        check_image_id(name)
        label = check_label_map(name, LabelMap(values.cpu(), indices.cpu()), self.num_classes)
        if name in self:
            raise ValueError(f"image {name!r} has a label in {self.folder} already: ask `name in writer` before")
        self._agree(name, tuple(label.values.shape))
        self._journal.append(name, label)
        self._keep(name, label)
        self._flush_if_full()

    def __contains__(self, name: str) -> bool:
        return name_key(name) in self._done

    def __len__(self) -> int:
        return len(self._done)

    def flush(self) -> None:
        """Make a shard of the maps that wait in the journal, and enter it in the index."""
        if self._pending:
            path = self.folder / f"labels-{self.part:05d}-{self._next:05d}.safetensors"
            with replacing(path) as partial:
                write_shard(partial, self._pending)
            self._next += 1
            self._pending.clear()
        self._write_index(self._shape)
        self._journal.clear()

    def close(self) -> None:
        """Flush and let the folder go."""
        try:
            self.flush()
        finally:
            self._release()

    def __enter__(self) -> "TokenLabelWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        # After an error the journal keeps what waits: a resumed run fills the shard up, and no small shards pile up.
        self.close() if kind is None else self._release()

    def _release(self) -> None:
        self._journal.close()
        self._lock.release()

    def _resume(self) -> None:
        remove_partials(self.folder)
        index = self._read_index()
        self._shape: Any = index.shape
        self._done: set[int] = set()
        self._pending: dict[str, LabelMap] = {}
        digests = {entry.file: entry.digest for entry in index.shards}
        for path in _shards(self.folder):
            shard = load_shard(path, digests.get(path.name))
            self._done.update(shard.keys.tolist())
            self._shape = self._shape or tuple(shard.values.shape[1:])
            check_shape(shard, self._shape)
        own = [path.stem for path in _shards(self.folder) if path.name.startswith(f"labels-{self.part:05d}-")]
        self._next: int = 1 + max((int(stem.rsplit("-", 1)[1]) for stem in own), default=-1)
        for name, label in self._journal.recover():
            if name not in self:  # a kill between the shard and the emptied journal leaves both
                self._agree(name, tuple(label.values.shape))
                self._keep(name, label)
        self._flush_if_full()  # a kill between the last map of a shard and the shard

    def _keep(self, name: str, label: LabelMap) -> None:
        self._pending[name] = label
        self._done.add(name_key(name))

    def _flush_if_full(self) -> None:
        if len(self._pending) >= self.shard_size:
            self.flush()

    def _agree(self, name: str, shape: Any) -> None:
        """Refuse a map of another shape than the others'; the first of all parts decides, in the index."""
        if self._shape is None:
            self._shape = self._write_index(shape).shape
        if shape != self._shape:
            raise ValueError(f"label map of {name!r} has shape {shape}, the others in {self.folder} {self._shape}")

    def _read_index(self) -> Index:
        index = read_index(self.folder) or Index(self.num_classes, None, ())
        if index.num_classes != self.num_classes:
            raise ValueError(
                f"{self.folder} holds labels for {index.num_classes} classes, got num_classes={self.num_classes}: "
                "write to another folder"
            )
        return index

    def _write_index(self, shape: tuple[int, int, int] | None) -> Index:
        """Enter all shards in the index, which the parts share; the digests that are there are kept."""
        with FileLock(self.folder / ".index.lock"):
            index = self._read_index()
            known = {entry.file: entry for entry in index.shards}
            shards = [known.get(path.name) or shard_entry(path) for path in _shards(self.folder)]
            index = Index(self.num_classes, index.shape or shape, tuple(shards))
            write_index(self.folder, index)
        return index


def flush_journals(folder: str | Path, num_classes: int, *, but: Container[int] = ()) -> None:
    """Make shards of what killed writers left in their journals, whatever their parts.

    Before several processes fill a folder: then each knows all that is done, however many there were before.

    Args:
        folder: The store's folder.
        num_classes: K of the annotator.
        but: Parts whose journals stay, for their own writer to go on with.

    Raises:
        BlockingIOError: A writer is at work in the folder.
    """
    for part in sorted(int(path.stem.removeprefix("part-")) for path in Path(folder).glob("part-*.journal")):
        if part not in but:
            TokenLabelWriter(folder, num_classes, part=part).close()


def pack_labels(source: str | Path, folder: str | Path, num_classes: int, *, shard_size: int = 4096) -> TokenLabelStore:
    """Convert labels, such as the published `.pt` files, into shards. A killed conversion continues when repeated.

    Raises:
        ValueError: a label is corrupt or has a class outside [0, num_classes); names the image.
    """
    labels = TokenLabelStore(source)
    with TokenLabelWriter(folder, num_classes, shard_size=shard_size) as writer:
        for name in labels:
            if name not in writer:
                writer.add(name, *labels[name])
    return TokenLabelStore(folder)


def unpack_labels(source: str | Path, folder: str | Path) -> TokenLabelStore:
    """Convert labels into the published layout, `<folder>/<image id>.pt`.

    Raises:
        ValueError: a class is over 2048, which half precision can't hold, or an image id leads out of the folder; names
            the image.
    """
    for name, label in TokenLabelStore(source).items():
        write_label_file(_inside(Path(folder), name), label, name)
    return TokenLabelStore(folder)


def _inside(folder: Path, name: str) -> Path:
    """Where the label of an image goes in a folder: nowhere else, whatever links are there."""
    path = folder / f"{check_image_id(name)}.pt"
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} would be outside {folder}, by a link in it: write to another folder")
    return path


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("labels-*.safetensors"))
