"""A run of `timm-tokens train`: what it trained, read back from its folder."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from timm_tokens.cli.commands import COMMANDS, module_of
from timm_tokens.cli.common import checkpoints
from timm_tokens.cli.common.features import Source
from timm_tokens.cli.common.models import make_backbone
from timm_tokens.cli.config import CONFIG, read_config
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.parser import build
from timm_tokens.options import Options, option
from timm_tokens.tasks import MTETask
from timm_tokens.training.checkpoints import load


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Model."""

    run_dir: Path | None = option(
        None, "folder of a run of timm-tokens train, to take its model from (default: none)", flag="--run",
        metavar="FOLDER",
    )  # fmt: skip


class Trained(NamedTuple):
    """What a run trained: its model as a source of features, and of MTE the task, for its prototypes."""

    source: Source
    task: MTETask | None


def load_run(folder: Path) -> Trained:
    """What the run in a folder trained, from its last checkpoint; the run's images may be gone."""
    path = folder / CONFIG
    if not path.is_file():
        raise CommandError(f"no run of timm-tokens train in {folder}: there is no {path}")
    kept = read_config(path)
    command = kept.pop("command")
    if command not in COMMANDS or not command.startswith("train "):
        raise CommandError(f"{path} is of timm-tokens {command}, and not of timm-tokens train")
    found, module = load(folder), module_of(command)
    if found is None:
        raise CommandError(f"the run in {folder} has no checkpoint yet")
    options: Any = build(module.Options, kept)
    options = replace(options, pretrained=False, checkpoint=None, checkpoint_key=None)
    task, make = None, partial(make_backbone, replace(options, checkpoint=found.path))
    if hasattr(module, "make_task"):
        task = module.make_task(options)
        task.load_task_state(found.state["task_state"])
        make = partial(getattr, task, "product")
    elif hasattr(module, "make_product"):
        make = partial(module.make_product, options, found.state)
    about = {"model": options.model, "checkpoint": checkpoints.identity(found.path), "merge_r": "0"}
    return Trained(Source(make, about, str(found.path), options.img_size), task)
