"""The images that a run is trained and validated on: those that can be read, checked once before it starts."""

from pathlib import Path
from typing import Any

from timm_tokens.cli.common.datasets import RECORD, identity, open_split, tell
from timm_tokens.cli.errors import CommandError
from timm_tokens.data import Images, unreadable
from timm_tokens.distributed import gather_objects, rank, world_size
from timm_tokens.files import read_json, write_json


def open_readable(options: Any, split: str, class_map: dict[str, int] | None = None) -> Images:
    """What `open_split` opens, and `readable` leaves of it."""
    return readable(open_split(options, split, class_map), options, split)


def readable(images: Any, options: Any, split: str) -> Images:
    """The images that can be read; the others are named, and noted in the run's folder, for TrainOptions.

    Each process checks its share, and all leave out the same. A run that is resumed takes what it noted, as long as
    the files have the same names and sizes: so it goes on with the same images.
    """
    if not isinstance(images, Images):  # a stream, which training refuses
        return images
    found, which = None, identity(images)
    if options.resume:
        kept = read_record(options.out).get(split, {})
        found = kept.get("unreadable") if kept.get("identity") == which else None
    if found is None:
        share = range(rank(), len(images), world_size())
        parts = gather_objects(unreadable(images, options.workers, share, disable=rank() > 0))
        found = {str(row): why for part in parts for row, why in part.items()}
    images = images.without({int(row): why for row, why in found.items()})
    if rank() == 0:
        noted = {"identity": which, "unreadable": found, "left out": images.left_out}
        write_json(options.out / RECORD, read_record(options.out) | {split: noted})
        tell(images.notes(), split)
    return images


def read_record(folder: Path) -> dict[str, dict]:
    """What was noted for each split in a run's folder."""
    path = folder / RECORD
    record = read_json(path)
    for split in record.values():
        found = split.get("unreadable") if isinstance(split, dict) else None
        if not isinstance(found, dict) or not all(row.isdecimal() for row in found):
            raise CommandError(f"{path} is not what a run notes of its images: delete it, and they are checked again")
    return record


def count_unreadable(folder: Path) -> int:
    """How many images were left out of a run because they can't be read."""
    return sum(len(split["unreadable"]) for split in read_record(folder).values())
