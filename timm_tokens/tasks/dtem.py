"""Training of token merging, without labels or with them (DTEM, arXiv 2412.10569)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from timm_tokens.losses import DistillLoss
from timm_tokens.meta_copy import is_quantized
from timm_tokens.ops.finite import check_weights
from timm_tokens.outputs import classifies, outputs
from timm_tokens.tasks.task import TokenTask, check_mixup
from timm_tokens.tasks.teacher import frozen_copy
from timm_tokens.vit import TokenViT


class DTEMTask(TokenTask):
    """A ViT learns which of its tokens to merge: to give the outputs that it gives without merging, or to classify.

        model = timm_tokens.apply_dtem_merging(timm.create_model("vit_small_patch14_dinov2", pretrained=True), r=16)
        task = DTEMTask(model, r=(8, 20))
        task(images)["loss"].backward()  # no labels

    With target="distill" the teacher is the model itself without merging, as it is when the task is made. Where the
    model classifies, logits are compared, else class tokens and un-merged patches (see `outputs.classifies`).

    Args:
        model: A TokenViT with a merger, which is trained in place; it is `product`.
        target: "distill", which needs no labels, or "labels": cross entropy, with classes (B,) or, after mixup or
            cutmix, probabilities (B, K).
        train: "embeddings" trains the merger alone; everything else is frozen, and the base stays in evaluation mode
            and serves as the teacher, too. "all" trains everything, with a copy of the model as it was for a teacher.
        r: Tokens to merge in each block while training: one number; or a range (lowest, highest), of which each step
            draws one, the same on all processes, so that one merger learns to serve every r. None: as the merger is
            set, which it always is between steps.
        mixup: Mixes images, and classes if there are any, with their neighbours' in training; None: nothing is mixed.
        criterion: Compares a student's outputs with a teacher's; None: `DistillLoss()`.
        seed: Seed of the run.

    Raises:
        TypeError: If r is neither an int nor a pair of ints.
        ValueError: If the model has no merger or nothing to learn, no classes for labels, weights that are not finite,
            or an argument is out of range.

    Source: DTEM (arXiv 2412.10569), section 3.3, with target="labels" and train="embeddings".
    """

    def __init__(
        self,
        model: TokenViT,
        *,
        target: str = "distill",
        train: str = "embeddings",
        r: int | tuple[int, int] | None = None,
        mixup: Mixup | None = None,
        criterion: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        _check(model, target, train)
        self._range = _range(r)
        super().__init__(model, seed=seed)
        check_mixup(mixup)
        self.target, self.logits, self.mixup = target, classifies(model), mixup
        self.criterion = DistillLoss() if criterion is None else criterion
        self._r = model.merger.r
        self._taught = torch.zeros(())  # the sum of all that the teacher gave, in which NaN and infinity stay
        self.find_unused_parameters = _may_be_unused(model, self._range, train == "all")
        if target == "distill":
            teacher = TokenViT(model.base, head=model.head)  # around the same weights
            if train == "all":
                self.teacher = frozen_copy(teacher)
            else:
                self.__dict__["teacher"] = teacher.eval()  # no submodule: its weights are the student's
        if train == "embeddings":
            model.requires_grad_(False)
            model.freeze_base()
            model.merger.requires_grad_(True)
        else:
            model.freeze_base(False)

    @property
    def product(self) -> TokenViT:
        """The model, whose merging is trained."""
        return self.student

    def start_step(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        super().start_step(step, total_steps, steps_per_epoch)
        if self._range is not None:
            lowest, highest = self._range
            drawn = torch.randint(lowest, highest + 1, (), generator=self.step_generator())
            self.product.merger.r = int(drawn)

    def end_step(self) -> None:
        self.product.merger.r = self._r

    def forward(self, input: Tensor, target: Any = None) -> dict[str, Tensor]:
        """The loss of images (B, 3, H, W); "output", their logits, where the model classifies and nothing is mixed.

        Args:
            target: Classes (B,) or their probabilities (B, K), with target="labels"; otherwise it is not read.
        """
        mixup = self.mixup if self.training else None
        if mixup is not None:
            input, target = self.mix_neighbours(mixup, input, target)
        else:
            self.place_in_order(len(input))
        given: Any = outputs(self.trainable_module, input, self.logits)
        if self.target == "labels":
            loss = F.cross_entropy(given.float(), target)
        else:
            loss = self.criterion(given, self._teach(input))
        return {"loss": loss} | ({"output": given.detach()} if self.logits and mixup is None else {})

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        taught = outputs(self.teacher, images, self.logits)
        self._taught = (taught if isinstance(taught, Tensor) else taught[1]).float().sum() + self._taught
        return taught

    def advice(self) -> str:
        if not self._taught.isfinite():
            return (
                "The outputs without merging are not finite themselves: look at the model's weights and at the images "
                "for values that are corrupt or far too large, and at amp"
            )
        return super().advice()


def _check(model: nn.Module, target: str, train: str) -> None:
    targets, trained = ("distill", "labels"), ("embeddings", "all")
    if target not in targets or train not in trained:
        raise ValueError(f"target must be one of {targets} and train one of {trained}, got {target!r} and {train!r}")
    merger = getattr(model, "merger", None)
    if not isinstance(model, TokenViT) or merger is None:
        raise ValueError(f"this {type(model).__name__} merges no tokens: apply_dtem_merging(model) gives it a merger")
    if merger.embed is None and train == "embeddings":
        raise ValueError("metric='keys' has no embeddings to train: use metric='learned', or train='all'")
    if target == "labels" and not classifies(model):
        raise ValueError(
            "target='labels' needs a model that classifies: give it classes with model.reset_classifier(num_classes), "
            "or use target='distill', which compares features"
        )
    for name, module in model.base.named_modules():
        if is_quantized(module):
            raise ValueError(
                f"base.{name} is quantised and passes no gradients: train the merger on the model before it was "
                "quantised, save_merger it, and give it to the quantised one by apply_dtem_merging(vit, weights=...)"
            )
    check_weights(model)


def _range(r: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(lowest, highest) r of a step."""
    if r is None:
        return None
    bounds: Sequence[Any] = (r, r) if isinstance(r, int) else tuple(r)
    if len(bounds) != 2 or not all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds):
        raise TypeError(f"r must be an int or a range (lowest, highest) of ints, got {r!r}")
    lowest, highest = bounds
    if not 1 <= lowest <= highest:
        raise ValueError(f"r must be at least 1, and a range go from the lowest to the highest, got {r!r}")
    return lowest, highest


def _may_be_unused(model: TokenViT, bounds: tuple[int, int] | None, everything: bool) -> bool:
    """Whether a step may leave parameters without gradients: embeddings of blocks that merge nothing, and others."""
    counts = [model.token_counts(r) for r in (bounds or (None,))]
    merges = all(before > after for tokens in counts for before, after in pairwise(tokens))
    return everything or not merges
