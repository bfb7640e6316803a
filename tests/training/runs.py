"""A tiny task and data set whose every source of randomness is of the kinds that real ones have."""

import math

import torch
from killing import dies_before
from torch import nn
from torch.utils.data import Dataset

from timm_tokens.distributed import all_reduce_mean
from timm_tokens.tasks import TokenTask, frozen_copy, update_teacher
from timm_tokens.training import Settings, train


class Points(Dataset):
    """Noisy points and their classes; the noise is drawn from the global generator, as augmentation is."""

    def __init__(self, length=20):
        self.x = torch.randn(length, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(4), int(self.x[index, 0] > 0)


class Follow(TokenTask):
    """Classification, and agreement with a teacher; with dropout, a queue of means and noise of the task's own."""

    def __init__(self, dropout=0.2, noise=0.1):
        generator = torch.Generator().manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 2))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        super().__init__(net)
        self.teacher, self.noise, self.momentum = frozen_copy(net), noise, 0.0
        self.register_buffer("seen", torch.zeros(2))

    def start_step(self, step, total_steps, steps_per_epoch):
        super().start_step(step, total_steps, steps_per_epoch)
        self.momentum = 0.9 + 0.1 * step / total_steps

    def forward(self, input, target=None):
        noise = self.noise * torch.randn(input.shape, generator=self.generator())
        logits = self.trainable_module(input + noise)
        agreement = (logits - self.teacher(input) + self.seen).square().mean()
        self.last = logits.detach().mean(0)
        loss = nn.functional.cross_entropy(logits, target) + agreement
        return {"loss": loss, "agreement": agreement.detach(), "output": logits.detach()}

    def end_step(self):
        self.seen.lerp_(all_reduce_mean(self.last), 0.01)
        update_teacher(self.teacher, self.student, self.momentum)


def settings(out, **changes):
    defaults = dict(out=out, epochs=3, batch_size=4, lr=0.05, workers=0, log_every=2, save_every=3, warmup_epochs=1)
    return Settings(**defaults | changes)


def run(out, task=None, kill=None, dataset=None, evaluate=None, **changes):
    """Train; with `kill` the process dies, so to say, before that step's optimizer."""
    task = dies_before(task or Follow(), kill)
    return train(task, dataset or Points(), settings(out, **changes), evaluate=evaluate), task


def nan_from(step):
    """A task whose loss is NaN from this step on."""
    task = Follow()
    forward = task.forward

    def spoiled(input, target=None):
        out = forward(input, target)
        return out | {"loss": out["loss"] * (math.nan if task.step >= step else 1)}

    task.forward = spoiled
    return task
