"""Label every cell of every image with a classifier's best classes, once, for token labeling.

    timm-tokens annotate imagenet/train labels --model dm_nfnet_f6.dm_in1k --batch-size 64 --dtype bfloat16
    timm-tokens annotate images labels --model vit_tiny_patch16_224 --checkpoint weights.safetensors
    torchrun --nproc-per-node 8 -m timm_tokens annotate imagenet/train labels --model dm_nfnet_f6.dm_in1k

The model may be any of timm's with a spatial map: conv nets, ViTs, Swin. It sees the whole image, squashed to its input
size. OUT becomes a label store that `TokenLabelDataset` reads. A run that was stopped continues where it was.
"""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens.cli import _annotator
from timm_tokens.cli._annotator import Annotator, make_annotator
from timm_tokens.cli._data import class_names, class_targets, model_classes, open_dataset
from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._images import batches
from timm_tokens.cli._processes import Process, joined
from timm_tokens.data import TokenLabelStore, TokenLabelWriter, flush_journals, image_names
from timm_tokens.data.label_store import INDEX
from timm_tokens.files import replacing
from timm_tokens.ops import crop_token_labels


class Summary(NamedTuple):
    """What a label store holds for a data set.

    Attributes:
        images: in the data set.
        annotated: by this run; the others had a map before, or could not be read.
        labelled: images with a map.
        agreement: share of them whose map's top class is the folder's, None where folders are not the model's classes.
            The top class is that with the largest mean probability over the cells, of the classes that are kept.
        confidence: mean probability of the folder's class in the whole image's class target, None likewise.
            Where it is low, the cells disagree, and training learns little from a label.
    """

    images: int
    annotated: int
    labelled: int
    agreement: float | None
    confidence: float | None


class Job(NamedTuple):
    """A data set and its images' names, the folder for their maps, who makes them, and which process this is."""

    out: Path
    dataset: Dataset
    names: list[str]
    annotator: Annotator
    process: Process


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the sub-command: the keyword arguments of `run`."""
    parser.add_argument("data", help="folder with one folder of images a class, or a data set of timm (torch/imagenet)")
    parser.add_argument("out", type=Path, help="folder for the label store; one that a stopped run left is continued")
    parser.add_argument("--model", required=True, help="name of a classifier in timm, or of a model of this package")
    parser.add_argument("--checkpoint", type=Path, help="weights of the model (default: timm's)")
    parser.add_argument("--num-classes", type=int, help="of the checkpoint's classifier (default: the model's)")
    parser.add_argument(
        "--folder-classes",
        action="store_true",
        help="only the classes that the folders are named after (n01440764), in the folders' order",
    )
    parser.add_argument("--image-size", type=int, nargs="+", help="side, or height and width (default: the model's)")
    parser.add_argument("--top-k", type=int, default=5, help="classes to keep a cell (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, help="where a data set with a name is kept")
    parser.add_argument("--split", default="train", help="of the data set (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that load images (default: %(default)s)")
    parser.add_argument("--dtype", choices=_annotator.DTYPES, default="float32", help="of autocast (default: off)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--shard-size", type=int, default=4096, help="maps a file (default: %(default)s)")


def run(
    *,
    data: str | Path,
    out: str | Path,
    model: str,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    folder_classes: bool = False,
    image_size: Sequence[int] | None = None,
    top_k: int = 5,
    data_dir: str | Path | None = None,
    split: str = "train",
    batch_size: int = 64,
    workers: int = 4,
    dtype: str = "float32",
    device: str | None = None,
    shard_size: int = 4096,
) -> Summary:
    """Annotate the images that have no map yet, and print a summary; see the command's --help.

    Called by several processes of one group, each takes its share, and all return the same.

    Raises:
        CommandError: something is missing or does not fit, or images can't be read; then all others are annotated.
    """
    checkpoint = Path(checkpoint) if checkpoint else None
    how = {"num_classes": num_classes, "image_size": image_size, "top": top_k, "dtype": dtype}
    loading = {"batch_size": batch_size, "num_workers": workers}
    with joined(device) as process:
        dataset = open_dataset(data, data_dir, split)
        folders = (class_names(dataset) or []) if folder_classes else None
        annotator = make_annotator(model, checkpoint=checkpoint, device=process.device, folders=folders, **how)
        try:
            job = Job(Path(out), dataset, image_names(dataset), annotator, process)
            _prepare(job, _settings(annotator, model, checkpoint))
            with TokenLabelWriter(out, annotator.num_classes, shard_size=shard_size, part=process.rank) as writer:
                annotated, errors = _fill(job, writer, loading)
        except (RuntimeError, TypeError, ValueError) as error:
            raise CommandError(str(error)) from error
        errors = process.gather(errors)  # which waits for all to have written
        summary = _summary(job, annotated)
    if process.rank == 0:
        print(describe(summary, annotator))
    _complain(errors, summary.images)
    return summary


def describe(summary: Summary, annotator: Annotator) -> str:
    """One line about a summary."""
    rows, columns = annotator.grid
    line = f"{summary.labelled} of {summary.images} images have a map of {rows} x {columns} cells, "
    line += f"{summary.annotated} of them new; "
    if summary.agreement is None:
        return line + "their folders are not the model's classes, so agreement can't be told"
    line += f"the map's top class is the folder's for {summary.agreement:.1%}"
    return line + f", whose probability in the class token's target is {summary.confidence:.2f} on average"


def _settings(annotator: Annotator, model: str, checkpoint: Path | None) -> dict:
    """What decides the maps: a folder holds those of one setting."""
    config = {name: annotator.config[name] for name in ("input_size", "interpolation", "mean", "std")}
    weights = str(checkpoint.resolve()) if checkpoint else "timm's"
    settings = {"model": model, "weights": weights, "top": annotator.top, "classes": annotator.num_classes}
    if annotator.kept is not None:
        settings["kept"] = annotator.kept
    return json.loads(json.dumps(settings | config))  # tuples become lists, as they are when read


def _prepare(job: Job, settings: dict) -> None:
    """Make the folder ready for all processes: nothing of another annotator, all that is done in shards."""
    if job.process.rank == 0:
        _keep(job.out, settings)
        flush_journals(job.out, job.annotator.num_classes)
    job.process.wait()


def _keep(folder: Path, settings: dict) -> None:
    """Write down how the folder's maps are made; refuse to mix them with others."""
    path = folder / "annotator.json"
    if not path.is_file():
        if (folder / INDEX).is_file():
            raise CommandError(f"{folder} holds maps that were not made by this command: write to another folder")
        with replacing(path) as partial:
            partial.write_text(json.dumps(settings, indent=1))
        return
    kept = json.loads(path.read_text())
    other = [name for name, value in settings.items() if kept.get(name) != value]
    if other:
        raise CommandError(
            f"{folder} holds maps with {other[0]} {kept.get(other[0])!r}, this run would make them with "
            f"{settings[other[0]]!r}: write to another folder"
        )


