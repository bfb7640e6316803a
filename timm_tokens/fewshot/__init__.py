"""Few-shot classification on the features of any model (arXiv 2106.11486)."""

from timm_tokens.fewshot.classifiers import bd_cspn, cosine_centroid, nearest_centroid
from timm_tokens.fewshot.episodes import Episodes, sample_episodes
from timm_tokens.fewshot.esfr import ESFR, Adapted, prepare
from timm_tokens.fewshot.evaluation import CLASSIFIERS, Comparison, Interval, compare

__all__ = [
    "CLASSIFIERS",
    "ESFR",
    "Adapted",
    "Comparison",
    "Episodes",
    "Interval",
    "bd_cspn",
    "compare",
    "cosine_centroid",
    "nearest_centroid",
    "prepare",
    "sample_episodes",
]
