"""The parser of a command, made of its dataclass of options."""

import ast
import re
from argparse import SUPPRESS, Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any, NoReturn, cast, get_type_hints

from timm_tokens.cli import config
from timm_tokens.cli.errors import CommandError, explained
from timm_tokens.options import Options, kind

RARE = "Rarely used"
_PLACE = "place of "  # before the name of an option that is given without one


class _HelpFormatter(RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width, break_on_hyphens=False)  # --data-dir stays on one line


class Parser(ArgumentParser):
    """A parser whose errors are one line, and that takes no abbreviations: an option that is added would break them."""

    def __init__(self, prog: str, description: str | None = None, epilog: str | None = None):
        super().__init__(prog, None, description, epilog, formatter_class=_HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        close = get_close_matches(unknown, self._option_string_actions) if unknown.startswith("--") else ()
        raise CommandError(message + (f" (did you mean {close[0]}?)" if close else ""))


def parse(command: str, of: type[Options], argv: Sequence[str], description: str | None = None) -> Options:
    """The options that a command line gives, those of a file that `--config` names included."""
    rest = next((each.name for each in fields(of) if each.metadata.get("rest")), None)
    given = vars(make_parser(command, cast(Any, of), description).parse_intermixed_args(argv[:1] if rest else argv))
    if rest:
        given[rest] = argv[1:]
    for place in [name for name in given if name.startswith(_PLACE)]:
        name = place.removeprefix(_PLACE)
        if name in given:
            raise CommandError(f"{name.upper()} is given twice: {given[place]} and --{name} {given[name]}")
        given[name] = given.pop(place)
    given.pop("traceback", None)  # see `main`
    path, wanted = given.pop("config", None), given.get("recipe")
    if path and wanted:
        raise CommandError("give --config or --recipe, not both: the options of a run hold those of its recipe")
    if given.pop("list_recipes", False):
        _print_and_exit(config.listed_recipes(command))
    kept = config.read_config(path, command) if path else config.defaults(command, given)
    if given.pop("print_config", False):
        _print_and_exit(config.listed_options(of, kept | given, config.recipe_named(command, wanted)))
    return build(of, kept | given)


def _print_and_exit(text: str) -> NoReturn:
    with explained():
        print(text, flush=True)
    raise SystemExit(0)


def build(of: type[Options], values: dict[str, Any]) -> Options:
    """A dataclass of options from what is given; the other options have their defaults."""
    known = {each.name: each for each in fields(of)}
    for name in values.keys() - known.keys():
        raise CommandError(f"there is no option {name!r}: there are {', '.join(sorted(known))}")
    for name, each in known.items():
        if required(each) and values.get(name) is None:
            name = each.name.upper() if each.metadata.get("positional") else flag(each)
            raise CommandError(f"{name} is missing: {each.metadata['help']}")
    with explained(flags(of)):
        return of(**values)


def flags(of: type[Options]) -> dict[str, str]:
    """How the command line writes each option, by its name in Python and by older ones, which the library may use."""
    names = {alias.strip("-").replace("-", "_"): each for each in fields(of) for alias in _aliases(each)}
    return {name: flag(each) for name, each in (names | {each.name: each for each in fields(of)}).items()}


def _aliases(each: Field) -> tuple[str, ...]:
    return each.metadata.get("aliases", ())


def required(each: Field) -> bool:
    """Whether an option must be given."""
    return each.default is each.default_factory is MISSING


def flag(each: Field) -> str:
    """How the command line writes an option."""
    return each.metadata.get("flag", "--" + each.name.replace("_", "-"))


@cache
def make_parser(command: str, of: type[Options], description: str | None = None) -> Parser:
    """A parser whose namespace holds what is given and nothing else."""
    parser, hints = Parser(f"timm-tokens {command}", description), get_type_hints(of)
    places = [each.name.upper() for each in fields(of) if each.metadata.get("positional")]
    needed = [each for each in fields(of) if required(each) and not each.metadata.get("positional")]
    needed.sort(key=lambda each: ("data_dir", "out").index(each.name) if each.name in ("data_dir", "out") else -1)
    given = (f"{flag(each)} {each.metadata.get('metavar', each.name.upper())}" for each in needed)
    parser.usage = " ".join([parser.prog, *places, *given, "[options]"])
    groups = grouped(of)
    for title, members in groups.items():
        group = parser.add_argument_group(title)
        for each in members:
            _add(group, each, hints[each.name])
    rare = parser.add_argument_group(RARE) if RARE not in groups else group
    words = f"take the options from the {config.CONFIG} of an earlier run; options on the command line win"
    rare.add_argument("--config", type=Path, default=SUPPRESS, metavar="FILE", help=f"{words} (default: none)")
    words = "show where in the code an error comes from, to report a bug"
    rare.add_argument("--traceback", action="store_true", default=SUPPRESS, help=words)
    if "recipe" in hints:
        switch: dict[str, Any] = {"action": "store_true", "default": SUPPRESS}
        rare.add_argument("--list-recipes", **switch, help="list the recipes of this objective and exit")
        rare.add_argument("--print-config", **switch, help="print every option with its value and source and exit")
    return parser


def grouped(of: type[Options]) -> dict[str, list[Field]]:
    """The options by the first sentence about the dataclass that they are of, in the order in which the command's
    dataclass names those that it is made of; then those with a group of their own; the rare ones last."""
    titles = {base: (base.__doc__ or "").strip().splitlines()[:1] for base in of.__mro__}
    groups: dict[str, list[Field]] = {title[0].rstrip("."): [] for title in titles.values() if title}
    rare: list[Field] = []
    for each in fields(of):
        if each.metadata.get("rest"):
            continue
        owner = [base for base in of.__mro__ if each.name in vars(base).get("__annotations__", {})][-1]
        group = groups.setdefault(each.metadata.get("group", titles[owner][0].rstrip(".")), [])
        (rare if each.metadata.get("rare") else group).append(each)
    return {title: members for title, members in (groups | {RARE: rare}).items() if members}


def _add(group: Any, each: Field, hint: Any) -> None:
    """Declare an option, with its old names, which the help does not show."""
    holds, metadata = kind(hint), each.metadata
    if holds.type is bool:
        return _add_switch(group, each)
    letter = {int: "N", float: "X", Path: "PATH", str: None if metadata.get("choices") else "NAME"}.get(holds.type)
    reads: dict[str, Any] = {"dest": each.name, "default": SUPPRESS, "metavar": metadata.get("metavar", letter)}
    if holds.type is dict:
        reads |= {"type": _pair, "nargs": "*", "action": _Pairs, "metavar": "KEY=VALUE"}
    else:
        reads |= {"type": holds.type, "choices": metadata.get("choices")}
    if holds.count is not None:
        reads["nargs"] = holds.count or "+"
    names = [flag(each), *_aliases(each)]
    if metadata.get("positional"):
        # Left as text: argparse would convert even the mark that it is not given.
        place = {"nargs": "?", "default": SUPPRESS, "metavar": each.name.upper(), "help": described(each)}
        group.add_argument(_PLACE + each.name, **place)
    else:
        group.add_argument(names.pop(0), **reads, help=described(each))
    for name in names:
        group.add_argument(name, **reads, help=SUPPRESS)


def _add_switch(group: Any, each: Field) -> None:
    """Declare `--name` and `--no-name`, of which the help shows the one that is not the default."""
    written = each.name.replace("_", "-")
    for value, name in ((True, f"--{written}"), (False, f"--no-{written}")):
        shown = bool(each.default) is not value
        name = flag(each) if shown and "flag" in each.metadata else name
        reads = {"dest": each.name, "action": "store_const", "const": value, "default": SUPPRESS}
        group.add_argument(name, **reads, help=described(each) if shown else SUPPRESS)


def described(each: Field) -> str:
    """An option's help with its default, where that is not said in words."""
    words, default = each.metadata["help"].replace("%", "%%"), each.default
    if required(each):
        return f"{words} (required)"
    if isinstance(default, bool) or default is MISSING:
        return f"{words} (default: {'none' if default is MISSING else 'off'})"
    if default is None:
        return words
    words = re.sub(r" \(default: .*\)$", "", words)  # what None would mean
    many = default if isinstance(default, tuple) else (default,)
    said = " ".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in many)
    return f"{words} (default: {said or 'none'})"


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


_pair.__name__ = "KEY=VALUE"  # which argparse names in its error


class _Pairs(Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, dict(values))
