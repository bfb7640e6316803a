"""Training tasks: what is trained, and by which loss. `timm_tokens.training` runs them."""

from timm_tokens.tasks.dtem import DTEMTask
from timm_tokens.tasks.dtm import DTMTask
from timm_tokens.tasks.mira import MIRATask
from timm_tokens.tasks.mte import MTETask
from timm_tokens.tasks.schedules import cosine, linear
from timm_tokens.tasks.task import TokenTask
from timm_tokens.tasks.teacher import frozen_copy, update_teacher
from timm_tokens.tasks.token_encoder import PooledTokens
from timm_tokens.tasks.token_label import TokenLabelTask

__all__ = [
    "DTEMTask",
    "DTMTask",
    "MIRATask",
    "MTETask",
    "PooledTokens",
    "TokenLabelTask",
    "TokenTask",
    "cosine",
    "frozen_copy",
    "linear",
    "update_teacher",
]
