"""The token labeling loss, from sparse targets without ever building them densely.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., NeurIPS 2021,
https://arxiv.org/abs/2104.10858, Eq. 3
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tokens.ops import SparseLabels, mix_ratio, sparse_cross_entropy
from timm_tokens.ops.ranges import check_not_negative


class DenseOutput(Protocol):
    """Logits of an image and of its patches: `cls` (B, K) and `tokens` (B, N, K)."""

    cls: Tensor
    tokens: Tensor


class TokenLabelLoss(nn.Module):
    """L = cls_weight * CE(cls, target) + dense_weight * mean over tokens of CE(token, its target).

    Cross entropies are means over the batch and computed in float32, under autocast too. The target is one of

    * `SparseLabels`, as `crop_token_labels` and `warp_token_labels` make them: exact, and by far the fastest;
    * (B, K, 1 + N) probabilities, the class token's first;
    * classes (B,) or probabilities (B, K) of the image, which every token then gets too.

    Args:
        dense_weight: Weight of the tokens' term.
        cls_weight: Weight of the class token's term.
        ground_truth: Mix the class token's label t with the true label y: rho t + (1 - rho) y, where rho = 0.5 if the
            top class of t is the true one and 0.9 if not. Image targets are the truth already and are not mixed.
        smoothing: s of label smoothing. Truth and image targets become (1 - s) y + s / K; token labels, as in the
            paper's code, (1 - s + s / K) t + s / K, which sums to 1 + s / K.

    Raises:
        ValueError: Smoothing is outside [0, 1).
    """

    def __init__(
        self, dense_weight: float = 0.5, cls_weight: float = 1.0, ground_truth: bool = False, smoothing: float = 0.0
    ):
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        check_not_negative(dense_weight=dense_weight, cls_weight=cls_weight)
        self.dense_weight, self.cls_weight = dense_weight, cls_weight
        self.ground_truth, self.smoothing = ground_truth, smoothing

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={getattr(self, k)}" for k in ("dense_weight", "cls_weight", "ground_truth", "smoothing"))

    def forward(
        self,
        logits: DenseOutput,
        target: SparseLabels | Tensor,
        labels: Tensor | None = None,
        box: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """
        Args:
            logits: An object with `cls` (B, K) and `tokens` (B, N, K), the tokens' each in the place of its own image.
            target: See the class.
            labels: The true classes (B,) or their probabilities (B, K); read with `ground_truth` alone.
            box: Top, left, bottom, right of MixToken on the patch grid. The class token's target is then mixed with
                that of the flipped batch by the box's area; the tokens' targets are not.

        Returns:
            A scalar.

        Raises:
            ValueError: Shapes that do not fit, or `labels` missing though `ground_truth` is set.
        """
        _check(logits, target)
        smoothing, num_classes = self.smoothing, logits.cls.shape[1]
        if isinstance(target, Tensor) and target.ndim < 3:  # one for the whole image
            cls = _probabilities(target, num_classes, smoothing)
            tokens = -(cls * logits.tokens.log_softmax(-1, dtype=torch.float32).mean(1)).sum(-1).mean()
        else:
            off = smoothing / num_classes
            on = 1 - smoothing + off
            cls = (target.cls if isinstance(target, SparseLabels) else target[:, :, 0].float()) * on + off
            tokens = _token_cross_entropy(logits.tokens, target, on, off)
            if self.ground_truth:
                cls = _mix_truth(cls, _probabilities(_require(labels, len(cls)), num_classes, smoothing))
        if box is not None:
            lam = mix_ratio(box, logits.tokens.shape[1])
            cls = lam * cls + (1 - lam) * cls.flip(0)
        return self.cls_weight * F.cross_entropy(logits.cls.float(), cls) + self.dense_weight * tokens


def _token_cross_entropy(logits: Tensor, target: SparseLabels | Tensor, on: float, off: float) -> Tensor:
    if isinstance(target, SparseLabels):
        return sparse_cross_entropy(logits, target.classes, target.excess * on, target.background * on + off).mean()
    # (B, N, K) -> (B, K, N), where cross_entropy expects the classes
    return F.cross_entropy(logits.float().transpose(1, 2), target[:, :, 1:].float() * on + off)


def _mix_truth(cls: Tensor, truth: Tensor) -> Tensor:
    # The paper's code and its comment disagree on which ratio is which; this is what the code did.
    agree = cls.argmax(-1, keepdim=True) == truth.argmax(-1, keepdim=True)
    rho = 0.9 - 0.4 * agree.to(cls.dtype)
    return rho * cls + (1 - rho) * truth


def _probabilities(target: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Classes (B,) or probabilities (B, K) -> smoothed probabilities (B, K) float32."""
    if target.ndim == 1:
        target = F.one_hot(target, num_classes)
    return target.float() * (1 - smoothing) + smoothing / num_classes


def _require(labels: Tensor | None, batch: int) -> Tensor:
    if labels is None:
        raise ValueError("ground_truth=True needs the true labels: pass labels=(B,) classes or (B, K) probabilities")
    if len(labels) != batch:
        raise ValueError(f"labels must have one row per image, {batch}, got {tuple(labels.shape)}")
    return labels


def _check(logits: DenseOutput, target: SparseLabels | Tensor) -> None:
    B, N, K = logits.tokens.shape
    if logits.cls.shape != (B, K):
        raise ValueError(f"logits.cls must be (B, K) = {(B, K)} as logits.tokens, got {tuple(logits.cls.shape)}")
    if isinstance(target, SparseLabels):
        got = (*target.background.shape, target.cls.shape[1])
        if got != (B, N, K):
            raise ValueError(f"the logits are for (B, N, K) = {(B, N, K)}, the sparse target for {got}")
    elif target.shape not in {(B,), (B, K), (B, K, 1 + N)}:
        raise ValueError(
            f"target must be SparseLabels, ({B},), {(B, K)} or (B, K, 1 + N) = {(B, K, 1 + N)}, "
            f"got {tuple(target.shape)}"
        )
    elif target.ndim == 1 and target.dtype != torch.int64:
        raise ValueError(f"classes (B,) must be int64, got {target.dtype}: convert them with .long()")
