"""A command's options are one dataclass: what its command line, its help, a config file and Python make of it."""

import json
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest

from timm_tokens.cli import COMMANDS, CommandError, call, main
from timm_tokens.cli.commands import module_of
from timm_tokens.cli.config import write_config
from timm_tokens.cli.parser import described, flag, make_parser, parse
from timm_tokens.options import Options, changed, option


@dataclass(frozen=True, kw_only=True)
class Shared(Options):
    """Shared."""

    size: int | None = option(None, "side in pixels (default: the image's own)", at_least=1, aliases=("--side",))
    gamma: float = option(0.0, "exponent", at_least=0, infinite=True)
    pad: bool = option(True, "cut the border off")


@dataclass(frozen=True, kw_only=True)
class Blur(Shared):
    """Blur."""

    image: Path = option(help="image to read", positional=True)
    out: Path = option(help="image to write", positional=True)
    kernel: str = option(help="kind of blur", choices=("box", "gauss"))
    sigmas: tuple[float, ...] = option((1.0, 2.5), "standard deviations", above=0)
    range: tuple[float, float] = option((0.0, 1.0), "range of values", ascending=True)
    kwargs: dict[str, object] = option({}, "more arguments", rare=True)
    gamma: float = changed(Shared, "gamma", 1.0)


GIVEN = {"image": Path("a"), "out": Path("b"), "kernel": "box"}


def read(line):
    return parse("blur", Blur, line.split())


def test_words_without_a_name_stand_anywhere():
    for line in (
        "a b --kernel box",
        "--kernel box a b",
        "a --kernel box b",
        "--image a --out b --kernel=box",
        "a --out b",
    ):
        assert read(f"--kernel box {line}") == Blur(**GIVEN)


@pytest.mark.parametrize(
    ("more", "values"),
    [
        ("--size 3 --gamma inf", {"size": 3, "gamma": float("inf")}),
        ("--side 3", {"size": 3}),
        ("--no-pad", {"pad": False}),
        ("--no-pad --pad", {"pad": True}),
        ("--sigmas 3 1 --range 0 0.5", {"sigmas": (3.0, 1.0), "range": (0.0, 0.5)}),
        ("--kwargs depth=3 act=gelu sizes=(1,2)", {"kwargs": {"depth": 3, "act": "gelu", "sizes": (1, 2)}}),
    ],
)
def test_values(more, values):
    assert read(f"a b --kernel box {more}") == Blur(**GIVEN | values)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a", r"OUT is missing: image to write"),
        ("a b", r"--kernel is missing: kind of blur"),
        ("a b c --kernel box", "unrecognized arguments: c"),
        ("a b --kernel box --image c", "IMAGE is given twice: a and --image c"),
        ("a b --kernel box --siz 3", r"unrecognized arguments: --siz 3 \(did you mean --size\?\)"),
        ("a b --kernel tent", "--kernel: invalid choice: 'tent'"),
        ("a b --kernel box --size 0", "--size must be at least 1, got 0"),
        ("a b --kernel box --sigmas 1 0", "--sigmas must be above 0, got 0"),
        ("a b --kernel box --gamma nan", "--gamma must be at least 0, got nan"),
        ("a b --kernel box --range 2 1", "--range must be a range, its lower end first, got 2.0 1.0"),
        ("a b --kernel box --kwargs depth", "invalid KEY=VALUE value: 'depth'"),
    ],
)
def test_what_is_refused(line, words):
    with pytest.raises(CommandError, match=words):
        read(line)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 1.5}, "size must be a whole number, got 1.5"),
        ({"size": True}, "size must be a whole number, got True"),
        ({"pad": 1}, "pad must be true or false, got 1"),
        ({"sigmas": 1.0}, "sigmas must be several values, got 1.0"),
        ({"sigmas": ()}, "sigmas must be one or more values, got 0"),
        ({"range": (1.0,)}, "range must be 2 values, got 1"),
        ({"kernel": "tent"}, "kernel must be one of box, gauss, got 'tent'"),
        ({"image": "a\0b"}, "image must be free of null characters"),
    ],
)
def test_in_python_the_names_are_pythons(values, words):
    with pytest.raises(ValueError, match=words):
        Blur(**GIVEN | values)


