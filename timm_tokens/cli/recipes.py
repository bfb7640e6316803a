"""What the command line has to do with recipes: finding, listing and printing them."""

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from timm_tokens.cli.errors import explained
from timm_tokens.options import Options

if TYPE_CHECKING:
    from timm_tokens.recipes import Recipe


def named(command: str, name: str | None) -> "Recipe | None":
    """The recipe of this name, None without a name."""
    if name is None:
        return None
    from timm_tokens.recipes import load  # not above: it needs yaml, which takes time to import

    with explained():
        return load(command.split()[-1], name)


def values(recipe: "Recipe", given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's options; its arguments of the model only where no other model is given."""
    other = given.get("model") not in (None, recipe.options.get("model"))
    return {name: value for name, value in recipe.options.items() if not (other and name == "model_kwargs")}


def listed(command: str) -> str:
    """The recipes of a command, with what each of them trains and what was reached with it."""
    from timm_tokens.recipes import load, names

    objective = command.split()[-1]
    lines = []
    for name in names(objective):
        recipe = load(objective, name)
        lines += [f"{name}: {recipe.title}", f"    source: {recipe.source}", f"    result: {recipe.published}"]
        lines += [f"    differs: {text}" for text in recipe.differs]
    return "\n".join(lines)


def config(of: type[Options], values: dict[str, Any], recipe: "Recipe | None") -> str:
    """Every option with its value, as YAML, and where a recipe has it from as a comment."""
    lines = []
    for each in fields(of):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        value = values.get(each.name, default)
        if value is MISSING:
            continue
        lines.append(f"{each.name}: {_yaml(value)}")
        if recipe is not None and each.name in recipe.options and recipe.options[each.name] == value:
            lines[-1] += f"  # {recipe.sources[each.name]}"
    return "\n".join(lines)


def _yaml(value: Any) -> str:
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    plain = plain if isinstance(plain, int | float | str | list | dict | None) else str(plain)
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
