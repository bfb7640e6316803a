"""How much a model's outputs differ from those of a teacher: for training without labels, and for calibration.

Shapes: B images, N tokens, K classes, C channels.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_tokens.ops.precision import at_least_float32


def logit_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) in nats of the classes' probabilities, (..., K) -> (...), in float32 or better."""
    student, teacher = (at_least_float32(x).log_softmax(dim=-1) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of features, (..., C) -> (...) in [0, 2], in float32 or better."""
    return 1 - F.cosine_similarity(at_least_float32(student), at_least_float32(teacher), dim=-1)


class DistillLoss(nn.Module):
    """The divergence of a student's logits or features from its teacher's; 0 where they agree.

    loss = DistillLoss()(model(images), teacher(images))  # logits
    loss = DistillLoss()((cls, patches), (teacher_cls, teacher_patches))  # features, each kind counting the same
    """

    def forward(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """The mean over the batch, a scalar; see `per_image`."""
        return self.per_image(student, teacher).mean()

    def per_image(self, student: Tensor | Sequence[Tensor], teacher: Tensor | Sequence[Tensor]) -> Tensor:
        """The divergence of each image, (B,).

        Args:
            student: Logits (B, K) or (B, N, K); or features, a sequence of tensors (B, C) or (B, N, C).
            teacher: The same of the teacher.

        Returns:
            For logits KL(teacher || student), for features 1 - cosine, averaged over the kinds; over tokens, too.
        """
        if isinstance(student, Tensor) and isinstance(teacher, Tensor):
            return _per_image(logit_divergence(student, teacher))
        kinds = [_per_image(feature_distance(x, y)) for x, y in zip(student, teacher, strict=True)]
        return reduce(torch.add, kinds) / len(kinds)


def _per_image(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1) if x.ndim > 1 else x
