"""DTEM: learned token merging (arXiv 2412.10569), on top of bipartite soft matching (ToMe, arXiv 2210.09461)."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from timm_tokens import blocks, keys
from timm_tokens.ops import bipartite_match, merge, schedule, size_bias
from timm_tokens.ops.attention import LearnableBias, aligned
from timm_tokens.ops.matching import Matching, mergeable, take
from timm_tokens.ops.ranges import check_choices
from timm_tokens.ops.relaxed import RelaxedMatching, relaxed_apply, relaxed_match, relaxed_unmerge
from timm_tokens.timm_types import Block, ViT


class Merged(NamedTuple):
    """Tokens after a merge: x (B, N, C), size (B, N) or None for 1, how many are active, and what was merged."""

    x: Tensor
    size: Tensor | None
    effective: int
    matching: Matching | RelaxedMatching


class TokenMerger(nn.Module):
    """Merges the most similar tokens between the attention and the MLP of each block.

    A small linear map per block, the embedding, says which tokens are alike. In evaluation the r best pairs are merged
    outright, so that every later layer has fewer tokens to compute. In training nothing is removed: tokens hand parts
    of themselves over (relaxed merging), which makes the task's own loss a loss for the embeddings. The embeddings
    start as the average over heads of the attention's keys, which is what training-free merging compares tokens by.

    Args:
        base: The timm ViT whose tokens are merged; only its shapes and its keys are read, it is not kept.
        metric: "learned" or "keys"; the latter merges outright in training too.

    The other arguments are those of `timm_tokens.apply_dtem_merging`; E is embed_dim.

    Raises:
        TypeError: If a number has the wrong type.
        ValueError: If a value is out of range.

    Source: DTEM (arXiv 2412.10569), section 3.
    """

    def __init__(
        self,
        base: ViT,
        r: int | Sequence[int] | tuple[int, float] = 8,
        *,
        embed_dim: int | None = None,
        metric: str = "learned",
        candidates: int = 3,
        tau1: float = 0.1,
        tau2: float = 0.1,
        prop_attn: bool = True,
    ) -> None:
        super().__init__()
        check_choices(("learned", "keys"), metric=metric)
        _check_positive(int, candidates=candidates, **({} if embed_dim is None else {"embed_dim": embed_dim}))
        _check_positive(float, tau1=tau1, tau2=tau2)
        self.depth = len(base.blocks)
        self.metric, self.candidates, self.tau1, self.tau2, self.prop_attn = metric, candidates, tau1, tau2, prop_attn
        head_dim = base.blocks[0].attn.head_dim
        self.embed_dim = embed_dim or head_dim * (2 if base.embed_dim >= 1024 else 1)
        # what watches features by forward hooks sees block i's tokens here, un-merged; called only if someone watches
        self.unmerged = nn.ModuleList(nn.Identity() for _ in base.blocks)
        self.embed: Any = None
        if metric == "learned":
            options = blocks.placement(base)
            layers = (nn.Linear(base.embed_dim, self.embed_dim, device=options["device"]) for _ in base.blocks)
            self.embed = nn.ModuleList(layers)
            self.reset_parameters(base)
            self.to(**options)
        self.r = r

    @torch.no_grad()
    def reset_parameters(self, base: ViT) -> None:
        """Start the embeddings as the keys of the base's attention, averaged over as many groups of heads as fit."""
        unit = torch.eye(base.embed_dim, **blocks.placement(base))
        for embed, block in zip(self.embed or (), base.blocks, strict=False):
            start = keys.mean_projection(block.attn, unit, self.embed_dim)
            if start is None:  # no whole number of heads: a random start
                embed.reset_parameters()
                continue
            embed.weight.copy_(start[0])
            embed.bias.copy_(start[1])

    @property
    def r(self) -> int | Sequence[int] | tuple[int, float]:
        """Tokens to merge in each block. Can be set at any time: one trained merger serves every r."""
        return self._r

    @r.setter
    def r(self, r: int | Sequence[int] | tuple[int, float]) -> None:
        self.schedule = schedule(r, self.depth)
        self._r: int | Sequence[int] = r if isinstance(r, int) else tuple(cast(Sequence[int], r))

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this merger again, as plain data."""
        names = ("embed_dim", "metric", "candidates", "tau1", "tau2", "prop_attn")
        r = self.r if isinstance(self.r, int) else list(self.r)
        return {"r": r} | {name: getattr(self, name) for name in names}

    def count(self, index: int, effective: int, num_prefix_tokens: int) -> int:
        """How many tokens block `index` merges away of so many."""
        return mergeable(self.schedule[index], effective, num_prefix_tokens)

    def truncate(self, depth: int) -> None:
        """Keep the first `depth` blocks only."""
        self.schedule, self.depth, self.unmerged = self.schedule[:depth], depth, self.unmerged[:depth]
        if self.embed is not None:
            self.embed = self.embed[:depth]

    def choose(
        self,
        index: int,
        block: Block,
        y: Tensor,
        r: int,
        effective: int,
        num_prefix_tokens: int,
        numbers: Tensor | None = None,
    ) -> Matching | Tensor:
        """What block `index` merges: pairs of tokens, or (relaxed) which part of each goes to which.

        Args:
            y: (B, N, C) what the block's attention reads.
            r: How many tokens to merge away, from `count`.
            effective: Number of active tokens: N, or less after relaxed merges.
            num_prefix_tokens: Leading tokens that don't merge.
            numbers: As in `timm_tokens.ops.bipartite_match`.
        """
        if not self.relaxed:
            return bipartite_match(self.compared_by(index, block, y), r, num_prefix_tokens, numbers)
        y = y.detach()  # the embedding learns from the task but never changes what the trunk learns
        options: dict[str, Any] = dict(tau1=self.tau1, tau2=self.tau2, candidates=self.candidates)
        metric = self.compared_by(index, block, y)
        return relaxed_match(metric, r, effective, num_prefix_tokens=num_prefix_tokens, **options)

    def forward(
        self, choice: Matching | Tensor, x: Tensor, size: Tensor | None, r: int, effective: int, num_prefix_tokens: int
    ) -> Merged:
        """Merge, in the middle of a block, what was chosen.

        Args:
            choice: From `choose`, which took the same r, effective and num_prefix_tokens.
            x: (B, N, C) tokens after the block's attention.
            size: (B, N) float32 sizes, None while all are 1.
        """
        if isinstance(choice, Matching):
            return Merged(*merge(choice, x, size), effective - r, choice)
        size = torch.ones(x.shape[:2], device=x.device) if size is None else size
        x, size, matching = relaxed_apply(choice, x, size, effective, num_prefix_tokens)
        return Merged(x, size, effective - r, matching)

    def bias(self, size: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention scores so that tokens of these sizes (B, N) count as often as they should."""
        if not self.prop_attn:
            return None
        if not self.relaxed:
            return aligned(size_bias(size, eps=0), dtype)
        bias = size_bias(size).to(dtype)
        fused = bias.requires_grad and bias.device.type == "cpu" and not torch.compiler.is_compiling()
        return bias.as_subclass(LearnableBias) if fused else bias

    @property
    def watched(self) -> bool:
        """Whether any of `unmerged` has a forward hook."""
        return any(place._forward_hooks for place in self.unmerged)

    @property
    def relaxed(self) -> bool:
        """Whether tokens hand over parts of themselves instead of being merged outright."""
        return self.training and self.metric == "learned"

    def compared_by(self, index: int, block: Block, y: Tensor) -> Tensor:
        """What the tokens of block `index` are compared by: (B, N, E), given y (B, N, C) that its attention reads."""
        embed = self.embed
        # an attribute takes half the time that ModuleList takes to find an index
        metric: Tensor = keys.mean_keys(block.attn, y) if embed is None else getattr(embed, str(index))(y)
        return metric


def groups(trace: Sequence[Any]) -> Tensor:
    """The output token (B, N) int64 that holds each input token after all `Matching`s of the trace."""
    position: Tensor = trace[0].position()
    for matching in trace[1:]:
        position = matching.position().gather(1, position)
    return position


def unmerge_all(trace: Sequence[Any], x: Tensor) -> Tensor:
    """Undo the merges of the trace, all outright or all relaxed: every input token gets its group's token,
    (B, N - R, C) -> (B, N, C)."""
    if trace and isinstance(trace[0], Matching):
        return take(x, groups(trace))
    for matching in reversed(trace):
        x = relaxed_unmerge(matching, x)
    return x


def _check_positive(kind: type, **numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise TypeError(f"{name} must be {'an int' if kind is int else 'a number'}, got {value!r}")
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value}")
