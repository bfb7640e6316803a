"""The settings of a run: arguments of `train`, and options of the command `timm-tokens train`."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from timm_tokens.options import Options, option
from timm_tokens.training.logs import KINDS as LOGS

_OPTIMIZER, _FILES = "Optimizer", "Checkpoints and logs"


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """Training.

    The settings of a run; each is an option of the command, too.

    Raises:
        ValueError: A value is out of range.
    """

    out: Path = option(help="folder for checkpoints, tables and the model", metavar="FOLDER")
    epochs: int = option(100, "number of passes over the training images", at_least=1)
    steps: int | None = option(
        None, "number of optimizer steps, instead of --epochs (default: as --epochs says)", at_least=1
    )
    batch_size: int = option(64, "number of images in each batch, per process and per accumulated part", at_least=1)
    accumulate: int = option(1, "number of batches whose gradients are accumulated for one optimizer step", at_least=1)
    amp: str | None = option(
        None, "data type of mixed precision; float16 scales the loss and needs a GPU (default: no mixed precision)",
        choices=("float16", "bfloat16"),
    )  # fmt: skip
    ema: float | None = option(
        None, "decay of an exponential moving average of the model; the average is then what is validated and saved "
        "(default: no average)", at_least=0, below=1, metavar="DECAY",
    )  # fmt: skip
    seed: int = option(0, "seed of all random numbers", at_least=0, below=2**63)
    workers: int = option(4, "number of worker processes that load images", at_least=0, at_most=1024, group="Machine")
    device: str = option("cpu", "device to compute on, such as cuda", group="Machine")
    compile: bool = option(
        False, "compile the student (torch.compile), which takes minutes at the start and is faster afterwards",
        group="Machine",
    )  # fmt: skip
    fsdp: bool = option(
        False, "save memory: each process holds its part of the parameters, gradients and optimizer state (FSDP2)",
        group="Machine",
    )  # fmt: skip
    resume: bool = option(False, "continue from the last checkpoint in --out, or start from scratch if there is none")

    opt: str = option("adamw", "name of one of timm's optimizers", group=_OPTIMIZER)
    lr: float = option(1e-3, "learning rate, at the batch size that --lr-base-size names", above=0, group=_OPTIMIZER)
    lr_base_size: int | None = option(
        None, "global batch size that --lr is meant for; the rate is scaled to the run's own global batch "
        "(default: --lr is used as it is)", at_least=1, group=_OPTIMIZER,
    )  # fmt: skip
    lr_base_scale: str = option(
        "linear", "how the learning rate grows with the global batch size, where --lr-base-size is given",
        choices=("linear", "sqrt"), rare=True,
    )  # fmt: skip
    scale_schedule: bool = option(False, "scale --warmup-lr and --min-lr as the learning rate is scaled", rare=True)
    sched: str = option(
        "cosine", "schedule of the learning rate", choices=("cosine", "linear", "tanh", "none"), group=_OPTIMIZER
    )
    min_lr: float = option(1e-6, "learning rate at the end of the schedule", at_least=0, group=_OPTIMIZER)
    warmup_epochs: float | None = option(
        None, "epochs of linear warm-up (default: a twentieth of the run)", at_least=0, group=_OPTIMIZER
    )
    warmup_lr: float = option(1e-6, "learning rate at the start of the warm-up", at_least=0, rare=True)
    sched_after_warmup: bool = option(
        False, "start the schedule when the warm-up ends, instead of at the first step", rare=True
    )
    weight_decay: float = option(
        0.05, "weight decay; biases, norms and what the model exempts have none", at_least=0, group=_OPTIMIZER
    )
    decay_exempt: str | None = option(
        None, "names of parameters that have no weight decay beside biases and norms, such as cls_token,pos_embed; '' "
        "for none (default: those that the model names)", rare=True,
    )  # fmt: skip
    weight_decay_end: float | None = option(
        None, "final weight decay of the cosine schedule that starts at --weight-decay (default: it stays constant)",
        at_least=0, group=_OPTIMIZER,
    )  # fmt: skip
    clip_grad: float | None = option(
        None, "threshold to clip gradients at, measured as --clip-mode says (default: gradients are not clipped)",
        above=0, infinite=True, group=_OPTIMIZER,
    )  # fmt: skip
    clip_mode: str = option(
        "norm", "clip by the norm of all gradients, by the norm of each parameter's gradient, by value, or adaptively",
        choices=("norm", "parameter", "value", "agc"), group=_OPTIMIZER,
    )  # fmt: skip
    opt_betas: tuple[float, ...] | None = option(
        None, "betas of Adam and its variants (default: the optimizer's own)",
        at_least=0, below=1, metavar="BETA", rare=True,
    )  # fmt: skip
    momentum: float = option(0.9, "momentum of SGD and its variants", at_least=0, below=1, rare=True)
    layer_decay: float | None = option(
        None, "factor of the learning rate from each layer to the one below (default: all layers have the same rate)",
        above=0, at_most=1, rare=True,
    )  # fmt: skip
    save_every: int = option(1000, "optimizer steps between checkpoints, besides one after every epoch", at_least=1,
                             group=_FILES)  # fmt: skip
    eval_every: int = option(1, "epochs between validations", at_least=1, group=_FILES)
    log_every: int = option(10, "optimizer steps between writing the losses to steps.csv", at_least=1, group=_FILES)
    log: tuple[str, ...] | None = option(
        None, "where else to write the losses, beside the tables in --out (default: nowhere)", choices=LOGS,
        group=_FILES,
    )  # fmt: skip
    patience: float = option(
        45.0, "seconds without a sign of life after which another process of the run is taken for dead, and this one "
        "ends", above=0, rare=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay_end is not None and not self.weight_decay > 0:
            raise ValueError(f"weight_decay_end needs weight_decay above 0 to start from, got {self.weight_decay}")
        if self.opt_betas is not None and len(self.opt_betas) < 2:
            raise ValueError(f"opt_betas must be two numbers or more, got {self.opt_betas[0]}")
        if self.amp == "float16" and (self.device or "").startswith("cpu"):
            raise ValueError("amp float16 needs a GPU: use bfloat16 on the CPU")

    def scaled(self, processes: int) -> "Settings":
        """The settings of a run on so many processes: with learning rates for its global batch."""
        if self.lr_base_size is None:
            return self
        factor = self.batch_size * self.accumulate * processes / self.lr_base_size
        factor = factor if self.lr_base_scale == "linear" else factor**0.5
        names = ("lr", "warmup_lr", "min_lr") if self.scale_schedule else ("lr",)
        return replace(self, lr_base_size=None, **{name: getattr(self, name) * factor for name in names})

    def curve(self) -> dict[str, Any]:
        """What decides the losses: a run can only be resumed with the same. Plain data."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


# What may change between a run and its continuation.
FREE = {"out", "resume", "workers", "device", "save_every", "eval_every", "log_every", "log", "fsdp", "patience"}
