"""The objectives of `timm-tokens train`: one small module each.

Objective `name` is the module `timm_tokens.cli.objectives.<name>`, dashes as underscores, with

    add_arguments(parser)           its own options; DEFAULTS, if there, changes those that all objectives share
    build(options) -> Objective     from the parsed options
"""

from collections.abc import Callable
from typing import NamedTuple

from torch.utils.data import Dataset

from timm_tokens.tasks import TokenTask
from timm_tokens.training.loop import Evaluate

OBJECTIVES = {
    "dtm": "a ViT without labels, from a teacher's morphed tokens",
    "mira": "any backbone without labels, by clustering with balanced pseudo-labels",
    "mte": "a backbone without labels: DINO, iBOT or MoBY, with auxiliary tokens (MTE)",
    "token-label": "a classifier; with token labels a label for every patch (LV-ViT)",
}


class Objective(NamedTuple):
    """What `timm_tokens.training.train` needs beside its settings; see there."""

    task: TokenTask
    dataset: Dataset
    collate: Callable | None = None
    evaluate: Evaluate | None = None
