"""The command `timm-tokens`."""

from timm_tokens.cli.commands import COMMANDS, call, main
from timm_tokens.cli.errors import CommandError

__all__ = ["COMMANDS", "CommandError", "call", "main"]
