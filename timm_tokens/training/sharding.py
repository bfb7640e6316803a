"""FSDP2: parameters, gradients and the optimizer's state, shared out among the processes."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from timm_tokens.distributed import whole, world_size
from timm_tokens.tasks import TokenTask, update_teacher
from timm_tokens.training.settings import Settings

# Those whose sharded steps were seen to equal whole ones; Muon's don't, others fail inside torch.
OPTIMIZERS = ("adamw", "adam", "nadamw", "radam", "adan", "lion", "lamb", "lars", "sgd", "nesterov", "momentum")


def check(settings: Settings) -> None:
    """Refuse what does not go together with sharding; says what to do."""
    if world_size() == 1:
        raise ValueError("fsdp needs several processes to share the model: start them with torchrun, or leave it out")
    if settings.device.startswith("cpu") and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"fsdp needs torch 2.7 or newer on the CPU, this is {torch.__version__}: leave it out")
    if settings.amp == "float16":
        raise ValueError("fsdp takes no amp float16, which needs scaled losses: use bfloat16")
    if settings.clip_grad is not None and settings.clip_mode == "agc":
        raise ValueError("fsdp takes a clip_mode of norm, parameter or value, got agc")
    if settings.opt not in OPTIMIZERS:
        raise ValueError(f"fsdp takes the optimizers {', '.join(OPTIMIZERS)}, got opt {settings.opt}")


class Sharding:
    """A task whose student is sharded in place, and with it what follows the student: its teacher, and `ema`, the
    average of its product, which there is if there is a decay for it."""

    def __init__(self, task: TokenTask, device: torch.device, decay: float | None = None):
        self.task, self.device = task, device
        self._model = copy.deepcopy(task.product).cpu()
        self.ema = None if decay is None else _Average(task.product, decay=decay)
        task.make_global()
        from torch.distributed.device_mesh import init_device_mesh  # not above: builds of torch may lack it

        mesh = init_device_mesh(device.type, (world_size(),))
        # the student's own weights stay gathered until the backward pass: tasks use some of them after its forward
        _shard(task.trainable_module, mesh, keep=True)
        for module in task.followers() + (() if self.ema is None else (self.ema.module,)):
            _shard(module, mesh, keep=False)

    def gather(self) -> nn.Module:
        """A whole copy of the product, or of its average, as it is now; all processes must call it."""
        source = self.task.product if self.ema is None else self.ema.module
        self._model.load_state_dict(whole(source.state_dict()))
        return copy.deepcopy(self._model).to(self.device)


@contextmanager
def quiet() -> Iterator[None]:
    """Without FSDP2's warning that an output is a view: nothing here changes one in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield


class _Average(ModelEmaV3):
    """timm's moving average, of each process's part by itself."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        update_teacher(self.module, model, decay)


def _shard(module: nn.Module, mesh: Any, keep: bool) -> None:
    """Shard each block (an element of a list of modules that has parts of its own), and what is left."""
    from torch.distributed.fsdp import fully_shard  # not above: builds of torch may lack it

    for name, part in reversed([*module.named_modules()]):  # parts first
        if name.rpartition(".")[2].isdecimal() and [*part.children()] and [*part.parameters()]:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=not keep)
