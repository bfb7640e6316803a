"""How papers evaluate frozen features: linear classifiers trained by SGD on augmented crops."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


class Sweep:
    """Linear classifiers of the same features, one for each of L learning rates, trained side by side by SGD.

    Args:
        protocol: What they are trained by.
        dim: D, channels of the features.
        num_classes: K.
        lrs: Learning rates, already scaled to the batch.
        epochs, steps_per_epoch: How long they are trained.
        generator: Draws the first weights, on the CPU: normal with a deviation of 0.01, the same for all.
        device: Where to compute.
    """

    def __init__(
        self, protocol: Protocol, dim: int, num_classes: int, lrs: Sequence[float], epochs: int, steps_per_epoch: int,
        generator: torch.Generator, device: str = "cpu",
    ):  # fmt: skip
        self.protocol, self.epochs, self.steps_per_epoch, self.step = protocol, epochs, steps_per_epoch, 0
        weight = 0.01 * torch.randn(dim, 1, num_classes, generator=generator).expand(-1, len(lrs), -1)
        self.classifiers = Classifiers(weight.to(device).clone(), torch.zeros(len(lrs), num_classes, device=device))
        self.velocity = Classifiers(*(torch.zeros_like(p) for p in self.classifiers))
        self.rates = torch.tensor(lrs, device=device)[:, None]  # (L, 1)

    def schedule(self) -> float:
        """The share of the learning rates in the next step."""
        warmup = self.protocol.warmup_epochs * self.steps_per_epoch
        if not warmup:
            done = self.step // self.steps_per_epoch / self.epochs
        elif self.step < warmup:
            return self.step / warmup
        else:
            done = (self.step - warmup) / max(1, self.epochs * self.steps_per_epoch - warmup)
        return (1 + math.cos(math.pi * done)) / 2

    def train(self, x: Tensor, labels: Tensor) -> None:
        """A step on features (B, D) with classes (B,)."""
        parameters = [p.requires_grad_() for p in self.classifiers]
        logits = self.classifiers(x).flatten(0, 1)  # (B L, K)
        target = labels.repeat_interleave(len(self.rates))
        loss = F.cross_entropy(logits, target, label_smoothing=self.protocol.smoothing) * len(self.rates)
        gradients = torch.autograd.grad(loss, parameters)
        share = self.schedule()
        with torch.no_grad():
            for p, moving, gradient in zip(parameters, self.velocity, gradients, strict=True):
                moving.mul_(0.9).add_(gradient)
                p.sub_(share * self.rates * (gradient + 0.9 * moving if self.protocol.nesterov else moving))
        self.step += 1

    @torch.no_grad()
    def accuracies(self, x: Tensor, labels: Tensor) -> list[float]:
        """Top-1 accuracy of each classifier on features (N, D), between 0 and 1."""
        pairs = zip(x.split(1024), labels.to(x.device).split(1024), strict=True)
        right = torch.stack([(self.classifiers(a).argmax(-1) == b[:, None]).sum(0) for a, b in pairs])
        return (right.sum(0).double() / len(x)).tolist()
