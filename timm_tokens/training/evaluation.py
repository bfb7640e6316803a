"""What is measured on a data set while a model trains, with the work shared by all processes."""

from typing import Any

import torch
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from timm_tokens.data.images import as_images
from timm_tokens.distributed import all_reduce_sum, rank, world_size
from timm_tokens.losses import DistillLoss
from timm_tokens.outputs import classifies, outputs
from timm_tokens.stopping import outlast_signals
from timm_tokens.vit import TokenViT


class Accuracy:
    """Top-k accuracies in percent of a model on (image, class) pairs. Each process takes its part, once.

    timm's loader repeats images, so that all processes have the same number; here each image counts once.

    Args:
        dataset: Indexed, with the transform of validation.
        batch_size: Images in each batch.
        workers: Processes that load images.
        topk: Which accuracies: "top1", ...; the first chooses the best model.

    Raises:
        FloatingPointError: When called, the model's logits are infinite or NaN for some images; says for how many.
    """

    def __init__(self, dataset: Any, batch_size: int = 64, workers: int = 0, topk: tuple[int, ...] = (1, 5)):
        self.topk, self.loader = topk, part_of(dataset, batch_size, workers)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        meters, device = {f"top{k}": AverageMeter() for k in self.topk}, next(model.parameters()).device
        bad = torch.zeros(2, device=device)  # images with bad logits, and all images
        for images, labels in self.loader:
            logits = model(images.to(device))
            bad[0] += (~logits.isfinite().all(dim=1)).sum()
            bad[1] += len(logits)
            shares = accuracy(logits, labels.to(device), topk=self.topk)
            for meter, share in zip(meters.values(), shares, strict=True):
                meter.update(float(share), len(labels))
        wrong, seen = all_reduce_sum(bad).int().tolist()
        if wrong:
            raise FloatingPointError(f"the logits of {wrong} of {seen} validation images are infinite or NaN")
        return averages(meters, device)


class Fidelity:
    """How close the outputs of a model that merges are to its outputs without merging. Each process takes its part.

    For a model with classes it is the percentage of images whose top class stays the same ("agreement"), for others
    the mean cosine of class token and un-merged patches ("cosine").

    Args:
        dataset: As for `Accuracy`; the classes are not used.
        batch_size: Images at a time.
        workers: Processes that load images.
    """

    def __init__(self, dataset: Any, batch_size: int = 64, workers: int = 0):
        self.loader = part_of(dataset, batch_size, workers)

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, float]:
        logits, meter, device = classifies(model), AverageMeter(), next(model.parameters()).device
        plain = TokenViT(model.base, head=model.head).eval()
        for images, _ in self.loader:
            given, wanted = (outputs(each, images.to(device), logits) for each in (model, plain))
            if isinstance(given, Tensor) and isinstance(wanted, Tensor):
                value = 100 * (given.argmax(-1) == wanted.argmax(-1)).float().mean()
            else:
                value = 1 - DistillLoss()(given, wanted)
            meter.update(float(value), len(images))
        return averages({"agreement" if logits else "cosine": meter}, device)


def part_of(dataset: Any, batch_size: int, workers: int) -> DataLoader:
    """Batches of this process's part of a data set."""
    part = Subset(as_images(dataset), range(rank(), len(dataset), world_size()))
    return DataLoader(part, batch_size, num_workers=workers, worker_init_fn=outlast_signals)


def averages(meters: dict[str, AverageMeter], device: torch.device) -> dict[str, float]:
    """The averages over all processes."""
    sums = torch.tensor([[m.sum, m.count] for m in meters.values()], dtype=torch.float32, device=device)
    total, count = all_reduce_sum(sums).unbind(1)
    return dict(zip(meters, (total / count).tolist(), strict=True))
