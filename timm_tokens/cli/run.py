"""Run a Python script, such as timm's train.py or validate.py, with this package's models registered.

timm-tokens run validate.py --model deit_small_dtem --data-dir imagenet
"""

import runpy
import sys
from argparse import REMAINDER, ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm_tokens.cli._errors import CommandError


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the options of the sub-command: the keyword arguments of `run`."""
    parser.add_argument("script", type=Path, help="a Python file")
    parser.add_argument("arguments", nargs=REMAINDER, help="the script's own")


def run(*, script: str | Path, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run the script as `python SCRIPT ARGUMENTS` would; what it raises, its exit included, passes through.

    Returns:
        The script's global variables.

    Raises:
        CommandError: If there is no such file.
    """
    script = Path(script)
    if not script.is_file():
        raise CommandError(
            f"no script {script}: give the path of a Python file, such as validate.py "
            "in a clone of https://github.com/huggingface/pytorch-image-models"
        )
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [str(script), *arguments], [str(script.resolve().parent), *path]
    try:
        return runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path
