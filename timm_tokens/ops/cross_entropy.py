"""Cross entropy towards soft targets over very many classes: the prototypes of self-supervised losses."""

from typing import Any

import torch
from torch import Tensor

from timm_tokens.ops.ranges import check_positive


def soft_cross_entropy(logits: Tensor, target: Tensor, tau: float = 1.0) -> Tensor:
    """-sum_k target_k log softmax(logits / tau)_k, in float32, one value per token.

    Being linear in the target, it takes the sum of several targets as well as one: H(sum_i P_i, S) = sum_i H(P_i, S),
    and the mean in the same way. With K = 65536 memory traffic is what it costs, so it has a backward of its own, which
    writes no (B, T, K) temporary but the gradient itself, and targets shared by the tokens are not repeated.

    Args:
        logits: (B, T, K), for T tokens of each of B samples; the only ones with a gradient.
        target: (B, T, K), or (B, 1, K) for all tokens of a sample. Its rows need not sum to 1.
        tau: Temperature of the logits.

    Returns:
        (B, T) float32.

    Raises:
        ValueError: If shapes do not fit, or tau is not positive.
    """
    check_positive(tau=tau)
    batch, tokens, classes = logits.shape if logits.ndim == 3 else (None, None, None)
    if target.shape not in [(batch, 1, classes), (batch, tokens, classes)]:
        raise ValueError(
            "logits must be (B, T, K), and target (B, T, K) or (B, 1, K), "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    losses: Tensor = _SoftCrossEntropy.apply(logits, target.detach(), tau)
    return losses


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, tau: float) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            target = target.float()
            log_p = (logits.float() / tau).log_softmax(-1)
            shared = target.shape[1] == 1
            loss = (log_p @ target.mT).squeeze(-1) if shared else (log_p * target).sum(-1)  # (B, T)
        ctx.save_for_backward(log_p, target)
        ctx.tau, ctx.dtype = tau, logits.dtype
        return -loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        log_p, target = ctx.saved_tensors
        grad = grad.unsqueeze(-1) / ctx.tau
        mass = target.sum(-1, keepdim=True)  # 1 for probabilities
        return log_p.exp().mul_(mass * grad).addcmul_(target, grad, value=-1).to(ctx.dtype), None, None
