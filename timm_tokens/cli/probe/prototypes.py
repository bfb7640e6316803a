"""What the prototypes of MTE make of images."""

from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from timm_tokens.cli.common.loading import batches
from timm_tokens.cli.common.runs import Trained
from timm_tokens.cli.options import LoadingOptions
from timm_tokens.data import input_config, input_transform
from timm_tokens.probing import assignment_nmi, ensemble_assignments


@torch.inference_mode()
def nmi_by_tokens(trained: Trained, dataset: Dataset, loading: LoadingOptions, device: str) -> list[float] | None:
    """NMI with the classes of the argmax over prototypes of the first tokens' mean assignment: a number for each count.

    The teacher's assignments, centred, at its last temperature, as the task compares them. None for MoBY, which has no
    prototypes, and for other objectives.
    """
    task = trained.task
    if task is None or task.student.prototypes is None:
        return None
    baseline: Any = task.criterion.baseline
    baseline.tau_teacher = task.temperatures[1]
    teacher, baseline = task.teacher.to(device).eval(), baseline.to(device)
    transform = input_transform(input_config(task.product, trained.source.img_size))
    rows, labels = [], []
    for batch in tqdm(batches(dataset, transform, loading), desc="prototypes", unit="batch"):
        if batch.images is None:
            continue
        logits = teacher([batch.images.to(device)], num_global=1).tokens[0]  # (B, T, K)
        rows.append(ensemble_assignments(baseline.targets([logits])[0].transpose(0, 1)).cpu())
        labels += batch.labels
    return [assignment_nmi(row, torch.tensor(labels)) for row in torch.cat(rows, dim=1)]
