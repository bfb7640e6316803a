"""`timm-tokens bench`."""

from timm_tokens.cli.bench.command import Options, run

__all__ = ["Options", "run"]
