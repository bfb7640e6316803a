"""Targets of token labeling, for an augmented view, from the sparse label map of its image.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., NeurIPS 2021,
https://arxiv.org/abs/2104.10858
"""

from typing import NamedTuple

import torch
from torch import Tensor

from timm_tokens.ops.chunking import rows_at_once
from timm_tokens.ops.label_windows import Windows, crop_windows, warp_windows


class SparseLabels(NamedTuple):
    """Class probabilities for an image and for each of its patches, in memory that does not grow with N * K.

    A patch's annotator kept few classes; all the others scored zero and so share one probability after the softmax:
    p(patch, k) = background(patch) + sum of `excess` over the slots s with classes(patch, s) = k.

    Attributes:
        cls: (B, K) float32, probabilities for the class token.
        classes: (B, N, S) int64, the classes that stand out; where a class has several slots, one has all its excess.
        excess: (B, N, S) float32, probability above the background.
        background: (B, N) float32, the probability that every class has at least.
    """

    cls: Tensor
    classes: Tensor
    excess: Tensor
    background: Tensor

    def dense(self) -> Tensor:
        """All probabilities as (B, K, 1 + N), the class token first."""
        shape = (*self.background.shape, self.cls.shape[1])  # (B, N, K)
        tokens = self.background[..., None].expand(shape).scatter_add(2, self.classes, self.excess)
        return torch.cat([self.cls[:, None], tokens], 1).transpose(1, 2)


def crop_token_labels(
    values: Tensor,
    indices: Tensor,
    boxes: Tensor,
    num_classes: int,
    size: int | tuple[int, int],
    *,
    flip: Tensor | None = None,
    dense: bool = False,
) -> SparseLabels | Tensor:
    """Targets of a crop: softmax of RoIAlign of the label map, without building (B, K, H, W) (Sec. 3.1).

    RoIAlign is torchvision's with `aligned=False`, adaptive sampling and box coordinates times the grid size minus 0.5.
    Classes that a cell does not list score 0 there.

    Args:
        values: (B, top, H, W) finite scores before the softmax, of any floating dtype and any size.
        indices: (B, top, H, W) integer classes of the scores in [0, K), distinct within a cell.
        boxes: (B, 4) top, left, height, width as fractions of the image, inside the image.
        num_classes: K.
        size: Patch tokens per side, or (rows, columns).
        flip: (B,) bool, which crops were mirrored left to right after the crop.
        dense: Return probabilities (B, K, 1 + N) in place of the sparse form.

    Returns:
        `SparseLabels`, or with `dense` the probabilities (B, K, 1 + N): the class token's, then the patches' in rows.

    Raises:
        ValueError: a shape, dtype or size does not fit.
    """
    size = _check(values, indices, num_classes, size)
    if boxes.shape != (len(values), 4):
        raise ValueError(f"boxes must be (B, 4) with B = {len(values)}, one per label map, got {tuple(boxes.shape)}")
    if flip is not None and (flip.shape != (len(values),) or flip.dtype != torch.bool):
        raise ValueError(f"flip must be bool of shape ({len(values)},), got {flip.dtype} {tuple(flip.shape)}")
    grid = values.shape[-2], values.shape[-1]
    whole, patches = crop_windows(boxes, None, grid, (1, 1)), crop_windows(boxes, flip, grid, size)
    labels = _sparse_labels(values, indices, whole, patches, num_classes)
    return labels.dense() if dense else labels


def warp_token_labels(
    values: Tensor,
    indices: Tensor,
    maps: Tensor,
    num_classes: int,
    size: int | tuple[int, int],
    *,
    dense: bool = False,
) -> SparseLabels | Tensor:
    """Targets of a view that is any affine map of the image; for crops and flips equal to `crop_token_labels`.

    What the view shows from outside the image (the corners of a rotation) scores 0: all classes are equally likely.

    Args:
        values: (B, top, H, W) finite scores before the softmax, of any floating dtype and any size.
        indices: (B, top, H, W) integer classes of the scores in [0, K), distinct within a cell.
        maps: (B, 3, 3), from (row, column, 1) in the view to the same in the image; rows and columns as fractions, from
            0 at the top left corner to 1. Compose them with `@`; `crop_maps` makes those of crops and flips.
        num_classes: K.
        size: Patch tokens per side, or (rows, columns).
        dense: Return probabilities (B, K, 1 + N) in place of the sparse form.

    Returns:
        As `crop_token_labels`.

    Raises:
        ValueError: a shape, dtype or size does not fit.
    """
    size = _check(values, indices, num_classes, size)
    if maps.shape != (len(values), 3, 3):
        raise ValueError(f"maps must be (B, 3, 3) with B = {len(values)}, one per label map, got {tuple(maps.shape)}")
    grid = values.shape[-2], values.shape[-1]
    whole, patches = warp_windows(maps, grid, (1, 1)), warp_windows(maps, grid, size)
    labels = _sparse_labels(values, indices, whole, patches, num_classes)
    return labels.dense() if dense else labels


