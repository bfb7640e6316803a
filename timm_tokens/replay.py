"""Running a model on the same images with one schedule of merging after another."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from timm_tokens import blocks, features
from timm_tokens.classification import class_logits
from timm_tokens.driver import Setting, Stream, Trace, run_block
from timm_tokens.outputs import Outputs
from timm_tokens.vit import TokenViT

State = tuple[Stream, Trace]


class Replay:
    """A model's outputs on some batches of images, for any schedule, computed from the first block that differs.

    They are logits or features, as `outputs.outputs` gives them. The tokens after each block of the schedule that was
    last kept stay in memory: 0.2 GB for 128 images and ViT-Tiny.
    """

    def __init__(self, model: TokenViT, batches: Sequence[Tensor], logits: bool) -> None:
        self.model, self.logits = model, logits
        self.states: list[list[State]] = []  # before each block, for each batch
        self.ropes = []
        for images in batches:
            x, ropes = blocks.embed(model.base, images)
            self.states.append([(Stream(x, 0, effective=x.shape[1]), [])])
            self.ropes.append(ropes)
        self.schedule: tuple[int, ...] = ()

    def __call__(self, schedule: tuple[int, ...], keep: bool = False) -> list[Outputs]:
        """The outputs of each batch with this schedule, which stays set; `keep` its tokens to start from them later."""
        same = [a == b for a, b in zip(schedule, self.schedule, strict=False)]
        first = same.index(False) if False in same else len(same)
        self.model.merger.r = schedule
        runs = [self._run(states[: first + 1], ropes) for states, ropes in zip(self.states, self.ropes, strict=True)]
        found = [self._outputs(*states[-1]) for states in runs]
        if keep:
            self.states, self.schedule = runs, schedule
        return found

    def _run(self, states: list[State], ropes: list[Tensor] | None) -> list[State]:
        """The states before each block and after the last, given the first of them."""
        base, states = self.model.base, list(states)
        setting = Setting(base.num_prefix_tokens, self.model.merger, aux=None, limits={})
        for i in range(len(states) - 1, len(base.blocks)):
            stream, trace = states[-1]
            rope = None if ropes is None else ropes[i]
            stream, matching = run_block(setting, i, base.blocks[i], stream, rope)
            states.append((stream, trace if matching is None else [*trace, matching]))
        return states

    def _outputs(self, stream: Stream, trace: Trace) -> Outputs:
        if self.logits:
            x = self.model.base.norm(stream.x)
            return class_logits(self.model, x, stream.size, trace)
        tokens = features.tokens_of(self.model, stream, trace)
        return tokens.cls, tokens.patches


def as_batches(images: Tensor | Iterable[Tensor], size: int, device: torch.device) -> list[Tensor]:
    """Batches of at most `size` images (B, 3, H, W) of one tensor, or of an iterable of images or batches.

    Of a pair, such as a data loader gives, the first is taken.
    """
    batches = []
    for item in [images] if isinstance(images, Tensor) else images:
        item = item[0] if isinstance(item, (tuple, list)) and item else item
        if not isinstance(item, Tensor):
            raise TypeError(f"images must be tensors (B, 3, H, W) or (3, H, W), got a {type(item).__name__}")
        if item.ndim not in (3, 4):
            raise ValueError(f"images must have shape (B, 3, H, W) or (3, H, W), got {tuple(item.shape)}")
        batches.append(item.unsqueeze(0) if item.ndim == 3 else item)
    if not sum(map(len, batches)):
        raise ValueError("there are no images")
    shapes = sorted({tuple(batch.shape[1:]) for batch in batches})
    if len(shapes) > 1:
        raise ValueError(f"images must have one size, got {', '.join(map(str, shapes))}: resize and crop them first")
    return list(torch.cat([batch.to(device) for batch in batches]).split(size))