def _fill(job: Job, writer: TokenLabelWriter, loading: dict) -> tuple[int, list[str]]:
    """Annotate this process's images that have no map: how many, and a line for each that can't be read."""
    pending = [i for i, name in enumerate(job.names) if name not in writer]
    job.process.wait()  # until all know what is pending: the first shard that one writes is not part of it
    todo = pending[job.process.rank :: job.process.world]
    device, errors = job.process.device, []
    loading |= {"pin_memory": device.startswith("cuda")}
    with tqdm(total=len(todo), unit="image", disable=job.process.rank > 0) as bar:
        for batch in batches(job.dataset, job.annotator.transform, todo, **loading):
            errors += batch.errors
            if batch.images is not None:
                maps = job.annotator(batch.images.to(device, non_blocking=True))
                for number, values, indices in zip(batch.numbers, *maps, strict=True):
                    writer.add(job.names[number], values, indices)
            bar.update(len(batch))
    return len(todo) - len(errors), errors


def _summary(job: Job, annotated: int) -> Summary:
    """Read the maps back, each process its share, and count."""
    store, targets, classes = TokenLabelStore(job.out), class_targets(job.dataset), None
    if targets is not None and job.annotator.kept is not None:  # in the folders' order
        classes = torch.arange(job.annotator.num_classes)
    elif targets is not None:
        classes = model_classes(class_names(job.dataset), job.annotator.model)
    share = range(job.process.rank, len(job.names), job.process.world)
    mine, right, sure = [i for i in share if job.names[i] in store], 0, 0.0
    for start in range(0, 0 if classes is None else len(mine), 256):
        chunk = mine[start : start + 256]
        maps = [torch.stack(part) for part in zip(*(store[job.names[i]] for i in chunk), strict=True)]
        truth = classes[torch.tensor([targets[i] for i in chunk])]
        right += int((top_class(*maps, job.annotator.num_classes) == truth).sum())
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(chunk), 4)
        target = crop_token_labels(*maps, whole, job.annotator.num_classes, 1).cls
        sure += float(target.gather(1, truth[:, None]).sum())
    annotated, labelled, right, sure = (
        sum(job.process.gather([count])) for count in (annotated, len(mine), right, sure)
    )
    shares = (right / labelled, sure / labelled) if classes is not None and labelled else (None, None)
    return Summary(len(job.names), annotated, labelled, *shares)


def _complain(errors: list[str], images: int) -> None:
    """About images that can't be read, ten at the most."""
    if errors:
        raise CommandError(
            f"{len(errors)} of {images} images can't be read: repair or remove them and run this again "
            f"(the others are annotated): {'; '.join(errors[:10])}{'; ...' if len(errors) > 10 else ''}"
        )


def top_class(values: Tensor, indices: Tensor, num_classes: int) -> Tensor:
    """The class (B,) with the largest mean probability over a map's cells, of the classes that are kept.

    Args:
        values, indices: (B, top, H, W), as in `LabelMap`.
        num_classes: K.
    """
    votes = values.float().softmax(1).flatten(1)
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, indices.flatten(1).long(), votes).argmax(1)
