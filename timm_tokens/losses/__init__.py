"""Losses, one file each."""

from timm_tokens.losses.token_label import TokenLabelLoss

__all__ = ["TokenLabelLoss"]
