"""What merging costs and brings: accuracy, fidelity and speed of a model by the number of merged tokens.

Shapes: B images, N patches, C channels, K classes.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens import features
from timm_tokens.classification import class_logits
from timm_tokens.driver import encode
from timm_tokens.flops import Costs, schedule_of
from timm_tokens.merger_file import merger_of
from timm_tokens.outputs import classifies
from timm_tokens.parts import TokenMerger
from timm_tokens.tables import markdown
from timm_tokens.vit import TokenViT


class Tradeoff(NamedTuple):
    """A model that merges in one way, compared with itself without merging.

    Attributes:
        merging: "none", "learned" or "keys".
        r: The tokens that each block merges: a number, or several written with spaces.
        tokens: The tokens that are left after the last block, prefix included.
        gflops: Multiply-adds for one image, in units of 10^9.
        images_per_second: Throughput of the forward pass alone.
        accuracy: Percentage of images whose top class is right; None without labels.
        agreement: Percentage of images whose top class is that without merging; None for a model without classes.
        cls_cosine: Mean cosine of the class token with that without merging, or of the pooled features.
        patch_cosine: The same of the patches, un-merged.
    """

    merging: str
    r: str
    tokens: int
    gflops: float
    images_per_second: float
    accuracy: float | None
    agreement: float | None
    cls_cosine: float
    patch_cosine: float


@torch.inference_mode()
def tradeoff(
    model: TokenViT, batches: Iterable[Any], r: Sequence[Any] = (8, 12, 16), *, labelled: bool = False
) -> list[Tradeoff]:
    """Measure a model without merging, as it merges, and, where it merges by learned embeddings, by keys beside it.

        rows = tradeoff(model, loader, r=(8, 12, 16, model.merger.r))

    All of them see each batch in turn, so that a machine that is slower for a while is slower for all.

    Args:
        model: A TokenViT with a merger. It is measured in evaluation mode, and left in it.
        batches: Pairs of images (B, 3, H, W) and classes (B,), or images alone.
        r: What the blocks merge: each item is anything that `merger.r` can be set to.
        labelled: Whether the classes are the model's, so that accuracy means something.

    Returns:
        A row without merging, and one for each r and way of merging.

    Raises:
        ValueError: If the model has no merger, or there are no images.
    """
    merger, was = merger_of(model.eval()), model.merger.r
    plain = TokenViT(model.base, head=model.head).eval()
    ways = [_Way("none", plain, 0)]
    for name, net in _mergers(model, merger).items():
        ways += [_Way(name, net, each) for each in r]
    device = next(model.parameters()).device
    try:
        for batch in batches:
            images, labels = batch if isinstance(batch, (tuple, list)) else (batch, None)
            _compare(ways, images.to(device), labels.to(device) if labelled else None)
    finally:
        merger.r = was
    if not ways[0].images:
        raise ValueError("there are no images to measure with")
    size = (images.shape[-2], images.shape[-1])
    costs = {net: net.costs(size) for net in {way.net for way in ways}}
    return [way.row(costs[way.net], size) for way in ways]


def _mergers(model: TokenViT, merger: TokenMerger) -> dict[str, TokenViT]:
    """The model by its way of merging, and with the keys' merger in the place of a learned one."""
    if merger.metric == "keys":
        return {"keys": model}
    keys = TokenMerger(model.base, metric="keys", prop_attn=merger.prop_attn)
    return {merger.metric: model, "keys": TokenViT(model.base, merger=keys, head=model.head).eval()}


@dataclass
class _Way:
    """A way to run the model, and sums over images."""

    name: str
    net: TokenViT
    r: Any
    images: int = 0
    seconds: float = 0.0
    correct: int | None = None
    agreeing: int | None = None
    cls_cosine: float = 0.0
    patch_cosine: float = 0.0

    def run(self, images: Tensor) -> tuple[Tensor, features.Tokens]:
        """Logits, or pooled features, and tokens; the time for the former counts."""
        if self.net.merger is not None:
            self.net.merger.r = self.r
        if not self.images:
            encode(self.net, images)  # to warm up
        _synchronize(images)
        start = time.perf_counter()
        stream, trace = encode(self.net, images)
        logits = class_logits(self.net, self.net.base.norm(stream.x), stream.size, trace)
        _synchronize(images)
        self.seconds += time.perf_counter() - start
        return logits, features.tokens_of(self.net, stream, trace)

    def row(self, costs: Costs, image_size: tuple[int, int]) -> Tradeoff:
        """What was measured."""

        def percent(count: int | None) -> float | None:
            return None if count is None else 100 * count / self.images

        r = self.r if isinstance(self.r, int) else " ".join(map(str, self.r))
        flops = costs.flops(schedule_of(self.net.merger, len(self.net.base.blocks), self.r))
        return Tradeoff(
            self.name, str(r), self.net.token_counts(self.r, image_size)[-1],
            flops / 1e9, self.images / self.seconds,
            percent(self.correct), percent(self.agreeing), self.cls_cosine / self.images,
            self.patch_cosine / self.images,
        )  # fmt: skip


def _compare(ways: Sequence[_Way], images: Tensor, labels: Tensor | None) -> None:
    """Run all on a batch, and add up how they compare with the first."""
    expected, plain = ways[0].run(images)
    for way in ways:
        logits, tokens = (expected, plain) if way is ways[0] else way.run(images)
        if classifies(way.net):
            top = logits.argmax(-1)
            way.agreeing = (way.agreeing or 0) + int((top == expected.argmax(-1)).sum())
            if labels is not None:
                way.correct = (way.correct or 0) + int((top == labels).sum())
        way.cls_cosine += float(_cosine(tokens.cls, plain.cls).sum())
        way.patch_cosine += float(_cosine(tokens.patches, plain.patches).mean(1).sum())
        way.images += len(images)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)


def table(rows: Sequence[Tradeoff]) -> str:
    """The rows as a Markdown table, without the columns that none of them has."""
    names = ("merging", "r", "tokens", "GFLOPs", "images/s", "accuracy %", "same top class %", "cosine of class token",
             "cosine of patches")  # fmt: skip
    kinds = ("", "", "", ".2f", ".1f", ".1f", ".1f", ".4f", ".4f")
    columns = [i for i in range(len(names)) if any(row[i] is not None for row in rows)]
    cells = [[row[i] for i in columns] for row in rows]
    return markdown([names[i] for i in columns], cells, [kinds[i] for i in columns])
