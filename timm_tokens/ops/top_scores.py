"""From an annotator's scores to a label map: the best classes of each cell, and what is left to all the others.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., NeurIPS 2021,
https://arxiv.org/abs/2104.10858, Sec. 3.1
"""

import math

import torch
from torch import Tensor

# How much more of a cell's probability the classes that are not kept may get than the annotator gives them.
_TOLERANCE = 0.1


def top_scores(scores: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The best classes of each cell, with scores for a softmax in which each class that is not kept scores 0.

    Published label maps hold the annotator's scores as they are. That suits models trained by softmax cross entropy,
    whose scores are around 0. Nearly all scores of models trained by binary cross entropy are far below 0, and the many
    classes that score 0 would then get all the probability. A softmax does not change when a constant is added to all
    scores of a cell. So where scoring 0 would give the classes that are not kept over 0.1 more probability than the
    annotator does, the mean of their scores (the logarithm of the mean of the exponentials) is taken off: the cell then
    has exactly the annotator's own probabilities. Elsewhere the scores are the annotator's, unchanged.

    Args:
        scores: (..., K) before the softmax, any floating dtype.
        top: Classes to keep per cell, from 1 to K.

    Returns:
        Scores (..., top) float32, the best first, and their classes (..., top) int64.
    """
    scores = scores.float()
    values, indices = scores.topk(top, dim=-1)
    others = scores.shape[-1] - top
    if not others:
        return values, indices
    total = scores.scatter(-1, indices, -torch.inf).logsumexp(-1)
    given = torch.sigmoid(total - values.logsumexp(-1))
    unfair = others_share(values, scores.shape[-1]) - given > _TOLERANCE
    return values - torch.where(unfair, total - math.log(others), 0)[..., None], indices


def others_share(values: Tensor, num_classes: int) -> Tensor:
    """The probability that classes which a cell does not keep have together: (..., top) scores -> (...) in [0, 1]."""
    others = num_classes - values.shape[-1]
    if not others:
        return values.new_zeros(values.shape[:-1])
    return torch.sigmoid(math.log(others) - values.float().logsumexp(-1))
