"""Pure functions on tensors: everything here needs torch alone and holds no state."""

from timm_tokens.ops.assignment import Information, assignment_information, mira_assign
from timm_tokens.ops.morphing import draw_morph_rounds, morph, morph_groups

__all__ = [
    "Information",
    "assignment_information",
    "draw_morph_rounds",
    "mira_assign",
    "morph",
    "morph_groups",
]
