"""Token labeling's head: a classifier for every patch token (Jiang et al., NeurIPS 2021, arXiv 2104.10858)."""

import math
from typing import Any, NamedTuple

from timm.layers import trunc_normal_
from torch import Tensor, nn

from timm_tokens.ops.ranges import check_ints


class DenseLogits(NamedTuple):
    """Logits of an image and of its patches, row by row: what `TokenLabelLoss` takes.

    Attributes:
        cls: (B, K) of the class token, or of the pooled features of a model without one.
        tokens: (B, N, K) of the patches.
    """

    cls: Tensor
    tokens: Tensor


class TokenLabelHead(nn.Module):
    """Classifies every patch token, and adds the strongest to the class token's logits.

        logits = cls + pool_weight * max over tokens of (W token + b)

    `cls` is what the base's own classifier says; if that has another number of classes than asked for, the head brings
    a classifier of its own, and the base stays as it is.

    Args:
        embed_dim: C, dimension of the tokens.
        own_classifier: None, or the dimension of the base's pooled features, to classify them here.

    The other arguments are those of `timm_tokens.token_label_head`.

    Raises:
        TypeError, ValueError: If a value has the wrong type or is out of range.

    Source: token labeling (arXiv 2104.10858), section 3; inference as in the paper's code.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        own_classifier: int | None = None,
        pool: str = "max",
        pool_weight: float = 0.5,
    ) -> None:
        super().__init__()
        check_ints(num_classes=num_classes)
        if pool not in ("max", "avg"):
            raise ValueError(f"pool must be 'max' or 'avg', got {pool!r}")
        if isinstance(pool_weight, bool) or not isinstance(pool_weight, (int, float)):
            raise TypeError(f"pool_weight must be a number, got {pool_weight!r}")
        if not math.isfinite(pool_weight):
            raise ValueError(f"pool_weight must be finite, got {pool_weight}")
        self.num_classes, self.pool, self.pool_weight = num_classes, pool, pool_weight
        self.tokens = nn.Linear(embed_dim, num_classes)
        self.cls = None if own_classifier is None else nn.Linear(own_classifier, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights."""
        for layer in (self.tokens,) if self.cls is None else (self.tokens, self.cls):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `token_label_head` that build this part again, as plain data."""
        return {name: getattr(self, name) for name in ("num_classes", "pool", "pool_weight")}

    def resized(self, num_classes: int) -> "TokenLabelHead":
        """A new head for another number of classes, beside a base whose classifier has as many."""
        head = TokenLabelHead(self.tokens.in_features, **self.config | {"num_classes": num_classes})
        return head.train(self.training)

    def forward(self, cls: Tensor, patches: Tensor, size: Tensor | None = None) -> Tensor:
        """Logits (B, K) from the class token's (B, K) and patch tokens (B, N, C), which may stand for several patches.

        Args:
            size: (B, N), how many patches each token stands for; None: one each.
        """
        logits = self.tokens(patches)
        if self.pool == "max":
            return cls + self.pool_weight * logits.amax(dim=1)
        if size is None:
            return cls + self.pool_weight * logits.mean(dim=1)
        share = (size / size.sum(dim=1, keepdim=True)).unsqueeze(2).to(logits.dtype)
        return cls + self.pool_weight * (logits * share).sum(dim=1)
