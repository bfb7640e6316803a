"""What an MTE training step computes: losses, gradients, schedules, the teacher, what is logged."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer

import timm_tokens
from timm_tokens.data import random_ratio_masks
from timm_tokens.losses import DINOLoss, MoBYLoss, MTELoss
from timm_tokens.tasks import MTETask, PooledTokens

SMALL = dict(num_prototypes=20, hidden=24, width=8, queue_size=32)
OBJECTIVES = ["dino", "ibot", "moby"]


def vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    shape = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0, dynamic_img_size=True)
    return VisionTransformer(**shape | kwargs)


def make(objective="dino", num_cls=2, num_pooled=1, **kwargs):
    model = vit()
    if num_cls or num_pooled:
        model = timm_tokens.add_aux_tokens(model, num_cls, num_pooled, kernel_size=3)
    return MTETask(model, objective, **SMALL | kwargs)


def crops(objective="dino", batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (32, 32) if objective == "moby" else (32, 32, 16, 16, 16)
    return [torch.randn(batch, 3, size, size, generator=generator) for size in sizes]


def step(task, optimizer, number=0, total=6, per_epoch=2):
    task.start_step(number, total, per_epoch)
    optimizer.zero_grad()
    out = task(crops(task.objective, seed=number))
    out["loss"].backward()
    task.before_optimizer()
    optimizer.step()
    task.end_step()
    return out


def sgd(task, lr=0.1):
    return torch.optim.SGD(task.student.parameters(), lr)


def project(encoder, images, aux=True, mask=None):
    """Projected tokens, by hand: class token, auxiliary tokens, pooled tokens, each kind by its own head."""
    tokens = encoder.backbone(images, tokens=True, aux=aux, mask=mask)
    parts = [("cls", tokens.cls[:, None]), ("aux", tokens.aux_cls), ("pooled", tokens.pooled)]
    return torch.cat([encoder.heads[kind](x) for kind, x in parts if x is not None], 1), tokens.patches


@pytest.mark.parametrize("aux_on_local", [False, True])
@pytest.mark.parametrize("aux_target", ["ensemble", "own"])
def test_dino_by_hand(aux_on_local, aux_target):
    task = make(aux_on_local=aux_on_local, aux_target=aux_target)
    with torch.no_grad():
        for parameter in task.teacher.parameters():
            parameter.mul_(1.1)
    inputs = crops()
    weight = F.normalize(task.student.prototypes.weight, dim=1).T
    student = [project(task.student.encoder, x, aux=i < 2 or aux_on_local)[0] @ weight for i, x in enumerate(inputs)]
    teacher_weight = F.normalize(task.teacher.prototypes.weight, dim=1).T
    teacher = [project(task.teacher.encoder, x)[0] @ teacher_weight for x in inputs[:2]]
    expected = MTELoss(DINOLoss(20, num_tokens=4), aux_target=aux_target)(student, teacher)
    out = task(inputs)
    torch.testing.assert_close(out["loss"], expected.loss)
    for i, name in enumerate(["cls", "aux0", "aux1", "pooled0"]):
        torch.testing.assert_close(out[f"loss/{name}"], expected.token_losses[i])
        torch.testing.assert_close(out[f"agreement/{name}"], expected.agreement[i])


def test_ibot_by_hand():
    """DINO's loss on the masked student, and the patches of each image, each view, one after the other."""
    task, inputs = make("ibot"), crops("ibot")
    mask = task._draw_mask(inputs)
    task.start_step(0, 1, 1)  # the same draws again
    assert mask.shape == (8, 16) and mask.any() and not mask.any(1).all()
    weight = F.normalize(task.student.prototypes.weight, dim=1).T
    student, patches, teacher, target = [], [], [], []
    for view, x in enumerate(inputs):
        masked = mask[4 * view : 4 * view + 4] if view < 2 else None
        x_student, u = project(task.student.encoder, x, aux=view < 2, mask=masked)
        student.append(x_student @ weight)
        if view < 2:
            patches.append(task.student.encoder.heads["cls"](u) @ weight)
            x_teacher, u = project(task.teacher.encoder, x)
            teacher.append(x_teacher @ weight)
            target.append((task.teacher.encoder.heads["cls"](u) @ weight / 0.04).softmax(-1))
    expected = MTELoss(DINOLoss(20, num_tokens=4))(student, teacher).loss
    patch = 0
    for view in range(2):
        for i in range(4):
            rows = mask[4 * view + i]
            losses = -(target[view][i] * (patches[view][i] / 0.1).log_softmax(-1)).sum(-1)
            patch += losses[rows].mean() / 8 if rows.any() else 0
    out = task(inputs)
    torch.testing.assert_close(out["loss/patch"], patch.detach())
    torch.testing.assert_close(out["loss"], expected + patch)


