"""What a run is set to: the arguments of `train`, and of the command `timm-tokens train`."""

from argparse import ArgumentParser
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


def _option(default: Any, help: str, **argparse: Any) -> Any:
    """A field, with what the command's parser needs to know of it."""
    kind = {} if default is None or isinstance(default, bool) else {"type": type(default)}
    return field(default=default, metadata=kind | argparse | {"help": help})


_FLAG = {"action": "store_true"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run. Each is an option of the command, too: its --help says what they are.

    Raises:
        ValueError: A value is out of range.
    """

    out: Path = field(default=MISSING, metadata={"type": Path, "help": "folder for checkpoints, model and tables"})
    epochs: int = _option(100, "passes over the training images")
    steps: int = _option(None, "optimizer steps, instead of epochs", type=int)
    batch_size: int = _option(64, "images a step, on each process and for each part of an accumulated batch")
    accumulate: int = _option(1, "parts whose gradients make one step: the batch is so many times as large")
    opt: str = _option("adamw", "any of timm's optimizers")
    opt_betas: tuple[float, ...] = _option(None, "of Adam and its kin", type=float, nargs="+", metavar="BETA")
    momentum: float = _option(0.9, "of SGD")
    lr: float = _option(1e-3, "learning rate, as it is: it is not scaled by the batch size")
    sched: str = _option("cosine", "of the learning rate", choices=("cosine", "linear", "tanh", "none"))
    warmup_epochs: float = _option(None, "of linear warm-up; default: a twentieth of the run", type=float)
    warmup_lr: float = _option(1e-6, "learning rate at the start of the warm-up")
    min_lr: float = _option(1e-6, "learning rate at the end")
    weight_decay: float = _option(0.05, "none on biases, norms and what the model exempts")
    weight_decay_end: float = _option(None, "goes there from --weight-decay along a cosine", type=float)
    layer_decay: float = _option(None, "factor of the learning rate from each layer to the one before", type=float)
    clip_grad: float = _option(None, "largest gradient", type=float)
    clip_mode: str = _option(
        "norm", "by the norm of all, of each parameter, by value, or adaptively",
        choices=("norm", "parameter", "value", "agc"),
    )  # fmt: skip
    amp: str = _option(
        None, "mixed precision; float16 (with loss scaling) needs a GPU", choices=("float16", "bfloat16")
    )
    ema: float = _option(None, "keep an average of the model with this decay; it is what is validated and published",
                         type=float, metavar="DECAY")  # fmt: skip
    seed: int = _option(0, "decides everything random")
    workers: int = _option(4, "processes that load images")
    device: str = _option("cpu", "such as cuda (default: that if there is one, else cpu)")
    resume: bool = _option(False, "go on from the last checkpoint in --out; start anew if there is none", **_FLAG)
    save_every: int = _option(1000, "steps between checkpoints, besides that of every epoch")
    eval_every: int = _option(1, "epochs between validations")
    log_every: int = _option(10, "steps after which the losses are looked at, and written to steps.csv")

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))  # the dataclass is frozen
        for name in ("epochs", "steps", "batch_size", "accumulate", "save_every", "eval_every", "log_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip_grad"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.weight_decay_end is not None and not self.weight_decay > 0:
            raise ValueError(f"weight_decay_end needs weight_decay above 0 to start from, got {self.weight_decay}")
        if self.amp == "float16" and self.device.startswith("cpu"):
            raise ValueError("amp float16 needs a GPU: use bfloat16 on the CPU")

    def curve(self) -> dict[str, Any]:
        """What decides the losses: a run can only be resumed with the same. Plain data."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


# What may change between a run and its continuation.
FREE = {"out", "resume", "workers", "device", "save_every", "eval_every", "log_every"}


def add_settings(parser: ArgumentParser) -> None:
    """Declare the settings as options of a command."""
    for setting in fields(Settings):
        default = None if setting.default is MISSING else setting.default
        parser.add_argument("--" + setting.name.replace("_", "-"), default=default, **setting.metadata)
