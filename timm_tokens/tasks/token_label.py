"""Training of classifiers with a label for every patch (Jiang et al., NeurIPS 2021, arXiv 2104.10858)."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.data import LabeledTarget
from timm_tokens.losses import TokenLabelLoss
from timm_tokens.ops import draw_mix_box, warp_token_labels
from timm_tokens.tasks.task import TokenTask, check_mixup
from timm_tokens.vit import TokenViT


class TokenLabelTask(TokenTask):
    """A classifier, with token labels where there are any.

        model = timm_tokens.token_label_head(timm.create_model("vit_small_patch16_224", num_classes=100))
        task = TokenLabelTask(model, num_classes=store.num_classes)
        task(images, target)["loss"].backward()  # target as TokenLabelDataset gives it, or just classes

    A model with a token-label head is trained with `loss` on all of its tokens, and MixToken; where the targets are
    classes (B,) or probabilities (B, K) alone, every token gets its image's. Any other timm classifier takes such
    targets only, and is trained as always: by cross entropy.

    Args:
        model: A TokenViT with a token-label head, or any timm classifier.
        loss: None: `TokenLabelLoss()`. Its smoothing holds for ordinary classifiers, too.
        mix: Whether to mix the patches of two images in a random box (MixToken). Partners are neighbours in the batch,
            the first and the second, the third and the fourth, ..., and a step has one box. So on several processes, or
            in accumulated parts, that hold an even number of images each, it is what it is for the whole batch at once.
        even_boxes: Whether MixToken's boxes have even extents, as in the paper's code, see `draw_mix_box`.
        mixup: Mixes images and classes with their neighbours' in training, by mixup or CutMix; MixToken is then off.
            Not for token labels. Its label smoothing must be 0, as the loss has one.
        num_classes: Number of classes of the labels, checked against the model's; None: not checked.
        seed: Seed of the run.

    Raises:
        ValueError: The labels have other classes than the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: TokenLabelLoss | None = None,
        *,
        mix: bool = True,
        even_boxes: bool = False,
        mixup: Mixup | None = None,
        num_classes: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, seed=seed)
        self.dense = isinstance(model, TokenViT) and model.head is not None
        self.loss = TokenLabelLoss() if loss is None else loss
        check_mixup(mixup)
        if mixup is not None and mixup.label_smoothing:
            raise ValueError(f"smooth labels by the loss, not by mixup, which has {mixup.label_smoothing}")
        self.mix, self.even_boxes, self.mixup = mix and mixup is None, even_boxes, mixup
        self.find_unused_parameters = isinstance(model, TokenViT) and _has_unused(model)
        if num_classes is not None:
            _check_classes(model, num_classes)

    def forward(self, input: Tensor, target: Any) -> dict[str, Tensor]:
        """The loss of images (B, 3, H, W) and their targets; "output": class logits (B, K), without the patches'.

        Raises:
            ValueError: Token labels are given to a model without a token-label head.
        """
        labelled = isinstance(target, LabeledTarget)
        if self.mixup is not None and self.training:
            if labelled:
                raise ValueError("mixup and CutMix mix classes, not token labels: leave them out, for MixToken")
            input, target = self.mix_neighbours(self.mixup, input, target)
        else:
            self.place_in_order(len(input))
        if not self.dense:
            if labelled:
                raise ValueError("token labels need a model with a token-label head: token_label_head(model)")
            output = self.trainable_module(input)
            loss = F.cross_entropy(output.float(), target, label_smoothing=self.loss.smoothing)
            return {"loss": loss, "output": output.detach()}
        if not (self.mix and self.training):
            return self._dense(input, target, None)
        order = self.place_mirrored(input)
        target = LabeledTarget(*(x[order] for x in target)) if labelled else target[order]
        box = draw_mix_box(self._grid(input), self.step_generator(), even=self.even_boxes)
        out = self._dense(input[order], target, box)
        return out | {"output": torch.empty_like(out["output"]).index_copy_(0, order, out["output"])}

    def _dense(self, input: Tensor, target: LabeledTarget | Tensor, box: Tensor | None) -> dict[str, Tensor]:
        logits = self.trainable_module(input, dense=True, box=box)
        if isinstance(target, LabeledTarget):
            truth, classes = target.label, logits.cls.shape[1]
            labels = warp_token_labels(target.values, target.indices, target.map, classes, self._grid(input))
            loss = self.loss(logits, labels, truth, box)
        else:
            loss = self.loss(logits, target, None, box)
        return {"loss": loss, "output": logits.cls.detach()}

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return blocks.grid_size(self.student.base, images.shape[-2:])


def _has_unused(model: TokenViT) -> bool:
    """Whether class logits may leave weights without a gradient, so that DDP must not wait for it: auxiliary and mask
    tokens, the embedding of a block that merges nothing, the base's classifier beside one of the head's own."""
    own = model.head is not None and model.head.cls is not None
    return own or any(part is not None for part in (model.aux, model.merger, model.mask_token))


def _check_classes(model: nn.Module, num_classes: int) -> None:
    """Refuse labels over other classes than the model's."""
    name, labelled = "the model", model
    if isinstance(model, TokenViT) and model.head is not None:
        name, labelled = "the model's token-label head", model.head
    count = labelled.num_classes
    if count != num_classes:
        raise ValueError(
            f"the labels are over {num_classes} classes, {name} has {count}: make the model with "
            f"num_classes={num_classes}, or annotate with a classifier of {count} classes"
        )
