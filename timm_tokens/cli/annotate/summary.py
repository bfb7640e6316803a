"""What a label store holds for a data set, and how well its maps agree with the folders."""

from typing import NamedTuple

import torch
from torch import Tensor

from timm_tokens.cli.annotate.annotator import Annotator
from timm_tokens.cli.annotate.job import Job
from timm_tokens.cli.common.datasets import class_names, class_targets, model_classes
from timm_tokens.data import TokenLabelStore
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


def describe(summary: Summary, annotator: Annotator) -> str:
    """One line about a summary."""
    rows, columns = annotator.grid
    line = f"{summary.labelled} of {summary.images} images have a map of {rows} x {columns} cells, "
    line += f"{summary.annotated} of them new; "
    if summary.agreement is None:
        return line + "their folders are not the model's classes, so agreement can't be told"
    line += f"the map's top class is the folder's for {summary.agreement:.1%}"
    return line + f", whose probability in the class token's target is {summary.confidence:.2f} on average"


def summarise(job: Job, annotated: int) -> Summary:
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


def top_class(values: Tensor, indices: Tensor, num_classes: int) -> Tensor:
    """The class (B,) with the largest mean probability over a map's cells, of the classes that are kept.

    Args:
        values, indices: (B, top, H, W), as in `LabelMap`.
        num_classes: K.
    """
    votes = values.float().softmax(1).flatten(1)
    return votes.new_zeros(len(votes), num_classes).scatter_add_(1, indices.flatten(1).long(), votes).argmax(1)
