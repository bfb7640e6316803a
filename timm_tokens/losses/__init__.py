"""The losses, one file each."""

from timm_tokens.losses.center import Center
from timm_tokens.losses.dino import DINOLoss
from timm_tokens.losses.distill import DistillLoss
from timm_tokens.losses.dtm import DTMLoss
from timm_tokens.losses.ibot import IBOTPatchLoss
from timm_tokens.losses.mira import MIRALoss
from timm_tokens.losses.moby import MoBYLoss
from timm_tokens.losses.mte import MTELoss, MTETerms
from timm_tokens.losses.token_label import TokenLabelLoss

__all__ = [
    "Center",
    "DINOLoss",
    "DTMLoss",
    "DistillLoss",
    "IBOTPatchLoss",
    "MIRALoss",
    "MTELoss",
    "MTETerms",
    "MoBYLoss",
    "TokenLabelLoss",
]
