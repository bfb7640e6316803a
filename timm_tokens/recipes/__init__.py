"""The published recipes, and a short one of our own for each objective: `timm-tokens train ... --recipe NAME`.

Each is a data file in which every value has its source.

A file `<objective>/<name>.yaml` has

    title: what it trains, and for how long
    source: paper and code, whose files the values' sources name
    published: what was reached with it, as published; of a short recipe, as measured by this project
    options: {name of an option: [value, source]}
    differs: what of the recipe no option says, if anything
"""

from importlib.resources import files
from typing import Any, NamedTuple

import yaml


class Recipe(NamedTuple):
    """A recipe: its options by their names in Python, and where each of their values is written."""

    title: str
    source: str
    published: str
    options: dict[str, Any]
    sources: dict[str, str]
    differs: tuple[str, ...] = ()


def names(objective: str) -> list[str]:
    """The recipes of an objective, such as "mte"."""
    folder = files(__package__) / objective
    return sorted(each.name.removesuffix(".yaml") for each in folder.iterdir()) if folder.is_dir() else []


def load(objective: str, name: str) -> Recipe:
    """A recipe by its name."""
    if name not in names(objective):
        raise ValueError(f"{objective} has no recipe {name!r}: choose from {', '.join(names(objective))}")
    kept = yaml.safe_load((files(__package__) / objective / f"{name}.yaml").read_text(encoding="utf-8"))
    options = {option: value for option, (value, _) in kept["options"].items()}
    sources = {option: source for option, (_, source) in kept["options"].items()}
    return Recipe(**kept | {"options": options, "sources": sources, "differs": tuple(kept.get("differs", ()))})
