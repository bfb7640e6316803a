"""What `timm-tokens bench` times: a model in one setting, its forward pass or training step, its seconds and memory."""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import Tensor, nn

from timm_tokens.cli.common import models
from timm_tokens.cli.options import DTYPES, DeviceOptions, MergerOptions, ModelOptions
from timm_tokens.data import input_config
from timm_tokens.ops.matching import Matching
from timm_tokens.options import option
from timm_tokens.parts import TokenMerger
from timm_tokens.parts.merger import Merged
from timm_tokens.timm_types import Block, ViT
from timm_tokens.vit import TokenViT


class Setting(NamedTuple):
    """What is timed: the base (r None) or the merged model, evaluating or in a training step."""

    step: str  # "forward", "dropped", "full", "modular" or "end-to-end"
    batch: int
    r: int | tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class MachineOptions(ModelOptions, MergerOptions, DeviceOptions):
    """Machine."""

    model: str = option(help="name of a ViT in timm, or of a model of this package", positional=True)
    metric: str = option("learned", "what tokens are compared by", choices=("learned", "keys"), group="What to measure")
    compile: bool = option(False, "compile every model with torch.compile")
    dtype: str = option("float32", "data type of the weights; in training steps, of autocast", choices=DTYPES)
    threads: int | None = option(None, "number of CPU threads (default: torch's own choice)", at_least=1, at_most=1024)


def build(machine: MachineOptions, setting: Setting) -> nn.Module:
    """The model of a setting: the base, or merging or dropping r tokens per block, on the machine's device."""
    model = models.plain(models.make_model(machine))
    evaluating = setting.step in ("forward", "dropped")
    if setting.step == "dropped":
        model = dropping(model, cast(Any, setting.r))
    elif setting.r is not None:
        if machine.merger is None:
            model = models.merged(model, setting.r, machine.metric)
        else:
            with warnings.catch_warnings():  # that other weights than these were trained: what it takes is the same
                warnings.simplefilter("ignore", UserWarning)
                model = models.with_merger(model, machine.merger, setting.r)
        model.freeze_base(setting.step == "modular")
    if evaluating:
        model = model.to(getattr(torch, machine.dtype))
    return model.to(machine.device).train(not evaluating)


def make_step(machine: MachineOptions, setting: Setting, model: Any) -> Callable[[], None]:
    """The work to time: a forward pass, or a whole optimisation step."""
    images = torch.randn(setting.batch, *input_config(model, machine.img_size)["input_size"])
    forward, dtype = torch.compile(model) if machine.compile else model, getattr(torch, machine.dtype)
    if not model.training:
        images = images.to(machine.device, dtype)
        return torch.inference_mode()(lambda: forward(images))
    images, labels = images.to(machine.device), torch.randint(model.num_classes, (setting.batch,)).to(machine.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def train() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not torch.float32):
            loss = nn.functional.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def on_gpu(device: str | None) -> bool:
    """Whether a device is one of CUDA's."""
    return device is not None and device.startswith("cuda")


def timed(step: Callable[[], None], device: str | None) -> float:
    """Seconds that a step takes, the device's work included."""
    synchronize = torch.cuda.synchronize if on_gpu(device) else lambda: None
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def peak_memory(machine: MachineOptions, setting: Setting) -> float | None:
    """MiB at the most. On a GPU what torch allocated; on the CPU what a process grew by, so it takes one of its own."""
    if on_gpu(machine.device):
        step = make_step(machine, setting, build(machine, setting))
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(grown, machine, setting).result()


def grown(machine: MachineOptions, setting: Setting) -> float | None:
    """What this process grows by at its peak, where the kernel lets the high-water mark be reset; else None."""
    step = make_step(replace(machine, compile=False), setting, build(machine, setting))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _high_water_mark()
    step()
    return _high_water_mark() - before


def _high_water_mark() -> float:
    """The most memory (MiB) that this process has held since the mark was reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def describe(machine: MachineOptions) -> str:
    """What was measured, and where, in one line."""
    where = torch.cuda.get_device_name(machine.device) if on_gpu(machine.device) else _processor()
    merging = f"metric {machine.metric}" if machine.merger is None else f"merger {machine.merger}"
    options = f"{machine.dtype}{', compiled' if machine.compile else ''}, {merging}"
    return (
        f"{machine.model} on {where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"timm {timm.__version__}, {options}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "a CPU")


class Dropping(TokenMerger):
    """Drops the last tokens, as many as a merger would merge: no way of choosing tokens can be faster."""

    def compared_by(self, index: int, block: Block, y: Tensor) -> Tensor:
        return y[..., :0]

    def choose(
        self, index: int, block: Block, y: Tensor, r: int, effective: int, num_prefix_tokens: int, numbers: Any = None
    ) -> Matching:
        b, n = y.shape[:2]
        rows = (torch.arange(b * n, device=y.device) if numbers is None else numbers[: b * n]).view(b, n)
        return Matching(rows, rows[:1, :1].expand(b, r), 0)  # as if the first token took them

    def forward(
        self, choice: Matching | Tensor, x: Tensor, size: Tensor | None, r: int, effective: int, num_prefix_tokens: int
    ) -> Merged:
        return Merged(x[:, : x.shape[1] - r], None, effective - r, cast(Matching, choice))


def dropping(base: ViT, r: int | tuple[int, ...]) -> TokenViT:
    """The model with r tokens dropped in each block."""
    return TokenViT(base, merger=Dropping(base, r, metric="keys", prop_attn=False))
