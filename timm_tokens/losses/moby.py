"""Contrastive learning with a momentum encoder and queues (MoBY, arXiv 2105.04553)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tokens.distributed import all_gather_batch
from timm_tokens.losses.cross_view import as_tokens, cross_view_losses
from timm_tokens.ops.ranges import check_positive


class MoBYLoss(nn.Module):
    """InfoNCE of each view's query with the other view's key, against a queue of earlier keys for each view.

        loss = MoBYLoss(256)
        loss([q1, q2], [k1, k2])      # (B, D) each, normalised here

    L = InfoNCE(q1, k2; queue 2) + InfoNCE(q2, k1; queue 1). In training mode each call then appends its keys, those of
    all processes, to the queues, which drop their oldest.

    Args:
        dim: D.
        queue_size: Keys to keep per view.
        tau: Temperature.
        num_views: Views with a key, each with a queue; 2 in the paper.

    Raises:
        ValueError: If an argument is not positive, when building; if views don't fit, when called.

    Source: MoBY (arXiv 2105.04553), section 3; MoCo (arXiv 1911.05722) for InfoNCE with a queue.
    """

    queue: Tensor

    def __init__(self, dim: int = 256, queue_size: int = 4096, *, tau: float = 0.2, num_views: int = 2) -> None:
        super().__init__()
        check_positive(dim=dim, queue_size=queue_size, tau=tau, num_views=num_views)
        self.tau, self.pair_weight = tau, float(num_views)  # the sum over directions, not their mean
        keys = torch.randn(num_views, queue_size, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("queue", F.normalize(keys, dim=-1))

    def forward(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar.

        Args:
            queries: The student's predictions (B, D), one per view.
            keys: The teacher's projections (B, D) of the same views; they get no gradient.
        """
        queries, keys = as_tokens(queries, keys)
        targets = self.targets(keys)
        loss = self.pair_weight * cross_view_losses(self.compare, queries, targets)[0]
        self.update(targets, targets)
        return loss

    # What MTELoss needs of a baseline: targets of each token, their combination, a comparison, and what happens after.

    @torch.no_grad()
    def targets(self, keys: Sequence[Tensor]) -> list[Tensor]:
        """Normalised keys (B, T, D) of each view."""
        if len(keys) != len(self.queue) or any(k.shape[-1] != self.queue.shape[-1] for k in keys):
            raise ValueError(
                f"there are {len(self.queue)} queues of keys with {self.queue.shape[-1]} channels, got keys "
                f"{[tuple(k.shape) for k in keys]}"
            )
        return [F.normalize(k.float(), dim=-1) for k in keys]

    def combine(self, target: Tensor) -> Tensor:
        """One key for the tokens of a view: the direction of their mean, (B, T, D) -> (B, 1, D)."""
        return F.normalize(target.mean(1, keepdim=True), dim=-1)

    def compare(self, student: Tensor, targets: Mapping[int, Tensor]) -> Tensor:
        """InfoNCE (B, T) of one view's queries (B, T, D), summed over keys of other views and their queues."""
        with torch.autocast(student.device.type, enabled=False):
            query = F.normalize(student.float(), dim=-1)
            losses = []
            for view, key in targets.items():
                positive = (query * key).sum(-1, keepdim=True) / self.tau  # (B, T, 1)
                negatives = query @ self.queue[view].T / self.tau  # (B, T, queue)
                losses.append(torch.cat([positive, negatives], -1).logsumexp(-1) - positive.squeeze(-1))
        return torch.stack(losses).sum(0)

    def assignments(self, targets: Sequence[Tensor]) -> list[Tensor]:
        """Probabilities over the queue's keys (B, T, queue): what entropy and agreement are measured on."""
        return [(k @ queue.T / self.tau).softmax(-1) for k, queue in zip(targets, self.queue, strict=True)]

    @torch.no_grad()
    def update(self, keys: Sequence[Tensor], combined: Sequence[Tensor]) -> None:
        """In training mode, put the combined keys (B, 1, D) of all processes into the queues."""
        if self.training:
            size = self.queue.shape[1]
            new = [all_gather_batch(key.squeeze(1)) for key in combined]
            # A new tensor, for autograd still needs the old one.
            self.queue = torch.stack([torch.cat(pair)[:size] for pair in zip(new, self.queue, strict=True)])

    def extra_repr(self) -> str:
        return f"dim={self.queue.shape[2]}, queue_size={self.queue.shape[1]}, tau={self.tau}"
