"""`timm-tokens fewshot`."""

from timm_tokens.cli.fewshot.command import Options, run

__all__ = ["Options", "run"]
