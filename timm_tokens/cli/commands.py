"""The command `timm-tokens`: a table of sub-commands, each a module that is imported when it is asked for."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

from timm_tokens.cli.config import defaults
from timm_tokens.cli.errors import CommandError, explained, flush
from timm_tokens.cli.parser import Parser, build, flags, parse

# Command `name` is the module `timm_tokens.cli.<name>`, with dots for spaces and underscores for dashes, and has
#     Options         a dataclass of options, whose module's docstring is the description
#     run(options)    which raises what the library raises, or CommandError
COMMANDS = {
    "annotate": "make label maps for token labeling, with any classifier",
    "bench": "measure how much faster a model runs when its tokens merge",
    "calibrate": "choose how many tokens each block merges, with unlabelled images, for a share of the FLOPs",
    "draw": "draw which patches of an image merge",
    "draw attention": "draw what a model's auxiliary tokens attend to",
    "draw labels": "draw an image's label map and the targets of a crop",
    "fewshot": "measure few-shot accuracy on a model's features, with and without ESFR",
    "probe": "evaluate a model's frozen features: nearest neighbours, a linear classifier, NMI of prototypes",
    "run": "run one of timm's own scripts with this package's models registered",
    "train dtem": "train token merging without labels: a small file that makes a ViT faster (DTEM)",
    "train dtm": "pre-train a ViT without labels, on the morphed tokens of a teacher (DTM)",
    "train mira": "pre-train any backbone without labels, by clustering (MIRA)",
    "train mte": "pre-train without labels by DINO, iBOT or MoBY, with auxiliary tokens (MTE)",
    "train token-label": "train a classifier, with a label for every patch if there are label maps (LV-ViT)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 2 after an error that is the user's to fix.

    Args:
        argv: The arguments after the program's name; None: those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((name for name in (" ".join(argv[:2]), *argv[:1]) if name in COMMANDS), None)
    try:
        try:
            _table(argv) if command is None else _run(command, argv[len(command.split()) :])
        finally:
            flush()
    except CommandError as error:
        if "--traceback" in argv:
            raise
        line = " ".join(str(error).split())  # messages that pass on another library's may have several
        print(f"timm-tokens{f' {command}' if command else ''}: error: {line}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141  # what a shell sees of other programs whose reader leaves: 128 + SIGPIPE
    return 0


def call(command: str, **options: Any) -> Any:
    """Run a command from Python: its options by their names, its result instead of an exit code; a `recipe` gives its
    own to those that are left out.

    Raises:
        CommandError: What the command would print.
    """
    module = module_of(command)
    settled = build(module.Options, defaults(command, options) | options)
    with explained(flags(module.Options)):
        return module.run(settled)


def _run(command: str, argv: list[str]) -> None:
    module = module_of(command)
    options = parse(command, module.Options, argv, sys.modules[module.Options.__module__].__doc__)
    with nullcontext() if command == "run" else explained(flags(module.Options)):  # a script's errors are its own
        module.run(options)


def module_of(command: str) -> ModuleType:
    """The module of a command."""
    if command not in COMMANDS:
        raise CommandError(f"there is no command {command!r}: choose from {', '.join(COMMANDS)}")
    return import_module(f"timm_tokens.cli.{command.replace(' ', '.').replace('-', '_')}")


def _table(argv: list[str]) -> None:
    """The help about all commands, or those that start with a word, and what is wrong with another line."""
    from timm_tokens import __version__  # not above: the package may be importing this module

    word = next((f"{argv[0]} " for name in COMMANDS if argv and name.startswith(f"{argv[0]} ")), "")
    names = [name for name in COMMANDS if name.startswith(word)]
    width = max(map(len, names)) + 2
    lines = "\n".join(f"  {name:{width}}{COMMANDS[name]}" for name in names)
    about = "Better and cheaper tokens for the Vision Transformers in timm."
    parser = Parser(f"timm-tokens {word}".strip(), about, f"commands:\n{lines}")
    parser.add_argument("--version", action="version", version=f"timm-tokens {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below; each has its own --help")
    asked = word + parser.parse_known_args(argv[1:] if word else argv)[0].command
    raise CommandError(f"there is no command {asked!r}: choose from {', '.join(names)}")