def crop_maps(boxes: Tensor, flip: Tensor | None = None) -> Tensor:
    """Crops and left-right flips as affine maps for `warp_token_labels`.

    Args:
        boxes: (B, 4) top, left, height, width as fractions of the image.
        flip: (B,) bool, which crops were mirrored left to right.

    Returns:
        (B, 3, 3) maps from (row, column, 1) in the view to the same in the image.
    """
    top, left, height, width = boxes.float().unbind(-1)
    if flip is not None:
        left, width = torch.where(flip, left + width, left), torch.where(flip, -width, width)
    zero, one = torch.zeros_like(top), torch.ones_like(top)
    rows = [height, zero, top, zero, width, left, zero, zero, one]
    return torch.stack(rows, -1).view(*top.shape, 3, 3)


def _sparse_labels(values: Tensor, indices: Tensor, whole: Windows, patches: Windows, num_classes: int) -> SparseLabels:
    values = values.to(_exact_dtype(values))
    classes, scores = _scores(values, indices, whole)
    cls = scores.new_zeros(values.shape[0], num_classes).scatter_add_(1, classes[:, 0], scores[:, 0]).softmax(-1)
    classes, scores = _scores(values, indices, patches)
    excess, background = _softmax(*_sum_by_class(classes.flatten(0, 1), scores.flatten(0, 1), num_classes), num_classes)
    return SparseLabels(
        cls.float(), classes, excess.float().view_as(scores), background.float().view(classes.shape[:2])
    )


def _exact_dtype(values: Tensor) -> torch.dtype:
    """float32 holds sums of half-precision scores far more finely than these are spaced; others need float64."""
    wide = values.dtype in (torch.float32, torch.float64) and values.device.type != "mps"  # MPS has no float64
    return torch.float64 if wide else torch.float32


def _scores(values: Tensor, indices: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Classes and weighted scores (B, N, S) that each token collects; a class may come from several cells."""
    cells, weights = windows
    image = torch.arange(values.shape[0], device=values.device)[:, None, None]
    values, indices = (x.flatten(2).transpose(1, 2) for x in (values, indices))  # (B, top, H, W) -> (B, H * W, top)
    scores = values[image, cells] * weights[..., None]  # (B, N, cells, top)
    return indices[image, cells].flatten(2).long(), scores.flatten(2)


def _softmax(scores: Tensor, first: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Excess (M, S) and background (M, 1) of the softmax over K classes, each counted in its `first` slot or scoring 0.

    The largest score of any class is taken off before exp, and where every class has a slot no other class counts:
    then the scores may be as low or as high as they like. Overwrites scores.
    """
    others = num_classes - first.sum(-1, keepdim=True)
    largest = scores.amax(-1, keepdim=True)
    largest = torch.where(others > 0, largest.clamp(min=0), largest)
    floor = torch.where(others > 0, (-largest).exp(), 0)
    masses = scores.sub_(largest).exp_().mul_(first)
    total = masses.sum(-1, keepdim=True) + others * floor
    return masses.sub_(floor * first).div_(total), floor / total


def _sum_by_class(classes: Tensor, scores: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The sum of its class's scores for every slot (M, S), and which slot is the one to count its class in.

    They are added up on a board of few rows and all classes, which stays in the cache and is wiped slot by slot.
    """
    rows = rows_at_once(num_classes, scores.device)
    board = scores.new_zeros(min(rows, scores.shape[0]), num_classes)
    slots = torch.arange(scores.shape[1], dtype=scores.dtype, device=scores.device).expand_as(scores)
    sums, first = [], []
    for c, x, slot in zip(*(torch.split(t, rows) for t in (classes, scores, slots)), strict=True):
        part = board[: c.shape[0]]
        sums.append(part.scatter_add_(1, c, x).gather(1, c))
        first.append(part.scatter_(1, c, slot).gather(1, c) == slot)  # of the slots of a class, one was written last
        part.scatter_(1, c, 0.0)
    return torch.cat(sums), torch.cat(first)


def _check(values: Tensor, indices: Tensor, num_classes: int, size: int | tuple[int, int]) -> tuple[int, int]:
    if values.ndim != 4 or values.shape != indices.shape:
        raise ValueError(
            f"values and indices must both be (B, top, H, W), got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if indices.is_floating_point():
        raise ValueError(f"indices must be integers, got {indices.dtype}: convert them with .int()")
    rows, columns = (size, size) if isinstance(size, int) else size
    if min(rows, columns, num_classes) < 1:
        raise ValueError(f"size and num_classes must be at least 1, got {(rows, columns)} and {num_classes}")
    return rows, columns
