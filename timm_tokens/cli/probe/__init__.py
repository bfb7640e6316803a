"""`timm-tokens probe`."""

from timm_tokens.cli.probe.command import Options, run

__all__ = ["Options", "run"]
