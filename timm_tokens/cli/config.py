"""Where options come from that a command line leaves out: an earlier run's file, a recipe, a run to go on from."""

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from timm_tokens import recipes
from timm_tokens.cli.errors import CommandError, explained
from timm_tokens.files import write_json
from timm_tokens.options import Options

CONFIG = "options.json"  # of a run, in its folder


def read_config(path: Path, command: str | None = None) -> dict[str, Any]:
    """The options that an earlier run of the command wrote down; of any command without one, its name among them."""
    with explained():
        data = path.read_bytes()
    try:
        kept = json.loads(data)
    except (ValueError, RecursionError):
        kept = None
    named = kept.get("command") if isinstance(kept, dict) else None
    if not isinstance(named, str) or command not in (None, named):
        wanted = f"{path} does not hold the options of timm-tokens {command or ''}".rstrip()
        raise CommandError(f"{wanted}, but of {named}" if named else f"{wanted}, as options.json of a run does")
    return {name: value for name, value in kept.items() if name != "command" or command is None}


def config_of(command: str, options: Options) -> dict[str, Any]:
    """What `read_config` reads of these options, the command's name beside them."""
    return {"command": command} | json.loads(json.dumps(vars(options), default=str))


def write_config(folder: Path, command: str, options: Options) -> None:
    """Write the options down in a run's folder, for `--config`."""
    write_json(folder / CONFIG, config_of(command, options))


def defaults(command: str, given: dict[str, Any]) -> dict[str, Any]:
    """What a recipe, and an earlier run whose model is trained further, say of the options that are not given."""
    recipe, run = recipe_named(command, given.get("recipe")), {}
    if command.startswith("train ") and given.get("run_dir"):
        run = _model_of(Path(given["run_dir"]))
        if clash := [name for name in ("model", "checkpoint", "pretrained") if given.get(name)]:
            raise CommandError(f"give --run or --{clash[0]}, not both: a run names its model and its weights")
    size = {"img_size": run.pop("img_size")} if "img_size" in run else {}
    return size | (recipe_values(recipe, given | run) if recipe else {}) | run


def _model_of(folder: Path) -> dict[str, Any]:
    """The options of a model that a run has trained."""
    kept, weights = read_config(folder / CONFIG), folder / "model.safetensors"
    if not weights.is_file():
        raise CommandError(f"the run in {folder} has not ended: there is no {weights}")
    names = ("model", "model_kwargs", "in_chans", "img_size")
    return {name: kept[name] for name in names if name in kept} | {"checkpoint": weights}


def recipe_named(command: str, name: str | None) -> recipes.Recipe | None:
    """The recipe of this name, None without a name."""
    if name is None:
        return None
    with explained():
        return recipes.load(command.split()[-1], name)


def recipe_values(recipe: recipes.Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's options; its arguments of the model only where no other model is given."""
    other = given.get("model") not in (None, recipe.options.get("model"))
    return {name: value for name, value in recipe.options.items() if not (other and name == "model_kwargs")}


def listed_recipes(command: str) -> str:
    """The recipes of a command, with what each of them trains and what was reached with it."""
    objective, lines = command.split()[-1], []
    for name in recipes.names(objective):
        recipe = recipes.load(objective, name)
        lines += [f"{name}: {recipe.title}", f"    source: {recipe.source}", f"    result: {recipe.published}"]
        lines += [f"    differs: {text}" for text in recipe.differs]
    return "\n".join(lines)


def listed_options(of: type[Options], values: dict[str, Any], recipe: recipes.Recipe | None) -> str:
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
    plain = json.loads(json.dumps(value, default=str))  # tuples become lists, and paths text
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
