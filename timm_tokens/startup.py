"""Whether this process needs the package: the command's table of commands does without torch, which takes seconds."""

import sys
from pathlib import Path


def prints_help_alone() -> bool:
    """Whether the process is `timm-tokens --help`, or the same by `python -m timm_tokens`."""
    started_by = Path(sys.argv[0]).stem if sys.argv else ""
    as_module = started_by == "-m" and sys.orig_argv[-len(sys.argv) :][0] == "timm_tokens"
    known = {"-h", "--help", "--version", "train"}
    return (as_module or started_by == "timm-tokens") and bool(sys.argv[1:]) and known.issuperset(sys.argv[1:])
