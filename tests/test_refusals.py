"""Numbers that can't be meant are refused by every public function, by the argument's name, and not computed with."""

import math

import pytest
import timm
import torch

import timm_tokens
from timm_tokens import data, fewshot, losses, ops, probing, tasks, training
from timm_tokens.parts import AdaptivePool

NAN, INF = math.nan, math.inf
WRONG = {  # by what an argument is
    "from_0": (-1,),
    "from_1": (0, -1),
    "positive": (0.0, -1.0, NAN),
    "weight": (-1.0, NAN, INF),
    "share": (-0.1, 1.1, NAN),
    "below_1": (-0.1, 1.0, NAN),
    "choice": ("none",),
    "area": ((0.5, 0.2), (0.0, 1.0), (0.1, 1.1), (NAN, 1.0)),
    "momenta": ((0.5, 1.5), (-0.1, 1.0), (NAN, 1.0)),
}
CASES = {}


def case(function, right, other=None, **kinds):
    """A call that works; names of arguments by their kind; and values of other arguments that don't work."""
    wrong = {name: WRONG[kind] for kind, names in kinds.items() for name in names.split()}
    CASES[function] = (right, wrong | (other or {}))


def vit(**kwargs):
    return timm.create_model("test_vit", dynamic_img_size=True, img_size=32, **{"num_classes": 0} | kwargs)


x, size, scores = torch.randn(2, 9, 8), torch.ones(2, 9), torch.randn(2, 4, 4)
points, labels = torch.randn(20, 6), torch.arange(20) % 4
support, linear = torch.randn(1, 4, 6), torch.nn.Linear(2, 2)
features = dict(train_features=points, train_labels=labels, features=points, labels=labels)
maps = dict(values=torch.randn(1, 2, 3, 3), indices=torch.zeros(1, 2, 3, 3).int(), boxes=torch.tensor([[0.0, 0, 1, 1]]))
crop = data.Crop(32)
boxes = ((0, 0, 9, 9), (2, 0, 1, 1), (-1, 0, 1, 1))

case(ops.bipartite_match, dict(metric=x, r=2), from_0="r num_prefix_tokens")
case(ops.relaxed_top_k, dict(scores=scores, k=2), from_0="k", positive="tau1 tau2", from_1="candidates")
case(ops.relaxed_merge, dict(x=x, size=size, metric=x, r=2, effective=9), dict(effective=(-1, 10)),
     from_0="r num_prefix_tokens", positive="tau1 tau2", from_1="candidates")  # fmt: skip
case(ops.schedule, dict(r=2, depth=4), dict(r=(-1, (8, 2.0), (8, NAN), [1] * 5)), from_1="depth")
case(ops.aux_attention_mask, dict(num_tokens=5, num_prefix_tokens=1, num_aux=2), dict(num_prefix_tokens=(-1, 6)),
     from_0="num_tokens num_aux")  # fmt: skip
case(ops.soft_cross_entropy, dict(logits=x, target=x.softmax(-1)), positive="tau")
case(ops.mira_assign, dict(logits=x[0], tau=0.2, beta=0.5), positive="tau", below_1="beta", from_0="iterations")
case(ops.sinkhorn_assign, dict(logits=x[0]), positive="tau", from_0="iterations")
case(ops.local_intrinsic_dimensionality, dict(x=x, k=3), dict(k=(0, -1, 1)))
case(ops.morph_groups, dict(target=x, rounds=[2]), dict(rounds=([-1], [9]), num_prefix_tokens=(-1, 10)))
case(ops.draw_morph_rounds, dict(num_tokens=9, max_rounds=3), dict(min_tokens=(-1, 10), num_prefix_tokens=(-1, 10)),
     from_1="num_tokens max_rounds")  # fmt: skip
case(ops.draw_mix_box, dict(grid=(3, 3)), dict(grid=((0, 3), (3, -1))))
case(ops.mix_tokens, dict(x=x, box=(0, 0, 1, 1), grid=(3, 3)), dict(grid=((-3, -3),), box=((0, 0, 4, 3), *boxes)))
case(ops.mix_ratio, dict(box=(0, 0, 1, 1), num_tokens=9), dict(box=(*boxes, *map(torch.tensor, boxes))),
     from_1="num_tokens")  # fmt: skip
case(ops.crop_token_labels, dict(num_classes=3, size=2) | maps, dict(size=(0, -1, (2, 0))), from_1="num_classes")
case(losses.TokenLabelLoss, {}, weight="dense_weight cls_weight", below_1="smoothing")
case(losses.DINOLoss, dict(num_prototypes=8), from_1="num_prototypes num_tokens", positive="tau_student tau_teacher",
     share="center_momentum")  # fmt: skip
case(losses.IBOTPatchLoss, dict(num_prototypes=8), from_1="num_prototypes", positive="tau_student tau_teacher",
     share="center_momentum")  # fmt: skip
case(losses.MoBYLoss, {}, from_1="dim queue_size num_views", positive="tau")
case(losses.MTELoss, dict(baseline=losses.MoBYLoss()), share="global_weight", choice="aux_target")
case(losses.DTMLoss, {}, choice="distance", positive="beta", from_1="draws max_rounds", from_0="min_tokens")
case(losses.MIRALoss, {}, positive="tau_student tau_teacher")
case(fewshot.ESFR, {}, dict(neighbours=(2, -1)), from_1="num_nets period max_updates", below_1="dropout",
     positive="lr", weight="support_weight")  # fmt: skip
