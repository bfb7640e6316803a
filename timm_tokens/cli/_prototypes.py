"""A run of `timm-tokens train mte`: its model, and what its prototypes make of images."""

import json
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._features import Source, eval_transform, file_identity
from timm_tokens.cli._images import batches
from timm_tokens.cli.objectives.mte import make_task
from timm_tokens.probing import assignment_nmi, ensemble_assignments
from timm_tokens.tasks import MTETask
from timm_tokens.training import checkpoints


class Trained(NamedTuple):
    """A task as its last checkpoint has it, and its product as a source of features."""

    task: MTETask
    source: Source


def load_run(folder: Path) -> Trained:
    """The task of a run, from its last checkpoint.

    Args:
        folder: `--out` of `timm-tokens train mte`; its images may be gone.

    Raises:
        CommandError: there is no such run, or its checkpoint can't be read.
    """
    try:
        kept = json.loads((folder / "options.json").read_text())
        state = checkpoints.load(folder)
    except (FileNotFoundError, ValueError) as error:
        raise CommandError(f"no run of timm-tokens train mte in {folder}: {error}") from error
    if kept.pop("objective") != "mte" or state is None:
        raise CommandError(
            f"{folder} has no checkpoint of timm-tokens train mte: for other models give --model and --checkpoint"
        )
    options = Namespace(**kept | {"pretrained": False, "checkpoint": None})
    task = make_task(options)
    task.load_task_state(state["task_state"])
    last = folder / checkpoints.LAST
    about = {"model": options.model, "checkpoint": file_identity(last), "merge_r": "0"}
    return Trained(task, Source(lambda: task.product, about, str(last), options.img_size))


@torch.inference_mode()
def nmi_by_tokens(
    trained: Trained, dataset: Dataset, *, batch_size: int, workers: int, device: str
) -> list[float] | None:
    """NMI with the classes of the argmax over prototypes of the first tokens' mean assignment: a number for each count.

    The teacher's assignments, centred, at its last temperature, as the task compares them. None for MoBY, which has no
    prototypes.
    """
    task = trained.task
    if task.student.prototypes is None:
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
