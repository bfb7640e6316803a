"""Run a Python script, such as timm's train.py or validate.py, with this package's models registered.

timm-tokens run validate.py --model deit_small_dtem --data-dir imagenet
"""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm_tokens.cli.errors import CommandError
from timm_tokens.options import Options as BaseOptions
from timm_tokens.options import option


@dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """What to run."""

    script: Path = option(help="a Python file; all that follows is its own", positional=True)
    arguments: tuple[str, ...] = option((), "the script's own arguments", rest=True)


def run(options: Options) -> dict[str, Any]:
    """Run the script as `python SCRIPT ARGUMENTS` would; what it raises, its exit included, passes through.

    Returns:
        The script's global variables.

    Raises:
        CommandError: If there is no such file.
    """
    script = options.script
    if not script.is_file():
        raise CommandError(
            f"no script {script}: give the path of a Python file, such as validate.py "
            "in a clone of https://github.com/huggingface/pytorch-image-models"
        )
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [str(script), *options.arguments], [str(script.resolve().parent), *path]
    try:
        return runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path
