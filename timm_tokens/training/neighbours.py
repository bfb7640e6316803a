"""What features are worth while a model is pre-trained without labels: they are only read to measure it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tokens.distributed import gather_objects, world_size
from timm_tokens.ops.clustering import kmeans_groups
from timm_tokens.probing import assignment_nmi, knn_accuracy
from timm_tokens.training.evaluation import part_of


class Neighbours:
    """k-NN accuracy of a model's features, and how well their clusters agree with the classes (NMI), both in percent.

    The clusters are those of k-means on the validation images' features of unit length, as many as there are classes.
    Each process takes its part of the images, and the result is that of one process.

    Args:
        train: Indexed, (image, class), with the transform of validation: the neighbours.
        val: The images whose classes are voted for, alike.
        k: Number of neighbours, at most as many as there are training images.
    """

    def __init__(self, train: Any, val: Any, k: int = 20, batch_size: int = 64, workers: int = 0):
        self.k = min(k, len(train))
        self.sizes = len(train), len(val)
        self.loaders = [part_of(each, batch_size, workers) for each in (train, val)]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """ "knn" and "nmi" of a model that gives features (B, C) for images."""
        device = next(model.parameters()).device
        known, scored = (features(model, *each, device) for each in zip(self.loaders, self.sizes, strict=True))
        accuracy = knn_accuracy(*known, *scored, [self.k])[self.k]
        return {"knn": 100 * accuracy, "nmi": 100 * _nmi(*scored)}


def features(model: Callable[[Tensor], Tensor], loader: Any, total: int, device: Any) -> tuple[Tensor, Tensor]:
    """Features (N, C) on the device, and classes (N,), of all processes in the order of the images."""
    parts = [(model(images.to(device)).float().cpu(), labels) for images, labels in loader]
    own = tuple(torch.cat(each) for each in zip(*parts, strict=True)) if parts else None
    shares = gather_objects(own)
    order = torch.cat([torch.arange(rank, total, world_size()) for rank in range(world_size())]).argsort()
    features, labels = (torch.cat(each)[order] for each in zip(*(share for share in shares if share), strict=True))
    return features.to(device), labels


def _nmi(features: Tensor, labels: Tensor) -> float:
    # k-means starts from points at equal distances, which would be one of each class if they were not shuffled.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    points = F.normalize(features[order.to(features.device)], dim=1)
    groups = kmeans_groups(points[None], len(labels.unique()), rounds=25)[0]
    return assignment_nmi(groups.cpu(), labels[order])
