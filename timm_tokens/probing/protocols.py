"""How papers evaluate frozen features: linear classifiers trained by SGD on augmented crops."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timm_tokens.probing.linear import Classifiers


class Protocol(NamedTuple):
    """A published linear evaluation.

    Attributes:
        features: "last four": the class tokens of the last four blocks; of ViTs as wide as ViT-B and wider the last
            class token and the mean of the patches; "pooled": what the model gives without its classifier.
        lrs: Learning rates at `base_size` images, all trained at once.
        base_size: Batch size that they are meant for; they scale with the batch.
        epochs: Passes over the training images.
        nesterov: Whether the momentum is Nesterov's.
        warmup_epochs: Epochs in which the rates rise from 0; the schedule then goes by steps, otherwise by epochs.
        smoothing: Label smoothing.
        source: Where it is published, and what differs here.
    """

    features: str
    lrs: tuple[float, ...]
    base_size: int
    epochs: int = 100
    nesterov: bool = False
    warmup_epochs: int = 0
    smoothing: float = 0.0
    source: str = ""


PROTOCOLS = {
    "dino": Protocol(
        "last four", (0.001,), 256, source="facebookresearch/dino eval_linear.py; its help advises to tune the rate"
    ),
    "ibot": Protocol(
        "last four", tuple(digit * 10.0**power for power in range(-4, 1) for digit in range(1, 10)), 256,
        source="bytedance/ibot eval_linear_multi.py",
    ),
    "moby": Protocol(
        "pooled", (1.0,), 512, nesterov=True, warmup_epochs=5, smoothing=0.1,
        source="SwinTransformer/Transformer-SSL moby_linear.py; here the frozen backbone drops no paths, and gradients "
        "are not clipped",
    ),
    "mira": Protocol("pooled", (0.075,), 256, source="movinghoon/MIRA eval_linear.py"),
}  # fmt: skip


class Sweep(Classifiers):
    """The classifiers of a protocol, with its schedule.

    Args:
        protocol: What they are trained by.
        dim: D, channels of the features.
        num_classes: K.
        lrs: Learning rates, already scaled to the batch.
        epochs: How long they are trained, in epochs of `steps_per_epoch` steps.
        generator: Draws the first weights, on the CPU: normal with a deviation of 0.01, the same for all.
        device: Where to compute.
    """

    def __init__(
        self, protocol: Protocol, dim: int, num_classes: int, lrs: Sequence[float], epochs: int, steps_per_epoch: int,
        generator: torch.Generator, device: str = "cpu",
    ):  # fmt: skip
        weight = 0.01 * torch.randn(dim, num_classes, generator=generator)
        super().__init__(weight.to(device), lrs, nesterov=protocol.nesterov, smoothing=protocol.smoothing)
        self.protocol, self.epochs, self.steps_per_epoch, self.done = protocol, epochs, steps_per_epoch, 0

    def schedule(self) -> float:
        """The share of the learning rates in the next step."""
        warmup = self.protocol.warmup_epochs * self.steps_per_epoch
        if not warmup:
            share = self.done // self.steps_per_epoch / self.epochs
        elif self.done < warmup:
            return self.done / warmup
        else:
            share = (self.done - warmup) / max(1, self.epochs * self.steps_per_epoch - warmup)
        return (1 + math.cos(math.pi * share)) / 2

    def train(self, x: Tensor, labels: Tensor) -> None:
        """A step on features (B, D) with classes (B,)."""
        self.step(x, labels, self.schedule())
        self.done += 1
