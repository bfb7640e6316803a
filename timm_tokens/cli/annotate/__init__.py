"""`timm-tokens annotate`."""

from timm_tokens.cli.annotate.command import Options, run

__all__ = ["Options", "run"]