case(fewshot.sample_episodes, dict(labels=labels, ways=2, shots=1, queries=1, episodes=2),
     from_1="ways shots queries episodes")  # fmt: skip
case(fewshot.bd_cspn, dict(support=support, labels=torch.tensor([[0, 0, 1, 1]]), query=support), positive="temperature")
case(probing.knn_accuracy, features | dict(k=(3,)), dict(k=((0,), (21,), (-1,))), positive="temperature")
case(probing.linear_probe, features | dict(lrs=(0.1,), epochs=1), dict(lrs=((0.0,), (-1.0,), (NAN,), ())),
     from_1="epochs batch_size", share="momentum", below_1="held_out", weight="weight_decay")  # fmt: skip
case(data.block_masks, dict(count=3, grid=(4, 4), batch=2),
     dict(count=(-1, 17), grid=((0, 4),), aspect=((0.0, 1.0), (2.0, 1.0), (NAN, 1.0))),
     from_0="batch", from_1="min_block")  # fmt: skip
case(data.random_ratio_masks, dict(batch=2, grid=(4, 4)), dict(ratio=((-0.1, 0.5), (0.5, 0.1), (0.1, 1.1), (NAN, 0.5))),
     from_0="batch", share="prob")  # fmt: skip
case(data.MultiCrop, dict(crops=[crop]), dict(crops=[
    [], [crop._replace(size=0)], [crop._replace(count=0)], *([crop._replace(scale=area)] for area in WRONG["area"]),
    *([crop._replace(flip=share)] for share in WRONG["share"]),
]))  # fmt: skip
case(data.TokenLabelTransform, dict(img_size=32), dict(img_size=(0, -1, (4, 0)), ratio=((2.0, 1.0), (0.0, 1.0))),
     area="scale", share="hflip vflip re_prob")  # fmt: skip
case(timm_tokens.apply_dtem_merging, dict(model=vit(num_classes=3), r=1), dict(r=(-1, (4, 3.0))), choice="metric",
     from_1="embed_dim candidates", positive="tau1 tau2 flops_ratio")  # fmt: skip
case(timm_tokens.add_aux_tokens, dict(model=vit()), dict(kernel_size=(0, -1, 4)), from_0="num_cls num_pooled",
     choice="pool_weight")  # fmt: skip
case(timm_tokens.token_label_head, dict(model=vit(num_classes=3)), dict(pool_weight=(NAN, INF)), from_1="num_classes",
     choice="pool")  # fmt: skip
case(AdaptivePool, dict(dim=8), dict(kernel_size=(0, -1, 4)), from_1="num_pooled", choice="pool_weight")
case(tasks.MIRATask, dict(backbone=vit(), num_prototypes=8, hidden=8, width=8), dict(beta=((0.5, 1.0), (NAN, 0.5))),
     from_1="num_prototypes hidden width global_crops", momenta="momentum", weight="frozen_epochs")  # fmt: skip
case(tasks.MTETask, dict(model=timm_tokens.add_aux_tokens(vit(), 1, 1), num_prototypes=8, hidden=8, width=8),
     dict(tau_teacher=((0.0, 0.1), (0.1, -1.0), (NAN, 0.1)), mask_ratio=((0.5, 0.1), (-0.1, 0.5), (0.1, 1.1))),
     from_1="num_prototypes hidden width global_crops queue_size", choice="objective heads aux_target",
     share="global_weight mask_prob", weight="tau_epochs frozen_epochs patch_weight", momenta="momentum")  # fmt: skip
case(tasks.DTMTask, dict(student=vit(), teacher=vit()), dict(image_size=(0, -1, 33)), share="mask_ratio")
case(tasks.DTEMTask, dict(model=timm_tokens.apply_dtem_merging(vit(num_classes=3), 1)), dict(r=(-1, (3, 1), (-1, 2))),
     choice="target train")  # fmt: skip
case(tasks.update_teacher, dict(teacher=linear, student=linear, momentum=0.9), share="momentum")
case(training.Settings, dict(out="out"), dict(opt_betas=((1.0,), (-0.1,)), ema=(-0.1, 1.0), seed=(-1, 2**63)),
     from_1="epochs steps batch_size accumulate save_every eval_every log_every", from_0="workers", choice="clip_mode",
     positive="lr clip_grad", weight="min_lr warmup_lr warmup_epochs weight_decay", below_1="momentum")  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__qualname__)
def test_what_can_not_be_meant_is_refused(function):
    right, wrong = CASES[function]
    function(**right)
    passed = []
    for name, values in wrong.items():
        for value in values:
            try:
                function(**right | {name: value})
            except (ValueError, TypeError) as error:
                if not any(
                    word in str(error) for word in name.replace("crops", "crops_size_count_scale_flip").split("_")
                ):
                    passed.append(f"{name}={value} is refused by other words: {error}")
            except Exception as error:
                passed.append(f"{name}={value} ends in {error!r}")
            else:
                passed.append(f"{name}={value} is taken")
    assert not passed, "\n".join(passed)
