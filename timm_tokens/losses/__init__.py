"""One loss a file."""

from timm_tokens.losses.dtm import DTMLoss
from timm_tokens.losses.mira import MIRALoss

__all__ = ["DTMLoss", "MIRALoss"]
