"""`timm-tokens draw`: its pictures, each a module. Without a name it is the one of groups of patches."""

from timm_tokens.cli.draw.groups import Options, run

__all__ = ["Options", "run"]
