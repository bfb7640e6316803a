"""Early-stage feature reconstruction: few-shot features without what is specific to single images.

Lee & Chung, "Unsupervised Embedding Adaptation via Early-Stage Feature Reconstruction for Few-Shot Classification",
ICML 2021, arXiv 2106.11486.
"""

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from timm_tokens.fewshot.nets import DEPTH, Run, drop_out, unit
from timm_tokens.ops.finite import check_finite
from timm_tokens.ops.intrinsic_dim import local_intrinsic_dimensionality
from timm_tokens.ops.ranges import check_not_negative, check_positive


class Adapted(NamedTuple):
    """Adapted features (T, M, D), a mean over the nets, and the updates (T, num_nets) after which each net stopped."""

    features: Tensor
    updates: Tensor


def prepare(features: Tensor, num_support: int | None = None) -> Tensor:
    """Shifts the queries to the mean of the support, centres all the points and scales them to unit length.

    Args:
        features: One episode or many, (..., M, D); the support rows come first.
        num_support: Number of support rows; None: no shift.

    Returns:
        (..., M, D), rows of unit length; a row that equals the mean becomes zero.
    """
    if num_support is not None:
        support, query = features[..., :num_support, :], features[..., num_support:, :]
        shift = support.mean(-2, keepdim=True) - query.mean(-2, keepdim=True)
        features = torch.cat([support, query + shift], dim=-2)
    return unit(features - features.mean(-2, keepdim=True))