@pytest.mark.parametrize("center", ["masked", "all"])
def test_ibots_patch_centre_by_hand(center):
    """The mean of the teacher's logits of the masked patches, or of all patches of the global crops, as published."""
    task, inputs = make("ibot", patch_center=center).train(), crops("ibot")
    other, mask = make("ibot"), make("ibot")._draw_mask(inputs)
    weight = F.normalize(task.teacher.prototypes.weight, dim=1).T
    patches = torch.cat([project(task.teacher.encoder, x)[1] for x in inputs[:2]])
    logits = task.teacher.encoder.heads["cls"](patches) @ weight
    out = task(inputs)
    expected = logits[mask] if center == "masked" else logits.flatten(0, 1)
    torch.testing.assert_close(task.patch_criterion.center.value, 0.1 * expected.mean(0))
    torch.testing.assert_close(out["loss"], other(inputs)["loss"])  # the centre is for the next step


def test_masks_as_ibots_code_draws_them():
    task = make("ibot", exact_masks=False)
    generators = make("ibot").sample_generators(4)
    expected = [random_ratio_masks(4, (4, 4), exact=False, generator=generators) for _ in range(2)]
    assert torch.equal(task._draw_mask(crops("ibot")), torch.cat(expected))


@pytest.mark.parametrize("objective", ["dino", "moby"])
def test_crop_by_crop(objective):
    """Batch norms of heads see one crop of each image at a time, in the teacher and the student."""
    options = dict(crop_by_crop=True) | ({} if objective == "moby" else {"batch_norm": True})
    apart, together = (make(objective, **options | dict(crop_by_crop=x)).train() for x in (True, False))
    seen, inputs = [], crops(objective)
    for part in (apart, together):  # without batch statistics it is the same
        part.criterion.eval()
        for module in (*part.student.modules(), *part.teacher.modules()):
            if isinstance(module, torch.nn.BatchNorm1d):
                module.eval()
                module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    torch.testing.assert_close(apart(inputs)["loss"], together(inputs)["loss"])
    seen.clear()
    for part in (apart, together):
        for module in (*part.student.modules(), *part.teacher.modules()):
            if isinstance(module, torch.nn.BatchNorm1d):
                module.train()
    loss = apart(inputs)["loss"]
    assert set(seen) == {4, 8}  # of 4 images, one token of a kind or two
    assert not torch.allclose(loss, together(inputs)["loss"])


