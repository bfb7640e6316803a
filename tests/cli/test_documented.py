"""Every command line that README, docs, benchmarks, examples and --help show is one that the command takes."""

import re
import shlex
import sys
from pathlib import Path

import timm_tokens
from timm_tokens.cli import config
from timm_tokens.cli.commands import COMMANDS, module_of
from timm_tokens.cli.parser import parse

ROOT = Path(timm_tokens.__file__).parent.parent
PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.py")]


def lines(text):
    """The command lines in a text's code: in fences or indented. Those that a backslash continues are joined."""
    text = re.sub(r"\\+\n\s*", " ", text)
    code = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    code += "\n" + "\n".join(re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE))
    for line in re.findall(r"^(?:timm-tokens|.*-m timm_tokens) (.*)$", code, re.MULTILINE):
        yield shlex.split(line, comments=True)


def test_documented_command_lines(monkeypatch):
    monkeypatch.setattr(config, "_model_of", lambda folder: {"model": "test_vit"})  # the runs that lines go on from
    texts = {page.name: page.read_text() for page in PAGES}
    for name in COMMANDS:
        texts[name] = sys.modules[module_of(name).Options.__module__].__doc__
    checked = 0
    for place, text in texts.items():
        for words in lines(text):
            if "..." in words or "OBJECTIVE" in words:
                continue  # a pattern, not a line
            command = next((name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS), None)
            assert command, f"{place}: {words}"
            assert parse(command, module_of(command).Options, words[len(command.split()) :]), place
            checked += 1
    assert checked > 40
