"""Run a Python script, such as timm's train.py or validate.py, with this package's models registered.

    timm-tokens run validate.py --model deit_small_dtem --data-dir imagenet
    timm-tokens run validate.py --model vit_tiny_patch16_224 --pretrained --merger run --data-dir imagenet

All that follows the script's name are the script's own arguments, except --merger FILE (a file, the folder of a run, or
hf-hub:user/name): the model that --model names then merges its tokens with that trained merger.
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

    script: Path = option(help="Python file to run; all that follows are its own arguments", positional=True)
    arguments: tuple[str, ...] = option((), "the script's own arguments", rest=True)


def run(options: Options) -> dict[str, Any]:
    """Run the script as `python SCRIPT ARGUMENTS` would, and return its global variables.

    What it raises, its exit included, passes through.
    """
    script = options.script
    if not script.is_file():
        raise CommandError(
            f"no script {script}: give the path of a Python file, such as validate.py "
            "in a clone of https://github.com/huggingface/pytorch-image-models"
        )
    argv, path = sys.argv, sys.path
    arguments = with_merger(list(options.arguments))
    sys.argv, sys.path = [str(script), *arguments], [str(script.resolve().parent), *path]
    try:
        return runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path = argv, path


def with_merger(arguments: list[str]) -> list[str]:
    """A script's arguments; `--model NAME ... --merger FILE` becomes what makes such a model by timm's options."""
    if "--merger" not in arguments:
        return arguments
    place = arguments.index("--merger")
    if place + 1 == len(arguments):
        raise CommandError("--merger needs a file, the folder of a run, or hf-hub:user/name")
    weights = arguments[place + 1]
    rest = arguments[:place] + arguments[place + 2 :]
    names = [i for i, word in enumerate(rest) if word in ("--model", "-m") and i + 1 < len(rest)]
    if not names:
        raise CommandError("--merger needs --model NAME among the script's arguments")
    name = rest[names[0] + 1]
    rest[names[0] + 1] = "token_vit"
    made = [f"base={name}", f"merger={ {'weights': weights} }"]
    if "--model-kwargs" in rest:
        after = rest.index("--model-kwargs") + 1
        return [*rest[:after], *made, *rest[after:]]
    return [*rest, "--model-kwargs", *made]
