"""What a process has to annotate: the images without a map, and the folder for their maps."""

import json
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens.cli.annotate.annotator import Annotator, AnnotatorOptions
from timm_tokens.cli.common.loading import batches
from timm_tokens.cli.common.processes import Process
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import LoadingOptions
from timm_tokens.data import TokenLabelWriter, flush_journals
from timm_tokens.data.label_format import check_image_id
from timm_tokens.data.label_index import INDEX
from timm_tokens.files import read_json, write_json
from timm_tokens.stopping import Requests


class Job(NamedTuple):
    """A data set and its images' names, the folder for their maps, who makes them, and which process this is."""

    out: Path
    dataset: Dataset
    names: list[str]
    annotator: Annotator
    process: Process


def prepare(job: Job, options: AnnotatorOptions) -> None:
    """Make the folder ready for all processes: nothing of another annotator, all that is done in shards."""
    for name in job.names:
        check_image_id(name)
    if job.process.rank == 0:
        _keep(job.out, _settings(job.annotator, options))
        alone = (0,) if job.process.world == 1 else ()  # then its writer goes on, and the shards are what they would be
        flush_journals(job.out, job.annotator.num_classes, but=alone)
    job.process.wait()


def _settings(annotator: Annotator, options: AnnotatorOptions) -> dict:
    """What decides the maps: a folder holds those of one setting."""
    config = {name: annotator.config[name] for name in ("input_size", "interpolation", "mean", "std")}
    settings = {"model": options.model, "weights": annotator.digest(), "top": annotator.top}
    kept = {} if annotator.kept is None else {"kept": annotator.kept}
    settings |= {"classes": annotator.num_classes} | kept | config
    return json.loads(json.dumps(settings))  # tuples become lists, as they are when read


def _keep(folder: Path, settings: dict) -> None:
    """Write down how the folder's maps are made; refuse to mix them with others."""
    path = folder / "annotator.json"
    if not path.is_file():
        if (folder / INDEX).is_file():
            raise CommandError(f"{folder} holds maps that were not made by this command: write to another folder")
        return write_json(path, settings)
    kept = read_json(path)
    other = [name for name, value in settings.items() if kept.get(name) != value]
    if other:
        raise CommandError(
            f"{folder} holds maps with {other[0]} {kept.get(other[0])!r}, this run would make them with "
            f"{settings[other[0]]!r}: write to another folder"
        )


def fill(job: Job, writer: TokenLabelWriter, loading: LoadingOptions, requests: Requests) -> tuple[int, dict[int, str]]:
    """Annotate this process's images that have no map, until a signal asks to stop: how many, and by their numbers why
    others can't be read."""
    pending = [i for i, name in enumerate(job.names) if name not in writer]
    job.process.wait()  # until all know what is pending: the first shard that one writes is not part of it
    todo = pending[job.process.rank :: job.process.world]
    if todo and job.process.world == 1:  # complete the batch that a kill cut: in another, numbers are rounded otherwise
        todo = [*range(todo[0] - todo[0] % loading.batch_size, todo[0]), *todo]
    device, added = job.process.device, 0
    unread: dict[int, str] = {}
    with tqdm(total=len(todo), unit="image", disable=job.process.rank > 0) as bar:
        for batch in batches(job.dataset, job.annotator.transform, loading, todo, device.startswith("cuda")):
            unread |= batch.unread
            if batch.images is not None:
                maps = job.annotator(batch.images.to(device, non_blocking=True))
                for number, values, indices in zip(batch.numbers, *maps, strict=True):
                    if job.names[number] not in writer:
                        writer.add(job.names[number], values, indices)
                        added += 1
            bar.update(len(batch))
            if requests.received:
                break
    return added, unread