@pytest.mark.parametrize("heads", ["shared", "kind"])
def test_moby_by_hand(heads):
    task, inputs = make("moby", heads=heads), crops("moby")
    kinds = ["cls", "aux", "pooled"] if heads == "kind" else ["cls", "cls", "cls"]
    with torch.no_grad():
        for i, parameter in enumerate(task.student.parameters()):
            parameter.mul_(1 + 0.01 * i)  # heads that are no longer alike
    for module in (task.student, task.teacher):
        for part in module.modules():
            part.training = False  # batch norm of a view at a time is then that of all together
    queries, keys = [], []
    for x in inputs:
        for encoder, out in ((task.student.encoder, queries), (task.teacher.encoder, keys)):
            tokens = encoder.backbone(x, tokens=True)
            parts = (tokens.cls[:, None], tokens.aux_cls, tokens.pooled)
            out.append([encoder.heads[kind](part) for kind, part in zip(kinds, parts, strict=True)])
    predictor = task.student.predictor
    queries = [[predictor[kind](part) for kind, part in zip(kinds, q, strict=True)] for q in queries]
    expected = MTELoss(MoBYLoss(8, 32))([torch.cat(q, 1) for q in queries], [torch.cat(k, 1) for k in keys])
    out = task(inputs)
    torch.testing.assert_close(out["loss"], expected.loss)
    torch.testing.assert_close(out["entropy/pooled0"], expected.entropy[3])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_auxiliary_tokens_it_is_the_baseline(objective):
    """The same loss and gradients, exactly, from a model without the part and one whose part has no tokens."""
    plain = MTETask(vit(), objective, **SMALL)
    empty = MTETask(timm_tokens.add_aux_tokens(vit(), 0, 0), objective, **SMALL)
    empty.load_state_dict(plain.state_dict())
    losses = [task(crops(objective))["loss"] for task in (plain, empty)]
    gradients = [
        torch.autograd.grad(loss, list(task.student.parameters()), allow_unused=True)
        for loss, task in zip(losses, (plain, empty), strict=True)
    ]
    assert torch.equal(*losses) and len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)
    if objective == "dino":  # and it is DINO
        inputs, encoder = crops(), plain.student.encoder
        weight = F.normalize(plain.student.prototypes.weight, dim=1).T
        views = [encoder.heads["cls"](encoder.backbone.base(x)) @ weight for x in inputs]
        torch.testing.assert_close(losses[0], DINOLoss(20)(views, [v.detach() for v in views[:2]]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_reach_the_student_alone(objective):
    task = make(objective, frozen_epochs=0)
    task(crops(objective))["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    assert [name for name, p in task.student.named_parameters() if p.grad is None] == []


def test_the_distillation_leaves_what_only_auxiliary_tokens_use():
    task = make()
    views = task.trainable_module(crops())
    sum(view[:, 0].square().sum() for view in views.tokens).backward()  # of the global token, as L_distil is
    reached = {name for name, p in task.student.named_parameters() if p.grad is not None and p.grad.any()}
    only = {n for n, _ in task.student.named_parameters() if ".aux" in n or ".pooled" in n}
    assert only and not reached & only
    assert {n for n, _ in task.student.named_parameters()} - only == reached


@pytest.mark.parametrize("objective", ["dino", "ibot"])
def test_prototypes_rest_for_the_first_epoch(objective):
    task = make(objective)
    optimizer = torch.optim.AdamW(task.student.parameters(), 0.1, weight_decay=0.5)
    first = task.student.prototypes.weight.detach().clone()
    for number in range(3):
        step(task, optimizer, number)
        assert torch.equal(task.student.prototypes.weight, first) == (number < 2)


def test_schedules():
    task = make(tau_epochs=2)
    task.start_step(0, 100, 10)
    assert (task.momentum, task.frozen, task.criterion.baseline.tau_teacher) == (0.996, True, 0.04)
    task.start_step(10, 100, 10)
    assert not task.frozen and 0.996 < task.momentum < 1 and 0.05 < task.criterion.baseline.tau_teacher < 0.06
    task.start_step(99, 100, 10)
    assert task.momentum == 1 and task.criterion.baseline.tau_teacher == pytest.approx(0.07)
    patches = make("ibot", tau_teacher=(0.1, 0.1))
    assert patches.patch_criterion.tau_teacher == patches.criterion.baseline.tau_teacher == 0.1
    assert make("moby").momentum == 0.99


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_teacher_follows_by_name(objective):
    task = make(objective, momentum=(0.9, 0.9), frozen_epochs=0)
    before = copy.deepcopy(task.teacher.state_dict())
    assert {name for name in before if "aux" in name} and not any(name.startswith("predictor") for name in before)
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(0.1)  # a bias in front of a batch norm would not move by itself
    step(task, sgd(task))
    student = task.student.state_dict()
    for name, value in task.teacher.state_dict().items():
        if value.is_floating_point():
            if "running" not in name:  # the teacher's batch norms see batches of their own
                torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * student[name], msg=name)
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_logged(objective):
    task = make(objective)
    features = []
    task.student.encoder.backbone.register_forward_hook(lambda *args: features.append(args[-1]))
    out = task(crops(objective))
    assert out["gradient/cls"] == 0
    for x in features[0]:
        x.retain_grad()
    out["loss"].backward()
    names = ["cls", "aux0", "aux1", "pooled0"]
    kinds = ["loss", "entropy", "marginal_entropy", "agreement", "cosine", "gradient"]
    expected = {f"{kind}/{name}" for kind in kinds for name in names} | {"loss"}
    assert set(out) - {"loss/patch"} == expected
    assert all(x.ndim == 0 and (name == "loss") == x.requires_grad for name, x in out.items())
    torch.testing.assert_close(out["gradient/cls"], features[0].cls.grad.norm(dim=1).sum())
    torch.testing.assert_close(out["gradient/aux1"], features[0].aux_cls.grad[:, 1].norm(dim=1).sum())
    assert out["agreement/cls"] <= 1 and -1 <= out["cosine/cls"] < 1


def test_the_loss_falls():
    for objective in OBJECTIVES:
        task = make(objective, momentum=(0.9, 0.9), tau_teacher=(0.07, 0.07), frozen_epochs=0)
        optimizer = torch.optim.AdamW(task.student.parameters(), 5e-3)
        losses = []
        for number in range(10):
            task.start_step(number, 10, 5)
            optimizer.zero_grad()
            out = task(crops(objective))  # the same images
            out["loss"].backward()
            optimizer.step()
            task.end_step()
            losses.append(out["loss"].item())
        assert losses[-1] < 0.9 * losses[0], objective


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_product_is_the_plain_vit(objective):
    task = make(objective)
    assert type(task.product) is VisionTransformer
    fresh = vit(seed=5)
    fresh.load_state_dict(task.product.state_dict())
    x = crops()[0]
    torch.testing.assert_close(fresh.eval()(x), task.product(x))


def test_heads_start_alike_and_part():
    task = make(frozen_epochs=0)
    heads = task.student.encoder.heads
    assert all(torch.equal(heads["cls"][0].weight, heads[kind][0].weight) for kind in ("aux", "pooled"))
    step(task, sgd(task))
    assert not any(torch.equal(heads["cls"][0].weight, heads[kind][0].weight) for kind in ("aux", "pooled"))


def test_a_batch_norm_sees_the_tokens_of_its_head():
    """With a head for each kind the global token's statistics are its own; a shared one counts all tokens."""
    for heads, rows in (("kind", 8), ("shared", 8 * 4)):
        task, seen = make("moby", heads=heads), []
        for head in (task.student.encoder.heads["cls"], task.student.predictor["cls"]):
            head[1].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(inputs[0])))
        task(crops("moby"))
        assert seen == [rows, rows]


