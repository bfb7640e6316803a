"""The parts that a TokenViT can have, one file each."""

from timm_tokens.parts.aux_tokens import AdaptivePool, AuxTokens
from timm_tokens.parts.label_head import DenseLogits, TokenLabelHead
from timm_tokens.parts.merger import TokenMerger

__all__ = ["AdaptivePool", "AuxTokens", "DenseLogits", "TokenLabelHead", "TokenMerger"]
