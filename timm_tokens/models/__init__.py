"""Registered models: importing this makes them known to timm.create_model."""

from timm_tokens.models import dtem, lvvit, mte, token_vit

__all__ = ["dtem", "lvvit", "mte", "token_vit"]