def test_batch_norm_forgets_what_all_images_share():
    x, shared = torch.randn(32, 3, 24), 5 * torch.randn(24)
    for batch_norm in (False, True):
        head = make(batch_norm=batch_norm).student.encoder.heads["cls"]
        moved = (head(x + shared) - head(x)).abs().max()
        assert moved < 1e-4 if batch_norm else moved > 0.1


def test_learned_lengths_of_prototypes():
    task = make(learn_scale=True, frozen_epochs=0)
    step(task, sgd(task))
    assert task.student.prototypes.scale.std() > 0


@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext", "swin"])
@pytest.mark.parametrize("num_pooled", [0, 2])
def test_backbones_without_class_tokens(name, num_pooled):
    torch.manual_seed(0)
    if name == "swin":
        small = dict(img_size=32, window_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2), num_classes=0)
        base = timm.models.SwinTransformer(**small)
    else:
        base = timm.create_model(name, num_classes=0)
    task = MTETask(PooledTokens(base, num_pooled, kernel_size=3), frozen_epochs=0, **SMALL)
    inputs = [torch.randn(3, 3, 32, 32) for _ in range(2)]
    out = task(inputs)
    out["loss"].backward()
    assert (type(task.product) is type(base) and f"loss/pooled{num_pooled - 1}" in out) or not num_pooled
    assert all(p.grad is not None for p in task.student.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make("simclr"), "objective must be one of dino, ibot, moby, got 'simclr'"),
        (lambda: MTETask(vit(num_classes=10)), "has a classifier for 10 classes.*reset_classifier"),
        (lambda: make(aux_target="none"), "got 'none'"),
        (lambda: make("ibot", patch_center="none"), "patch_center must be 'masked' or 'all', got 'none'"),
        (lambda: make("ibot", crop_by_crop=True), "crop_by_crop is for DINO and MoBY, and iBOT encodes"),
        (lambda: make(heads="each"), "heads must be 'kind' or 'shared', got 'each'"),
        (
            lambda: MTETask(PooledTokens(timm.create_model("test_efficientnet", num_classes=0)), "ibot"),
            "iBOT masks patches, which takes a ViT",
        ),
        (lambda: make()(crops()[0]), "takes a list of 2 crops or more, got one tensor"),
        (lambda: make()(crops()[:1]), "got 1 crops"),
        (lambda: make("moby")(crops()), "takes two crops, both global, got 5 crops"),
        (lambda: make()(crops()[1:]), r"the first 2 crops are global, of one size, got .*\(4, 3, 16, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_model_that_cannot_be_driven_is_refused():
    with pytest.raises(TypeError, match=r"ConvNeXt|supported"):
        MTETask(timm.create_model("test_convnext", num_classes=0))
