"""Optimizer, schedules of learning rate and weight decay, loss scaling and clipping."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from timm_tokens.distributed import local, norms_of, sharded_like
from timm_tokens.tasks.schedules import cosine
from timm_tokens.training.batches import Plan
from timm_tokens.training.settings import Settings


class Optimization:
    """What turns the gradients of a module, which DDP doesn't wrap yet, into new weights, and how that changes.

    Raises:
        ValueError: The warm-up is longer than the run, or timm doesn't know the optimizer.
    """

    def __init__(self, module: nn.Module, settings: Settings, plan: Plan):
        self.settings, self.total_steps = settings, plan.total_steps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        options: dict[str, Any] = {} if settings.opt_betas is None else {"betas": tuple(settings.opt_betas)}
        self.optimizer = create_optimizer_v2(
            parameter_groups(module, settings.weight_decay, settings.layer_decay, settings.decay_exempt),
            opt=settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum, **options,
        )  # fmt: skip
        self.decayed = [bool(group["weight_decay"]) for group in self.optimizer.param_groups]
        self.scheduler = _scheduler(self.optimizer, settings, plan)
        self.scaler = torch.amp.GradScaler(settings.device.split(":")[0], enabled=settings.amp == "float16")

    @property
    def lr(self) -> float:
        """The largest learning rate of any parameter."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def bound_to_length(self) -> list[str]:
        """What is scheduled over the whole length of the run, each in words."""
        settings, bound = self.settings, []
        if settings.sched != "none":
            bound.append(f"the {settings.sched} schedule of the learning rate ends with it")
        if settings.weight_decay_end not in (None, settings.weight_decay):
            bound.append("the schedule of the weight decay ends with it")
        return bound

    def start_step(self, step: int) -> None:
        """Set learning rate and weight decay for this step."""
        if self.scheduler is not None:
            self.scheduler.step(step)  # to timm's schedulers an epoch is here one step
        if self.settings.weight_decay_end is not None:
            decay = cosine(self.settings.weight_decay, self.settings.weight_decay_end, step, self.total_steps)
            for group, decayed in zip(self.optimizer.param_groups, self.decayed, strict=True):
                group["weight_decay"] = decay if decayed else 0.0

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, before: Callable[[], None]) -> Tensor:
        """Unscale the gradients, call `before`, clip, update the weights, and forget the gradients.

        Returns:
            The norm of all gradients before they were clipped, on the device: nothing waits for it.
        """
        self.scaler.unscale_(self.optimizer)
        before()
        norms = norms_of([p.grad for p in self.parameters if p.grad is not None])
        if self.settings.clip_grad is not None:
            clip(self.parameters, norms, self.settings.clip_grad, self.settings.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return torch.linalg.vector_norm(norms)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        kept = _interned(state["optimizer"])
        own = [p for group in self.optimizer.param_groups for p in group["params"]]
        for number, values in kept["state"].items():
            kept["state"][number] = {name: sharded_like(x, own[number]) for name, x in values.items()}
        self.optimizer.load_state_dict(kept)
        self.scaler.load_state_dict(state["scaler"])


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float | None = None, exempt_names: str | None = None
) -> list[dict[str, Any]]:
    """timm's parameter groups, where what a part of the module exempts from weight decay stays exempt in the whole.

    Args:
        exempt_names: The last parts of the names of what is exempt beside biases and vectors, separated by commas;
            None: What the parts of the module name.
    """
    exempt = _exempt(module, exempt_names)
    if layer_decay is None:
        return param_groups_weight_decay(module, weight_decay, no_weight_decay_list=exempt)
    if not hasattr(module, "group_matcher"):
        raise ValueError(f"layer_decay needs a model that sorts its layers (group_matcher): {type(module).__name__}")
    return param_groups_layer_decay(module, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)


def _exempt(module: nn.Module, names: str | None) -> set[str]:
    if names is not None:
        given = set(names.replace(",", " ").split())
        return {name for name, _ in module.named_parameters() if name.rpartition(".")[2] in given}
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        if hasattr(part, "no_weight_decay")
        for name in part.no_weight_decay()
    }


def clip(parameters: Sequence[nn.Parameter], norms: Tensor, value: float, mode: str) -> None:
    """Clip gradients, whose norms these are, as timm does, or with mode "parameter" by the norm of each one alone."""
    if mode == "agc":
        dispatch_clip_grad(parameters, value, mode)
        return
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if mode == "value":
        for gradient in gradients:
            gradient.clamp_(-value, value)
    elif gradients:
        norms = norms if mode == "parameter" else torch.linalg.vector_norm(norms).expand_as(norms)
        torch._foreach_mul_(gradients, list((value / (norms + 1e-6)).clamp(max=1).unbind()))


def _interned(nest: Any) -> Any:
    """With one object for equal names, as they are in a new optimizer: or else pickle writes them in another way."""
    if isinstance(nest, dict):
        return {sys.intern(name) if isinstance(name, str) else name: _interned(x) for name, x in nest.items()}
    return [_interned(x) for x in nest] if isinstance(nest, list) else nest


def _scheduler(optimizer: torch.optim.Optimizer, settings: Settings, plan: Plan) -> Any:
    epochs = settings.warmup_epochs
    warmup = plan.total_steps // 20 if epochs is None else round(epochs * plan.steps_per_epoch)
    if warmup >= plan.total_steps:
        raise ValueError(
            f"a warm-up of {warmup} steps is not shorter than the run of {plan.total_steps}: lower warmup_epochs"
        )
    if settings.sched == "none" and settings.warmup_epochs:
        raise ValueError(f"a warm-up takes a schedule: with sched none, warmup_epochs must be 0, got {epochs}")
    linear = {"sched": "poly", "decay_rate": 1.0}
    kind = linear if settings.sched == "linear" else {"sched": settings.sched}
    apart = settings.sched_after_warmup
    return create_scheduler_v2(
        optimizer, **kind, num_epochs=plan.total_steps - apart * warmup, warmup_epochs=warmup, warmup_prefix=apart,
        warmup_lr=min(settings.warmup_lr, settings.lr), min_lr=min(settings.min_lr, settings.lr),
    )[0]  # fmt: skip
