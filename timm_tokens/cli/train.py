"""Train a model by one of this package's objectives; each has a --help of its own.

    timm-tokens train token-label --data-dir images --labels labels --model lvvit_s --out run
    torchrun --nproc-per-node 8 -m timm_tokens train token-label ... --amp bfloat16

A run that was stopped goes on exactly where it was, with --resume.
"""

import json
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from timm_tokens.cli._errors import CommandError
from timm_tokens.cli._processes import joined
from timm_tokens.cli.objectives import OBJECTIVES
from timm_tokens.files import replacing
from timm_tokens.training import Result, Settings, checkpoints, train
from timm_tokens.training.continuing import check_same
from timm_tokens.training.curves import draw_curves
from timm_tokens.training.settings import FREE, add_settings


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    def _get_help_string(self, action: Action) -> str:
        shown = action.default not in (None, False, True, "", {}) and "default" not in action.help
        return super()._get_help_string(action) if shown else action.help


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the objectives, and the options of each: the keyword arguments of `run`."""
    objectives = parser.add_subparsers(dest="objective", required=True, metavar="objective", title="objectives")
    for name, summary in OBJECTIVES.items():
        module = _module(name)
        options = objectives.add_parser(name, help=summary, description=module.__doc__, formatter_class=_Formatter)
        module.add_arguments(options)
        training = options.add_argument_group("training")
        add_settings(training)
        training.add_argument("--plot", action="store_true", help="draw the losses to curves.png (takes matplotlib)")
        options.set_defaults(device=None, **getattr(module, "DEFAULTS", {}))


def run(*, objective: str, **options: Any) -> Result:
    """Train, and write checkpoints, tables and the model into `out`; see the command's --help for the options.

    Called on several processes of one group, each takes its part.

    Raises:
        CommandError: Something is missing or does not fit, or the loss became infinite or NaN.
    """
    options = _complete(objective, options)
    if options.out is None:
        raise CommandError("--out is missing: a folder for checkpoints, tables and the model")
    if options.plot and find_spec("matplotlib") is None:
        raise CommandError("--plot takes matplotlib: pip install 'timm-tokens[viz]'")
    try:
        with joined(options.device) as process:
            options.device = process.device
            settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
            torch.manual_seed(settings.seed)  # for the model's first weights
            built = _module(objective).build(options)
            if process.rank == 0:
                _note(objective, options)
            result = train(built.task, built.dataset, settings, collate=built.collate, evaluate=built.evaluate)
            process.wait()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        raise CommandError(str(error)) from error
    if process.rank == 0:
        if options.plot:
            draw_curves(settings.out)
        print(f"The model is in {result.path}; the losses in {settings.out / 'steps.csv'}.")
    return result


def _module(objective: str) -> ModuleType:
    if objective not in OBJECTIVES:
        raise CommandError(f"no objective {objective!r}: choose from {', '.join(OBJECTIVES)}")
    return import_module(f"timm_tokens.cli.objectives.{objective.replace('-', '_')}")


def _complete(objective: str, options: dict[str, Any]) -> Namespace:
    """The options with the defaults of the command.

    Raises:
        CommandError: An option is not one of this objective.
    """
    _module(objective)
    parser = ArgumentParser()
    add_arguments(parser)
    known = vars(parser.parse_args([objective]))
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise CommandError(f"{objective} has no option {unknown[0]!r}: it has {', '.join(sorted(known))}")
    options = Namespace(**known | options)
    options.out = options.out and Path(options.out)
    return options


def _note(objective: str, options: Namespace) -> None:
    """Write down the options of a new run; refuse to continue one with others.

    Raises:
        ValueError: Names what differs.
    """
    path = options.out / "options.json"
    noted = json.loads(json.dumps({"objective": objective} | vars(options), default=str))  # as it will be read
    running = checkpoints.exists(options.out)  # options alone may be those of an attempt that failed
    if running and options.resume and path.is_file():
        found = json.loads(path.read_text())
        for free in (*FREE, "plot", "data_dir"):
            found[free] = noted[free]
        check_same(options.out, found, noted)
    elif not running:
        with replacing(path) as partial:
            partial.write_text(json.dumps(noted, indent=1))
