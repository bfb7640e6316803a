"""A run of `timm-tokens train`: its model, and what the prototypes of MTE make of images."""

import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._features import Source, eval_transform, file_identity
from timm_tokens.cli._images import batches
from timm_tokens.cli._sources import make_backbone
from timm_tokens.cli.objectives.mte import make_task
from timm_tokens.probing import assignment_nmi, ensemble_assignments
from timm_tokens.tasks import MTETask
from timm_tokens.training import checkpoints


class Trained(NamedTuple):
    """What a run trained: its model as a source of features, and of MTE the task, for its prototypes."""

    source: Source
    task: MTETask | None


def load_run(folder: Path) -> Trained:
    """What a run trained, from its last checkpoint.

    Args:
        folder: `--out` of `timm-tokens train`; its images may be gone.

    Raises:
        CommandError: there is no such run, or its checkpoint can't be read.
    """
    try:
        kept = json.loads((folder / "options.json").read_text())
        found = checkpoints.load(folder)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(f"no run of timm-tokens train in {folder}: {error}") from error
    if found is None:
        raise CommandError(f"the run in {folder} has no checkpoint yet")
    last, task = found.path, None
    options = Namespace(**kept | {"pretrained": False, "checkpoint": None})
    if kept["objective"] == "mte":
        task = make_task(options)
        task.load_task_state(found.state["task_state"])
    else:
        options.checkpoint = last
    about = {"model": options.model, "checkpoint": file_identity(last), "merge_r": "0"}
    make = partial(make_backbone, options) if task is None else lambda: task.product
    return Trained(Source(make, about, str(last), options.img_size), task)


@torch.inference_mode()
def nmi_by_tokens(
    trained: Trained, dataset: Dataset, *, batch_size: int, workers: int, device: str
) -> list[float] | None:
    """NMI with the classes of the argmax over prototypes of the first tokens' mean assignment: a number for each count.

    The teacher's assignments, centred, at its last temperature, as the task compares them. None for MoBY, which has no
    prototypes, and for other objectives.
    """
    task = trained.task
    if task is None or task.student.prototypes is None:
        return None
    task.criterion.baseline.tau_teacher = task.temperatures[1]
    teacher, baseline = task.teacher.to(device).eval(), task.criterion.baseline.to(device)
    transform = eval_transform(task.product, trained.source.img_size)
    rows, labels = [], []
    loading = {"batch_size": batch_size, "num_workers": workers}
    for batch in tqdm(batches(dataset, transform, **loading), desc="prototypes", unit="batch"):
        logits = teacher([batch.images.to(device)], num_global=1).tokens[0]  # (B, T, K)
        rows.append(ensemble_assignments(baseline.targets([logits])[0].transpose(0, 1)).cpu())
        labels += batch.labels
    return [assignment_nmi(row, torch.tensor(labels)) for row in torch.cat(rows, dim=1)]
