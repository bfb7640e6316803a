"""What a label store holds for a data set, and how well its maps agree with the folders."""

from typing import NamedTuple, cast

import torch
from torch import Tensor

from timm_tokens.cli.annotate.annotator import Annotator
from timm_tokens.cli.annotate.job import Job
from timm_tokens.cli.common.datasets import class_names, class_numbers
from timm_tokens.data import Images, TokenLabelStore
from timm_tokens.ops import SparseLabels, crop_token_labels, others_share


class Summary(NamedTuple):
    """What a label store holds for a data set; agreement and confidence are None where folders are not the model's
    classes. The top class has the largest mean probability over the cells, of the classes that are kept."""

    images: int  # in the data set
    annotated: int  # by this run; the others had a map before, or could not be read
    labelled: int  # images with a map
    agreement: float | None  # share of them whose map's top class is the folder's
    confidence: float | None  # mean probability of the folder's class in the class target; if low, the cells disagree
    others: float | None  # mean probability of all classes together that a cell does not keep, None without a map


def describe(summary: Summary, annotator: Annotator) -> str:
    """A line about a summary, and a second one where the maps say little."""
    cells = " x ".join(map(str, annotator.grid))
    line = f"{summary.labelled} of {summary.images} images have a map of {cells} cells, "
    line += f"{summary.annotated} of them new; "
    if summary.agreement is None:
        line += "their folders are not the model's classes, so agreement can't be told"
    else:
        line += f"the map's top class is the folder's for {summary.agreement:.1%}"
        line += f", whose probability in the class token's target is {summary.confidence:.2f} on average"
    if summary.others is not None and summary.others > 0.5:
        line += (
            f"\nwarning: on average {summary.others:.0%} of a cell's probability is left to the classes that it does "
            "not keep, and training learns little from such labels. Use an annotator that is surer of these images, "
            "keep more classes (--top-k), or only those of the folders (--folder-classes)"
        )
    return line


def summarise(job: Job, annotated: int) -> Summary:
    """Read the maps back, each process its share, and count."""
    store, count = TokenLabelStore(job.out), job.annotator.num_classes
    targets = job.dataset.targets if isinstance(job.dataset, Images) else None
    known = list(range(count))  # of --folder-classes, which are in the folders' order
    if job.annotator.kept is None:
        known = list((class_numbers(class_names(job.dataset), count) or {}).values())
    classes = torch.tensor(known) if targets is not None and known else None
    numbers = torch.tensor(targets or [])
    share = range(job.process.rank, len(job.names), job.process.world)
    mine, right, sure, others = [i for i in share if job.names[i] in store], 0, 0.0, 0.0
    for start in range(0, len(mine), 256):
        chunk = mine[start : start + 256]
        values, indices = (torch.stack(part) for part in zip(*(store[job.names[i]] for i in chunk), strict=True))
        others += float(others_share(values.movedim(1, -1), count).mean((1, 2)).sum())
        if classes is None:
            continue
        truth = classes[numbers[chunk]]
        right += int((top_class(values, indices, count) == truth).sum())
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(chunk), 4)
        target = cast(SparseLabels, crop_token_labels(values, indices, whole, count, 1))
        sure += float(target.cls.gather(1, truth[:, None]).sum())
    annotated, labelled, *sums = (sum(job.process.gather([x])) for x in (annotated, len(mine), right, sure, others))
    agreement, confidence, left = (x / labelled if labelled else None for x in sums)
    told = (None, None) if classes is None else (agreement, confidence)
    return Summary(len(job.names), annotated, labelled, *told, left)


def top_class(values: Tensor, indices: Tensor, num_classes: int) -> Tensor:
    """The class (B,) with the largest mean probability over the cells of label maps, two tensors (B, top, H, W)."""
    votes = values.float().softmax(1).flatten(1)
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, indices.flatten(1).long(), votes).argmax(1)
