"""Registered models: importing this makes them known to timm.create_model."""

from timm_tokens.models import dtem, token_vit

__all__ = ["dtem", "token_vit"]
