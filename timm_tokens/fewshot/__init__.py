"""Few-shot classification on the features of any model (arXiv 2106.11486)."""

from timm_tokens.fewshot.classifiers import bd_cspn, cosine_centroid, nearest_centroid
from timm_tokens.fewshot.episodes import Episodes, sample_episodes
from timm_tokens.fewshot.esfr import ESFR, Adapted, prepare

__all__ = [
    "ESFR",
    "Adapted",
    "Episodes",
    "bd_cspn",
    "cosine_centroid",
    "nearest_centroid",
    "prepare",
    "sample_episodes",
]
