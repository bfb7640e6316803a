"""Pure functions on tensors: everything here needs torch alone and holds no state."""

from timm_tokens.ops.assignment import Information, assignment_information, mira_assign
from timm_tokens.ops.attention import aux_attention_mask, size_bias
from timm_tokens.ops.clustering import kmeans_groups, superpixel_features
from timm_tokens.ops.cross_entropy import soft_cross_entropy
from timm_tokens.ops.intrinsic_dim import local_intrinsic_dimensionality
from timm_tokens.ops.labels import SparseLabels, crop_maps, crop_token_labels, warp_token_labels
from timm_tokens.ops.matching import Matching, bipartite_match, merge, unmerge
from timm_tokens.ops.mixing import draw_mix_box, mix_ratio, mix_tokens
from timm_tokens.ops.morphing import draw_morph_rounds, morph, morph_groups
from timm_tokens.ops.relaxed import relaxed_merge, relaxed_top_k
from timm_tokens.ops.schedule import schedule
from timm_tokens.ops.sinkhorn import sinkhorn_assign
from timm_tokens.ops.sparse_cross_entropy import sparse_cross_entropy
from timm_tokens.ops.top_scores import others_share, top_scores

__all__ = [
    "Information",
    "Matching",
    "SparseLabels",
    "assignment_information",
    "aux_attention_mask",
    "bipartite_match",
    "crop_maps",
    "crop_token_labels",
    "draw_mix_box",
    "draw_morph_rounds",
    "kmeans_groups",
    "local_intrinsic_dimensionality",
    "merge",
    "mira_assign",
    "mix_ratio",
    "mix_tokens",
    "morph",
    "morph_groups",
    "others_share",
    "relaxed_merge",
    "relaxed_top_k",
    "schedule",
    "sinkhorn_assign",
    "size_bias",
    "soft_cross_entropy",
    "sparse_cross_entropy",
    "superpixel_features",
    "top_scores",
    "unmerge",
    "warp_token_labels",
]