@dataclass(eq=False)
class ESFR:
    """Adapts the features of few-shot episodes, without labels, before any classifier.

    A network learns what many points share before it memorises single points. So a small network that reconstructs an
    episode's features from half of their entries is trained for a few steps only, and its outputs replace the features.
    It has trained enough when the dimension that its hidden layer fills around the points, falling until then, rises.
    Several networks are trained on every episode and their outputs averaged.

    All the networks of a chunk of episodes run as one batch; those that stop leave it. Every network draws from a
    random stream of its own, so that the result depends on neither the chunks nor the other episodes.

    Args:
        num_nets: Networks for each episode.
        dropout: Share of the input entries that each update leaves out, to a precision of 1/65536.
        neighbours: Neighbours (the point itself included) that the dimension is measured with, at most all M points.
        period: Updates from one measurement to the next.
        max_updates: Updates after which a network stops in any case.
        lr: Adam's learning rate.
        support_weight: Weight of the cross-entropy of a linear classifier on the support points' reconstructions.
        center: Whether each network's outputs are centred over the episode before they are scaled to unit length.
        chunk_size: Episodes that run at once; memory grows with it, as chunk_size * num_nets * 13 * D^2 floats. None:
            as many as stay in a CPU's cache, or keep a GPU busy (see `episodes_at_once`).

    Raises:
        ValueError: An argument is out of range.
    """

    num_nets: int = 5
    dropout: float = 0.5
    neighbours: int = 21
    period: int = 2
    max_updates: int = 100
    lr: float = 1e-3
    support_weight: float = 0.0
    _: KW_ONLY
    center: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_nets", "period", "max_updates", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must lie in [0, 1): 1 would leave nothing to reconstruct from")
        if self.neighbours < 3:
            raise ValueError(f"neighbours = {self.neighbours} must be at least 3, the point itself included")
        check_positive(lr=self.lr)
        check_not_negative(support_weight=self.support_weight)  # 0 leaves the labels unused

    def episodes_at_once(self, features: Tensor) -> int:
        """How many episodes of features (..., D) run at once: `chunk_size`, or as their weights leave room for."""
        if self.chunk_size is not None:
            return self.chunk_size
        weights, most = (3_000_000, 16) if features.device.type == "cpu" else (64_000_000, 256)
        return max(1, min(most, weights // (self.num_nets * DEPTH * features.shape[-1] ** 2)))

    @torch.no_grad()
    def adapt(
        self,
        features: Tensor,
        weights: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
        *,
        support: int | Tensor | None = None,
    ) -> Adapted:
        """Adapts the features of T episodes.

        Args:
            features: (T, M, D), the support rows first.
            weights: Initial weights to reproduce a run, the same for all episodes: 4 tensors (num_nets, D, D), as in
                nn.Linear; None: Glorot-uniform.
            generator: Source of the initial weights and of the dropout, on any device; None: torch's default one.
            support: The number of support rows, or their labels (T, S) or (S,), 0 to K - 1. With it the features are
                first prepared as in `prepare`; without it they are taken as they are, already prepared.

        Returns:
            `Adapted(features (T, M, D), updates (T, num_nets))`.

        Raises:
            ValueError: a shape does not fit, features or weights are not finite, or support_weight is set and there are
                no labels.
        """
        labels = self._check(features, weights, support)
        features = features.to(torch.promote_types(features.dtype, torch.float32))  # half precision would not train
        if support is not None:
            features = prepare(features, cast(int, support) if labels is None else labels.shape[-1])
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**62, (len(features), self.num_nets), generator=generator, device=device).cpu()
        if not self.support_weight or labels is None:
            labels = torch.empty(len(features), 0, dtype=torch.long, device=features.device)
        size = self.episodes_at_once(features)
        chunks = zip(*(t.split(size) for t in (features, labels, seeds)), strict=True)
        adapted = [self._adapt_chunk(x, y, s.flatten().tolist(), weights) for x, y, s in chunks]
        return Adapted(*(torch.cat(parts) for parts in zip(*adapted, strict=True)))

    def _check(self, features: Tensor, weights: list[Tensor] | None, support: int | Tensor | None) -> Tensor | None:
        """Refuses shapes that do not fit and what is not finite; returns the support labels (T, S) if there are any."""
        if features.ndim != 3 or not features.is_floating_point():
            raise ValueError(f"features must be floats (T, M, D); got {features.dtype} {tuple(features.shape)}")
        t, m, d = features.shape
        if m < 3:
            raise ValueError(f"an episode of {m} points is too small to measure a dimension in; pass at least 3")
        shapes = [tuple(w.shape) for w in weights or []]
        if weights is not None and shapes != [(self.num_nets, d, d)] * DEPTH:
            raise ValueError(f"weights must be {DEPTH} tensors {(self.num_nets, d, d)}; got {shapes}")
        check_finite(features=features, **{f"weights[{layer}]": w for layer, w in enumerate(weights or [])})
        labels = support.expand(t, -1).to(features.device) if isinstance(support, Tensor) else None
        if self.support_weight and labels is None:
            raise ValueError(f"support_weight = {self.support_weight} needs labels: pass support=labels (T, S)")
        count = m if support is None else support if labels is None else labels.shape[1]
        if not 0 < count <= m - (support is not None):
            raise ValueError(f"{count} support rows do not fit an episode of {m} points: pass 1 to {m - 1}")
        return labels

    def _adapt_chunk(self, features: Tensor, labels: Tensor, seeds: list[int], weights: list[Tensor] | None) -> Adapted:
        """`adapt` for a chunk of prepared episodes, one seed for every net of every episode."""
        run = Run(features, labels, seeds, weights, self.lr)
        outputs, updates = torch.empty_like(run.points), torch.empty_like(run.index)
        run.dimension = self._dimension(run)
        while len(run.index):
            inputs = drop_out(run.points, self.dropout, run.streams, out=run.inputs)
            run.nets.update(inputs, run.target, run.labels, self.support_weight)
            stopped = self._stopped(run)
            if len(stopped):
                everything = len(stopped) == len(run.index)
                output = run.nets.forward(run.points[stopped], nets=slice(None) if everything else stopped)
                outputs[run.index[stopped]] = prepare(output) if self.center else unit(output)
                updates[run.index[stopped]] = run.nets.updates
                run.drop(stopped)
        outputs, updates = (t.unflatten(0, (len(features), self.num_nets)) for t in (outputs, updates))
        return Adapted(outputs[..., : features.shape[-1]].mean(1), updates)

    def _stopped(self, run: Run) -> Tensor:
        """Which of the running networks have trained enough, as indices: the one moment at which the host waits."""
        if run.nets.updates == self.max_updates:
            return torch.arange(len(run.index), device=run.index.device)
        if run.nets.updates % self.period:
            return run.index[:0]
        before, run.dimension = run.dimension, self._dimension(run)
        return (run.dimension > before).nonzero().squeeze(1)

    def _dimension(self, run: Run) -> Tensor:
        """Mean local intrinsic dimensionality (N,) of what the second layer makes of the points."""
        hidden = run.nets.forward(run.points, stop=DEPTH // 2)
        return local_intrinsic_dimensionality(hidden, min(self.neighbours, hidden.shape[1])).mean(-1)
