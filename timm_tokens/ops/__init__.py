"""Pure functions on tensors: everything here needs torch alone and holds no state."""

from timm_tokens.ops.attention import size_bias
from timm_tokens.ops.matching import Matching, bipartite_match, merge, unmerge
from timm_tokens.ops.relaxed import relaxed_merge, relaxed_top_k
from timm_tokens.ops.schedule import schedule

__all__ = [
    "Matching",
    "bipartite_match",
    "merge",
    "relaxed_merge",
    "relaxed_top_k",
    "schedule",
    "size_bias",
    "unmerge",
]
