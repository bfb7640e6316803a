"""Make label maps for token labeling: a classifier's best classes for every cell of every image.

    timm-tokens annotate imagenet/train labels --model dm_nfnet_f6.dm_in1k --pretrained --batch-size 64 --dtype bfloat16
    timm-tokens annotate images labels --model vit_tiny_patch16_224 --checkpoint weights.safetensors
    torchrun --nproc-per-node 8 -m timm_tokens annotate imagenet/train labels --model dm_nfnet_f6.dm_in1k --pretrained

Any classifier of timm with a spatial feature map will do: conv nets, ViTs, Swin. It sees the whole image, resized to
its input size without cropping. OUT becomes a label store that `TokenLabelDataset` reads. A run that was stopped
continues where it was. Images that can't be read are reported and left out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from timm_tokens.cli.annotate.annotator import AnnotatorOptions, make_annotator
from timm_tokens.cli.annotate.job import Job, fill, prepare
from timm_tokens.cli.annotate.summary import Summary, describe, summarise
from timm_tokens.cli.common import checks, models
from timm_tokens.cli.common.datasets import RECORD, class_names, open_dataset, tell
from timm_tokens.cli.common.processes import joined
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.options import LoadingOptions
from timm_tokens.data import TokenLabelWriter, image_names
from timm_tokens.data.images import check_indexed
from timm_tokens.files import write_json
from timm_tokens.options import option
from timm_tokens.peers import together
from timm_tokens.stopping import Stopped, listening


@dataclass(frozen=True, kw_only=True)
class Options(AnnotatorOptions, LoadingOptions):
    """Images and labels."""

    dataset: str = option(
        "", "folder with one folder of images per class, or name of a data set that timm knows, such as torch/cifar10; "
        "not needed where --data-dir is the folder of images", positional=True,
    )  # fmt: skip
    out: Path = option(help="folder for the label store; an unfinished one is continued", positional=True)
    data_dir: Path | None = option(
        None, "folder that a named data set is kept in, or folder of images (default: none)", metavar="FOLDER"
    )
    split: str | None = option(
        None, "split of a named data set, or folder inside DATASET (default: train; all of DATASET if it has no train)"
    )
    shard_size: int = option(4096, "number of label maps in each file of the store", at_least=1, rare=True)


def run(options: Options) -> Summary:
    """Annotate the images that have no map yet, and print a summary.

    Called by several processes of one group, each takes its share, and all return the same.
    """
    checks.folder(options.out)
    if not (options.dataset or options.data_dir):
        raise CommandError("DATASET is missing: a folder with one folder of images for each class")
    if options.data_dir and options.dataset and Path(options.dataset).exists():
        raise CommandError(f"DATASET {options.dataset} is a folder already: leave out --data-dir")
    with joined(options.device) as process:
        dataset = open_dataset(options.dataset or str(options.data_dir), options.data_dir, options.split)
        check_indexed(dataset)  # a stream's images have no names by which to find their maps
        folders = (class_names(dataset) or []) if options.folder_classes else None
        annotator = make_annotator(options, process.device, folders)
        job = Job(options.out, dataset, image_names(dataset), annotator, process)
        annotated, unread = _annotate(job, options)
        unread = dict(process.gather([*unread.items()]))  # which waits for all to have written
        summary = summarise(job, annotated)
    if process.rank == 0:
        print(f"Weights: {models.weights_of(options)}. {describe(summary, annotator)}")
        dataset = dataset.without(unread)
        tell(dataset.notes())
        write_json(options.out / RECORD, {"left out": dataset.left_out})
    return summary


def _annotate(job: Job, options: Options) -> tuple[int, dict[int, str]]:
    """Fill the store: how many images this process annotated, and by their numbers why others can't be read. A signal
    stops it, with what is done in shards."""
    rank = job.process.rank
    with listening() as requests, together(requests):
        prepare(job, options)
        with TokenLabelWriter(job.out, job.annotator.num_classes, shard_size=options.shard_size, part=rank) as writer:
            done = fill(job, writer, options, requests)
        if requests.received:
            stopped = Stopped(requests.received, f"{job.out} has all maps so far; to go on, run the same again")
            if rank == 0:
                print(stopped, file=sys.stderr)
            raise stopped
    return done
