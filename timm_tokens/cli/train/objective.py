"""What the objectives of `timm-tokens train` share: options, and how a run of any of them starts and ends.

An objective is a module `timm_tokens.cli.train.<name>`, dashes as underscores, with

    Options                         a dataclass made of its own options and of TrainOptions
    build(options) -> Objective     the task and the images
    run                             partial(launch, "train <name>", build)
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from timm_tokens.cli.common import checks, models
from timm_tokens.cli.common.datasets import RECORD
from timm_tokens.cli.common.processes import joined
from timm_tokens.cli.config import CONFIG, config_of, read_config, write_config
from timm_tokens.cli.options import DeviceOptions, ModelOptions, SplitOptions
from timm_tokens.cli.train.images import count_unreadable
from timm_tokens.hub import check_repository, push_model_to_hub
from timm_tokens.options import option
from timm_tokens.tasks import TokenTask
from timm_tokens.training import Result, Settings, checkpoints, history, train
from timm_tokens.training.loop import Augment, Evaluate
from timm_tokens.training.progress import check_same
from timm_tokens.training.settings import FREE


class Objective(NamedTuple):
    """What `timm_tokens.training.train` needs beside its settings, see there, and what happens when it has trained."""

    task: TokenTask
    dataset: Dataset
    evaluate: Evaluate | None = None
    finish: Callable[[Result], None] | None = None  # on the first process, when the others have ended
    push: Callable[[Result, str], None] | None = None  # uploads to a repository of the hub; None: the model is uploaded
    augment: Augment | None = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ModelOptions, SplitOptions, DeviceOptions, Settings):
    """What all objectives have."""

    recipe: str | None = option(
        None, "published or short recipe whose values become the defaults; --list-recipes shows them (default: none)",
        group="Training",
    )  # fmt: skip
    model: str = option(help="name of a model in timm or in this package")
    run_dir: Path | None = option(
        None, "folder of an earlier run, to start from its model and weights, at any --img-size "
        "(default: none)", flag="--run", metavar="FOLDER", group="Model",
    )  # fmt: skip
    pretrained: bool = option(False, "start from timm's pretrained weights")
    checkpoint: Path | None = option(
        None, "checkpoint to start from; a classifier for another number of classes is left out (default: none)",
        metavar="FILE",
    )  # fmt: skip
    data_dir: Path = option(help="folder with train/<class>/ and val/<class>/", metavar="FOLDER")
    drop_path: float | None = option(
        None, "rate of stochastic depth (default: the model's own)", at_least=0, below=1, rare=True
    )
    grad_checkpointing: bool = option(False, "save memory by recomputing activations in the backward pass", rare=True)
    push_to_hub: str | None = option(
        None, "repository of the Hugging Face hub to upload the result to, with a model card (default: none)",
        metavar="USER/NAME", group="Checkpoints and logs",
    )  # fmt: skip
    plot: bool = option(False, "draw the losses to curves.png, which needs matplotlib", group="Checkpoints and logs")


def make_student(options: TrainOptions, make: Callable[..., nn.Module] = models.make_model, **kwargs: Any) -> nn.Module:
    """The model to train; `kwargs` are for timm.create_model."""
    if options.drop_path is not None:
        kwargs["drop_path_rate"] = options.drop_path
    model: Any = make(options, **kwargs)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def launch(command: str, build: Callable[[Any], Objective], options: TrainOptions) -> Result:
    """Train, and write checkpoints, tables and the model into `out`.

    Called on several processes of one group, each takes its part.
    """
    checks.plot(options.plot)
    checks.folder(options.out)
    if options.push_to_hub is not None:
        check_repository(options.push_to_hub)
    with joined(options.device) as process:
        options = replace(options, device=process.device)
        settings = Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)})
        if (every := getattr(options, "knn_every", None)) is not None:
            settings = replace(settings, eval_every=every)
        if process.rank == 0 and settings.lr_base_size is not None:
            scaled, images = settings.scaled(process.world), settings.batch_size * settings.accumulate * process.world
            print(
                f"learning rate {scaled.lr:.4g}: {settings.lr:g} at {settings.lr_base_size} images, scaled to {images}"
            )
        torch.manual_seed(settings.seed)  # for the model's first weights
        built = build(options)
        if process.rank == 0:
            _note(command, options)
        result = train(built.task, built.dataset, settings, evaluate=built.evaluate, augment=built.augment)
        process.wait()
    if process.rank == 0:
        if options.plot:
            _draw_curves(settings.out)
        if built.finish is not None:
            built.finish(result)
        print(f"The model is in {result.path}; the losses in {settings.out / 'steps.csv'}.")
        if unread := count_unreadable(settings.out):
            print(f"{unread} images could not be read and were left out: their names are in {settings.out / RECORD}.")
        if options.push_to_hub is not None:
            (built.push or partial(_push, command, options))(result, options.push_to_hub)
            print(f"It was uploaded to https://huggingface.co/{options.push_to_hub}.")
    return result


def _push(command: str, options: TrainOptions, result: Result, repo_id: str) -> None:
    """Upload the model that was trained."""
    made = {"img_size": options.img_size} if hasattr(result.model, "patch_embed") and options.img_size else {}
    made = getattr(result.model, "model_args", made | models.arguments(options))
    how = {name: value for name, value in config_of(command, options).items() if name not in _PRIVATE}
    text = f"`timm-tokens {command}` with\n\n```json\n{json.dumps(how, indent=1)}\n```"
    results = result.epochs[-1] if result.epochs else {}
    results = {name: value for name, value in results.items() if "/" not in name}
    push_model_to_hub(result.model, repo_id, model_args=made, made_by=text, results=results)


_PRIVATE = ("command", "out", "data_dir", "checkpoint", "push_to_hub", "device", "workers", "resume", "log", "plot")


def _draw_curves(folder: Path) -> None:
    """Draw what the tables of a run hold to curves.png."""
    from timm_tokens.drawing import draw_curves, save  # not above: matplotlib is an extra

    steps, epochs = (history.read(folder / name) for name in (history.STEPS, history.SUMMARY))
    save(draw_curves(steps, epochs), folder / "curves.png")


def _note(command: str, options: TrainOptions) -> None:
    """Write down the options of a new run; refuse to continue one with others."""
    path = options.out / CONFIG
    running = checkpoints.exists(options.out)  # options alone may be those of an attempt that failed
    if not running:
        write_config(options.out, command, options)
    elif options.resume and path.is_file():
        free = {*FREE, "plot", "data_dir", "push_to_hub", "command"}
        both = read_config(path, command), config_of(command, options)
        kept, given = ({k: v for k, v in each.items() if k not in free} for each in both)
        check_same(options.out, kept, given)
