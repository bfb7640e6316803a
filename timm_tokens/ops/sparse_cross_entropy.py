"""Cross entropy with targets of which few classes stand out from all the others: those of token labeling.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., NeurIPS 2021,
https://arxiv.org/abs/2104.10858, Eq. 3
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from timm_tokens.ops.chunking import rows_at_once


def sparse_cross_entropy(logits: Tensor, classes: Tensor, excess: Tensor, background: Tensor) -> Tensor:
    """Cross entropy with targets p(k) = background + sum of `excess` where `classes` is k, exact and in float32.

    CE = (sum of p) logsumexp(z) - sum over slots of excess * z[class] - background * sum over k of z_k

    with gradient (sum of p) softmax(z) - p. Nothing of the size of the logits is kept or written but the gradient:
    both passes go through them in parts that stay in the cache.

    Args:
        logits: (B, N, K), any floating dtype; the gradient has the same.
        classes: (B, N, S) int64.
        excess: (B, N, S).
        background: (B, N).

    Returns:
        (B, N) float32, in nats. Not differentiable twice, nor with respect to the targets.
    """
    rows = logits.flatten(0, 1), classes.flatten(0, 1), excess.flatten(0, 1).float(), background.flatten().float()
    return _SparseCrossEntropy.apply(*rows).view(background.shape)


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, excess: Tensor, background: Tensor) -> Tensor:
        ctx.save_for_backward(logits, classes, excess, background)
        return torch.cat([_forward(*part) for part in _parts(logits, classes, excess, background)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits = ctx.saved_tensors[0]
        out = torch.empty_like(logits)
        for target, *part in _parts(out, *ctx.saved_tensors, grad):
            target.copy_(_gradient(*part))
        return out, None, None, None


def _parts(*tensors: Tensor) -> Any:
    rows = rows_at_once(tensors[0].shape[1], tensors[0].device)
    return zip(*(x.split(rows) for x in tensors), strict=True)


def _mass(logits: Tensor, excess: Tensor, background: Tensor) -> Tensor:
    return logits.shape[1] * background + excess.sum(1)  # 1, or a little more with smoothing


def _forward(logits: Tensor, classes: Tensor, excess: Tensor, background: Tensor) -> Tensor:
    z = logits.float()
    # The largest log-probability is at most log K below 0, so that the difference loses nothing to large logits.
    lse = z.amax(1) - z.log_softmax(1).amax(1)
    chosen = (excess * z.gather(1, classes)).sum(1)
    return _mass(z, excess, background) * lse - chosen - background * z.sum(1)


def _gradient(logits: Tensor, classes: Tensor, excess: Tensor, background: Tensor, grad: Tensor) -> Tensor:
    p = logits.softmax(1, dtype=torch.float32)
    p.mul_((grad * _mass(p, excess, background))[:, None]).sub_((grad * background)[:, None])
    return p.scatter_add_(1, classes, -grad[:, None] * excess)
