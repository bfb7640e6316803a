"""Accuracy of a classifier on a data set, shared by the processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from timm_tokens.data.images import as_images
from timm_tokens.distributed import all_reduce_sum, rank, world_size
from timm_tokens.stopping import outlast_signals


class Accuracy:
    """Top-k accuracies in percent of a model on (image, class) pairs. Each process takes its part, once.

    timm's loader for several processes repeats images to give all the same number, which counts them twice; this one
    doesn't.

    Args:
        dataset: Indexed, with the transform of validation.
        batch_size: Images in each batch.
        workers: Processes that load images.
        topk: Which accuracies: "top1", ...; the first chooses the best model.

    Raises:
        FloatingPointError: When called, the model's logits are infinite or NaN for some images; says for how many.
    """

    def __init__(self, dataset: Dataset, batch_size: int = 64, workers: int = 0, topk: tuple[int, ...] = (1, 5)):
        self.topk = topk
        part = Subset(as_images(dataset), range(rank(), len(dataset), world_size()))
        self.loader = DataLoader(part, batch_size, num_workers=workers, worker_init_fn=outlast_signals)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        meters, device = {f"top{k}": AverageMeter() for k in self.topk}, next(model.parameters()).device
        bad = torch.zeros(1, device=device)
        for images, labels in self.loader:
            logits = model(images.to(device))
            bad += (~logits.isfinite().all(dim=1)).sum()
            shares = accuracy(logits, labels.to(device), topk=self.topk)
            for meter, share in zip(meters.values(), shares, strict=True):
                meter.update(float(share), len(labels))
        sums = torch.tensor([[m.sum, m.count] for m in meters.values()], dtype=torch.float32, device=device)
        total, count = all_reduce_sum(sums).unbind(1)
        if wrong := int(all_reduce_sum(bad)):
            raise FloatingPointError(f"the logits of {wrong} of {int(count[0])} validation images are infinite or NaN")
        return dict(zip(meters, (total / count).tolist(), strict=True))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode for a while; every part of it is then put back into its own mode."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        yield model.eval()
    finally:
        for part, mode in modes:
            part.training = mode
