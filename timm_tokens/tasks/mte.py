"""Pre-training without labels, with auxiliary tokens that teach the global one (MTE, arXiv 2411.15787).

Shapes: B images, V crops of each, T tokens of a crop, K prototypes.
"""

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.data import random_ratio_masks
from timm_tokens.distributed import batch_mean
from timm_tokens.losses import DINOLoss, IBOTPatchLoss, MoBYLoss, MTELoss, MTETerms
from timm_tokens.ops.ranges import check_counts, check_not_negative, check_positive, check_spans, check_within
from timm_tokens.tasks.baselines import BASELINES, make_student, token_backbone
from timm_tokens.tasks.schedules import cosine, linear, over_the_run
from timm_tokens.tasks.task import TokenTask
from timm_tokens.tasks.teacher import frozen_copy, update_teacher, use_batch_statistics
from timm_tokens.tasks.token_encoder import CropOutputs, token_counts


class MTETask(TokenTask):
    """DINO, iBOT or MoBY, with as many auxiliary tokens as the model has.

        vit = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True, drop_path_rate=0.1)
        task = MTETask(timm_tokens.add_aux_tokens(vit), "dino")

    A plain ViT is trained by the objective itself. The student sees all crops of an image; its teacher, a moving
    average of the student and its heads, sees the global ones. The result is `product`, a plain timm model without the
    auxiliary tokens: the teacher's backbone, or the student's for MoBY, as in the papers.

    Args:
        model: A TokenViT by `add_aux_tokens`, a plain timm ViT, or `PooledTokens` around any other timm model; with
            num_classes=0, and a ViT with dynamic_img_size=True if crops have several sizes. iBOT's mask token is added.
        objective: "dino", "ibot" (DINO and its patch loss) or "moby", which takes two crops.
        num_prototypes: K; None: the objective's, 65536 or 8192.
        hidden: Dimension of the heads' hidden layers; None: the objective's.
        width: Dimension that the heads project to.
        learn_scale: Whether prototypes learn their lengths (norm_last_layer=False).
        heads: "kind": a head for each kind of token; "shared": one for all.
        batch_norm: Whether the heads of DINO and iBOT have batch norm, as MoBY's always do. Not so in the papers, but
            where a run is short it keeps the images apart, see docs/mte.md.
        aux_target: What auxiliary tokens learn from; see `MTELoss`.
        include_global: Whether the global token is a member of the ensemble; see `MTELoss`.
        global_weight: Weight of the global token in the loss; see `MTELoss`.
        aux_on_local: Whether the student's local crops have auxiliary tokens, too, where they cost most.
        global_crops: How many crops the teacher sees: the first ones.
        tau_teacher: From and to, in a line over the first tau_epochs.
        momentum: Momentum of the teacher at the start and at the end, following a cosine; None: the objective's, to 1.
        frozen_epochs: Epochs at the start in which prototypes are frozen.
        mask_ratio: iBOT: range of the share of masked patches; see `random_ratio_masks`.
        mask_prob: iBOT: probability that an image is masked.
        exact_masks: iBOT: whether exactly the drawn share is masked, or as by iBOT's code; see `random_ratio_masks`.
        patch_weight: iBOT: weight of the patch loss.
        patch_center: iBOT: "masked": the patch loss is centred by the teacher's masked patches; "all": by all patches
            of the global crops, as in iBOT's code, which sends them all through the head.
        queue_size: MoBY: length of the key queue.
        crop_by_crop: Whether crops are encoded one by one, as in MoBY's code, so that batch norms see one crop of each
            image at a time. It is slower; otherwise crops of one size are encoded together.
        seed: Seed of the run.

    Raises:
        ValueError: If the model has a classifier, or a value is out of its range.
        TypeError: If the model can't be driven.

    Source: MTE (arXiv 2411.15787) as `MTELoss` has it; DINO, iBOT, MoBY (arXiv 2104.14294, 2111.07832, 2105.04553).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: str = "dino",
        *,
        num_prototypes: int | None = None, hidden: int | None = None, width: int = 256, learn_scale: bool = False,
        heads: str = "kind", batch_norm: bool = False,
        aux_target: str = "ensemble", include_global: bool = True, global_weight: float = 0.5,
        aux_on_local: bool = False, global_crops: int = 2,
        tau_teacher: tuple[float, float] = (0.04, 0.07), tau_epochs: float = 30,
        momentum: tuple[float, float] | None = None, frozen_epochs: float = 1.0,
        mask_ratio: tuple[float, float] = (0.1, 0.5), mask_prob: float = 0.5, exact_masks: bool = True,
        patch_weight: float = 1.0, patch_center: str = "masked",
        queue_size: int = 4096, crop_by_crop: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        counts = {"num_prototypes": num_prototypes, "hidden": hidden, "width": width, "global_crops": global_crops}
        check_counts(**{name: count for name, count in counts.items() if count is not None}, queue_size=queue_size)
        check_not_negative(tau_epochs=tau_epochs, frozen_epochs=frozen_epochs, patch_weight=patch_weight)
        check_positive(**{f"tau_teacher[{i}]": tau for i, tau in enumerate(tau_teacher)})
        _check_masks(mask_ratio, mask_prob, patch_center)
        check_within(momentum=momentum or 1.0)
        backbone, (own_hidden, prototypes, first) = token_backbone(model, objective), BASELINES[objective]
        prototypes = prototypes if num_prototypes is None else num_prototypes
        student = make_student(
            backbone, objective, num_prototypes=prototypes, hidden=hidden or own_hidden, width=width,
            learn_scale=learn_scale, heads=heads, batch_norm=batch_norm, crop_by_crop=crop_by_crop,
        )  # fmt: skip
        super().__init__(student, seed=seed)
        self.teacher: Any = cast(Any, use_batch_statistics(frozen_copy(student)))
        self.teacher.predictor = None
        self.objective, self.aux_on_local, self.global_crops = objective, aux_on_local, global_crops
        kinds = token_counts(backbone)
        self.names = ["cls"] + [f"{kind}{i}" for kind in ("aux", "pooled") for i in range(kinds.get(kind, 0))]
        moby = objective == "moby"
        self.criterion = MTELoss(
            MoBYLoss(width, queue_size) if moby else DINOLoss(prototypes, num_tokens=len(self.names)),
            aux_target=aux_target, include_global=include_global, global_weight=global_weight,
        )  # fmt: skip
        self.patch_criterion = IBOTPatchLoss(prototypes) if objective == "ibot" else None
        self.mask_ratio, self.mask_prob, self.exact_masks = mask_ratio, mask_prob, exact_masks
        self.patch_weight, self.patch_center = patch_weight, patch_center
        self.temperatures, self.tau_epochs, self.frozen_epochs = tau_teacher, tau_epochs, frozen_epochs
        self.momenta = momentum or (first, 1.0)
        self.start_step(0, 2, 1)

    @property
    def product(self) -> nn.Module:
        """The teacher's plain timm model, frozen: call requires_grad_() to train it further. Of MoBY the student's."""
        source = self.student if self.objective == "moby" else self.teacher
        return source.encoder.backbone.base

    def bound_to_length(self) -> list[str]:
        return over_the_run("teacher's momentum", self.momenta)

    def start_step(self, step: int, total_steps: int, steps_per_epoch: int) -> None:
        super().start_step(step, total_steps, steps_per_epoch)
        self.momentum = cosine(*self.momenta, step, total_steps)
        self.frozen = step < self.frozen_epochs * steps_per_epoch
        tau = linear(*self.temperatures, step, round(self.tau_epochs * steps_per_epoch))
        for criterion in (self.criterion.baseline, self.patch_criterion):
            if criterion is not None and hasattr(criterion, "tau_teacher"):
                criterion.tau_teacher = tau

    def forward(self, input: Tensor | list[Tensor], target: Any = None) -> dict[str, Tensor]:
        """The loss of V crops (B, 3, h, w), those that the teacher sees first.

        Returns:
            "loss", and of each token "loss/NAME", "entropy/NAME", "marginal_entropy/NAME", "agreement/NAME" (see
            `MTETerms`), "cosine/NAME", between its projection and the other tokens', and "gradient/NAME", the norm of
            the gradient of its feature. NAME is cls, aux0, ..., pooled0, ...; iBOT adds "loss/patch".
        """
        crops = self._check(input)
        device, mask, hidden, chosen = crops[0].device, None, None, None
        if self.patch_criterion is not None:  # the mask stays on the CPU, where its number of patches is known
            mask = self._draw_mask(crops)
            hidden = mask.to(device, non_blocking=True)
            chosen = mask.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
        options = dict(num_global=self.global_crops, aux_on_local=self.aux_on_local, mask=hidden, patches=chosen)
        self.place_in_order(len(crops[0]))
        student = self.trainable_module(crops, **options)
        with torch.no_grad():
            views, taught = crops[: self.global_crops], chosen
            if mask is not None and self.patch_center == "all":
                taught = torch.arange(mask.numel(), device=device)
            teacher = self.teacher(views, num_global=self.global_crops, patches=taught)
        terms = self.criterion(student.tokens, teacher.tokens)
        outputs = {"loss": terms.loss}
        if mask is not None and self.patch_criterion is not None:
            targets = teacher.patches if taught is chosen else teacher.patches.unflatten(0, mask.shape)
            patch = self.patch_criterion([student.patches], [targets], [mask])
            outputs = {"loss": terms.loss + self.patch_weight * patch, "loss/patch": patch.detach()}
        return outputs | self._log(terms, student, teacher)

    def before_optimizer(self) -> None:
        if self.frozen and self.student.prototypes is not None:
            for parameter in self.student.prototypes.parameters():
                parameter.grad = None  # not zero: weight decay and momentum would move them

    def followers(self) -> tuple[nn.Module, ...]:
        return (self.teacher,)

    def end_step(self) -> None:
        update_teacher(self.teacher, self.student, self.momentum)

    def _log(self, terms: MTETerms, student: CropOutputs, teacher: CropOutputs) -> dict[str, Tensor]:
        rows: dict[str, Any] = {
            "loss": terms.token_losses,
            "entropy": terms.entropy,
            "marginal_entropy": terms.marginal_entropy,
            "agreement": terms.agreement,
            "cosine": _cosines(teacher.projected),
            "gradient": student.gradient_norms,  # filled in by backward
        }
        return {f"{what}/{name}": row[i] for what, row in rows.items() for i, name in enumerate(self.names)}

    def _draw_mask(self, crops: list[Tensor]) -> Tensor:
        """(global_crops B, N) on the CPU."""
        generators = self.sample_generators(len(crops[0]))
        grid = blocks.grid_size(self.student.encoder.backbone.base, crops[0].shape[-2:])
        draw = partial(random_ratio_masks, ratio=self.mask_ratio, prob=self.mask_prob, exact=self.exact_masks)
        return torch.cat([draw(len(generators), grid, generator=generators) for _ in range(self.global_crops)])

    def _check(self, crops: Tensor | list[Tensor]) -> list[Tensor]:
        least, most = max(2, self.global_crops), 2 if self.objective == "moby" else 10**6
        if isinstance(crops, Tensor) or not least <= len(crops) <= most:
            got = "one tensor" if isinstance(crops, Tensor) else f"{len(crops)} crops"
            what = "two crops, both global" if most == 2 else f"a list of {least} crops or more"
            raise ValueError(f"MTETask({self.objective!r}) takes {what}, got {got}")
        if len({crop.shape for crop in crops[: self.global_crops]}) > 1:
            shapes = [tuple(crop.shape) for crop in crops]
            raise ValueError(f"the first {self.global_crops} crops are global, of one size, got {shapes}")
        return crops


def _check_masks(mask_ratio: tuple[float, float], mask_prob: float, patch_center: str) -> None:
    check_within(mask_ratio=mask_ratio, mask_prob=mask_prob)
    check_spans(low=-math.inf, mask_ratio=mask_ratio)
    if patch_center not in ("masked", "all"):
        raise ValueError(f"patch_center must be 'masked' or 'all', got {patch_center!r}")


def _cosines(projected: Tensor) -> Tensor:
    """(T,) mean cosine of each token's projection (B, T, D) with the others'; 1 for a single token."""
    x = nn.functional.normalize(projected.detach().float(), dim=-1)
    others = x.shape[1] - 1
    mean = batch_mean((x * (x.sum(1, keepdim=True) - x)).sum(-1))
    return mean / others if others else torch.ones_like(mean)
