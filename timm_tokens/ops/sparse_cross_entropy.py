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

    CE = - sum over slots of excess * log q[class] - background * sum over k of log q_k,  q = softmax(z)

    with gradient (sum of p) q - p. Nothing of the size of the logits is kept or written but the gradient:
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
    losses: Tensor = _SparseCrossEntropy.apply(*rows)
    return losses.view(background.shape)


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, excess: Tensor, background: Tensor) -> Tensor:
        ctx.save_for_backward(logits, classes, excess, background)
        parts = [_log_probabilities(*part) for part in _parts(logits, classes)]
        chosen, total = (torch.cat(x) for x in zip(*parts, strict=True))
        return -(excess * chosen).sum(1) - background * total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, classes, excess, background = ctx.saved_tensors
        mass = logits.shape[1] * background + excess.sum(1)  # 1, or a little more with smoothing
        scale, shift = (grad * mass)[:, None], -(grad * background)[:, None]
        out, excess = torch.empty_like(logits), -grad[:, None] * excess
        for target, z, c, *rest in _parts(out, logits, classes, excess, scale, shift):
            exact = target if out.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
            _write_gradient(exact, z, c, *rest)
            if exact is not target:
                target.copy_(exact)
        return out, None, None, None


def _parts(*tensors: Tensor) -> Any:
    rows = rows_at_once(tensors[0].shape[1], tensors[0].device)
    return zip(*(torch.split(x, rows) for x in tensors), strict=True)


def _log_probabilities(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the slots (M, S), and the sum over all classes (M,). A function, so that all of them go when it ends."""
    log_p = logits.log_softmax(1, dtype=torch.float32)
    return log_p.gather(1, classes), log_p.sum(1)


def _write_gradient(out: Tensor, logits: Tensor, classes: Tensor, excess: Tensor, scale: Tensor, shift: Tensor) -> None:
    torch.softmax(logits, 1, dtype=torch.float32, out=out)
    torch.addcmul(shift, out, scale, out=out).scatter_add_(1, classes, excess)
