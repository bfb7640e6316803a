"""Better and cheaper tokens for the Vision Transformers in timm.

Importing this registers the package's models with timm.
"""

from timm_tokens.startup import prints_help_alone

if not prints_help_alone():
    from timm_tokens import (
        checkpoint_file,
        data,
        dense,
        fewshot,
        filling,
        losses,
        models,
        ops,
        parts,
        probing,
        tasks,
        tradeoff,
        training,
        weights,
    )
    from timm_tokens.calibration import calibrate
    from timm_tokens.hub import push_merger_to_hub
    from timm_tokens.merger_file import save_merger
    from timm_tokens.parts import DenseLogits
    from timm_tokens.vit import MergedTokens, Tokens, TokenViT
    from timm_tokens.wrap import add_aux_tokens, apply_dtem_merging, token_label_head

__version__ = "0.1.0"

__all__ = [
    "DenseLogits",
    "MergedTokens",
    "TokenViT",
    "Tokens",
    "__version__",
    "add_aux_tokens",
    "apply_dtem_merging",
    "calibrate",
    "checkpoint_file",
    "data",
    "dense",
    "fewshot",
    "filling",
    "losses",
    "models",
    "ops",
    "parts",
    "probing",
    "push_merger_to_hub",
    "save_merger",
    "tasks",
    "token_label_head",
    "tradeoff",
    "training",
    "weights",
]