def test_a_config_repeats_a_run_and_what_is_given_wins(tmp_path):
    first = Blur(**GIVEN, sigmas=[4], kwargs={"depth": 2}, pad=False, size=7)
    write_config(tmp_path, "blur", first)
    assert read(f"--config {tmp_path / 'options.json'}") == first
    again = read(f"--config {tmp_path / 'options.json'} --pad --size 9 c")
    assert again == Blur(**GIVEN | {"image": Path("c")}, sigmas=(4.0,), kwargs={"depth": 2}, size=9)


def test_help_shows_groups_and_defaults():
    text = " ".join(make_parser("blur", Blur, "About.").format_help().split())
    assert text.startswith("usage: timm-tokens blur IMAGE OUT --kernel KERNEL [options] About.")
    for part in (
        "Blur: IMAGE image to read (required)", "--kernel {box,gauss} kind of blur (required)",
        "--sigmas X [X ...] standard deviations (default: 1 2.5)", "--range X X range of values (default: 0 1)",
        "Shared: --size N side in pixels (default: the image's own) --gamma X exponent (default: 1)",
        "--no-pad cut the border off (default: off) Rarely used: --kwargs [KEY=VALUE ...]",
    ):  # fmt: skip
        assert part in text
    assert "--side" not in text and " --pad" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does_and_its_default(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for each in fields(module_of(command).Options):
        if each.metadata.get("rest"):
            continue
        words = described(each)
        assert re.match(r"(?!of |for |the option)[\w'-]+:? \S+ \S+", words), f"{flag(each)}: {words}"
        known = isinstance(each.default, bool) or each.default_factory is not MISSING
        assert known or re.search(r"\(default: .+\)$|\(required\)$", words), f"{flag(each)}: {words}"
        named = "--no-" + each.name if each.default is True and "flag" not in each.metadata else flag(each)
        assert each.metadata.get("positional") or f" {named}" in printed
        assert " ".join(words.replace("%%", "%").split()) in printed


def test_the_same_thing_has_the_same_name_and_range():
    """In all commands, but where a command says that it is another thing."""
    seen, other = (
        {},
        {
            ("annotate", "img_size"),
            ("bench", "batch_size"),
            ("bench", "r"),
            ("train mte", "mask_ratio"),
            ("train dtem", "r"),
        },
    )
    other |= {("train mira", "teacher_momentum"), ("train dtem", "r")}
    for command in COMMANDS:
        for each in fields(module_of(command).Options):
            limits = {name: each.metadata.get(name) for name in ("at_least", "above", "at_most", "below", "flag")}
            if (command, each.name) not in other:
                assert seen.setdefault(each.name, limits) == limits, f"{command}: {each.name}"


def test_older_names_are_still_taken():
    for command, line, name in (
        ("train mte", "--model m --data-dir d --out o --objective ibot", "loss"),
        ("fewshot", "--merge-r 3", "r"),
        ("bench", "m --image-size 64", "img_size"),
        ("train mira", "--model m --data-dir d --out o --hidden 8 --width 4", "head_hidden"),
    ):
        options = parse(command, module_of(command).Options, line.split())
        assert str(getattr(options, name)) in line


def test_from_python_errors_are_the_commands(tmp_path):
    with pytest.raises(CommandError, match="--rounds must be at least 1, got 0"):
        call("bench", model="test_vit", rounds=0)
    with pytest.raises(CommandError, match="there is no option 'round'"):
        call("bench", model="test_vit", round=1)
    with pytest.raises(CommandError, match="there is no command 'sleep'"):
        call("sleep")


def test_a_run_can_be_repeated_by_its_options(tmp_path, capsys):
    line = "bench test_vit --r 2 --batch-size 1 --rounds 1 --no-memory --device cpu --out"
    assert main([*line.split(), str(tmp_path / "a")]) == 0
    config = str(tmp_path / "a" / "options.json")
    assert main(["bench", "--config", config, "--out", str(tmp_path / "b"), "--r", "3"]) == 0
    first, second = (json.loads((tmp_path / name / "options.json").read_text()) for name in "ab")
    assert second == first | {"out": str(tmp_path / "b"), "r": [3]}
    assert main(["probe", "--config", config]) == 2
    assert "does not hold the options of timm-tokens probe" in capsys.readouterr().err
