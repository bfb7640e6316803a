"""The command `timm-tokens`: a table of sub-commands, each a module that is imported when it is asked for."""

import sys
from argparse import REMAINDER, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

from timm_tokens.cli._errors import CommandError

__all__ = ["COMMANDS", "CommandError", "main"]

# Sub-command `name` is the module `timm_tokens.cli.<name>`, with `add_arguments(parser)` and `run(**arguments)`. Of two
# words, with an underscore for the space, it is looked for first: `draw labels` is a picture of its own.
COMMANDS = {
    "annotate": "label maps of a data set's images, by any classifier, for token labeling",
    "bench": "speed of a model with its tokens merged, against the model itself",
    "draw": "a picture of an image's patch groups",
    "draw attention": "a picture of what a model's auxiliary tokens look at",
    "draw labels": "a picture of an image's label map, and of the targets of a crop",
    "fewshot": "few-shot accuracy of a model's features, with and without ESFR",
    "probe": "what a model's features are worth: nearest neighbours, a linear classifier, NMI of prototypes",
    "run": "run one of timm's own scripts with this package's models registered",
    "train": "train a model by token labels, MTE, DTM or MIRA",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code: 2 after an error that is the user's to fix.

    Args:
        argv: The arguments after the program's name; None: those of the process.
    """
    command, rest = _parse(argv)
    module = import_module(f"timm_tokens.cli.{command.replace(' ', '_')}")
    parser = ArgumentParser(
        f"timm-tokens {command}", description=module.__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    try:
        module.run(**vars(parser.parse_args(rest)))
    except CommandError as error:
        line = " ".join(str(error).split())  # messages that pass on another library's may have several
        print(f"{parser.prog}: error: {line}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[str, list[str]]:
    """The sub-command's name, and the arguments that are its own."""
    width = max(map(len, COMMANDS)) + 2
    parser = ArgumentParser(
        "timm-tokens",
        description="Better and cheaper tokens for the Vision Transformers in timm.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}{summary}" for name, summary in COMMANDS.items()),
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below; each has its --help")
    parser.add_argument("arguments", nargs=REMAINDER, help="of the command")
    options = parser.parse_args(argv)
    longer = " ".join([options.command, *options.arguments[:1]])
    return (longer, options.arguments[1:]) if longer in COMMANDS else (options.command, options.arguments)


def _version() -> str:
    from timm_tokens import __version__  # not above: the package may be importing this module

    return f"timm-tokens {__version__}"
