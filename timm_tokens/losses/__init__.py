"""Losses, one file each."""

from .token_label import TokenLabelLoss

__all__ = ["TokenLabelLoss"]
