"""One loss a file."""

from timm_tokens.losses.dtm import DTMLoss
from timm_tokens.losses.mira import MIRALoss
from timm_tokens.losses.token_label import TokenLabelLoss

__all__ = ["DTMLoss", "MIRALoss", "TokenLabelLoss"]
