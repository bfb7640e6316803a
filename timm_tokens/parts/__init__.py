"""The parts that a TokenViT can have: one file a part."""

from timm_tokens.parts.merger import TokenMerger

__all__ = ["TokenMerger"]
