"""Pure functions on tensors: everything here needs torch alone and holds no state."""

from .labels import SparseLabels, crop_maps, crop_token_labels, warp_token_labels
from .mixing import draw_mix_box, mix_ratio, mix_tokens

__all__ = [
    "SparseLabels",
    "crop_maps",
    "crop_token_labels",
    "draw_mix_box",
    "mix_ratio",
    "mix_tokens",
    "warp_token_labels",
]
