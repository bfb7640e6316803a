"""The steps of every recipe, as the command builds them, equal plain formulas of what was published.

The formulas are written anew here, from the papers and their code; nothing is read from the recipes' files. A run has
as many epochs as was published, but of `EPOCH` steps each; where the code of a paper changes something once per epoch
and this package with every step, they are compared where an epoch starts. A learning rate of a warm-up may be one
step ahead: papers' codes differ in whether a warm-up of W steps ends at step W or W - 1, and a schedule of T steps at
step T - 1 or T.
"""

import math
import random
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from typing import NamedTuple

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from torchvision.transforms import InterpolationMode

from timm_tokens.cli.config import recipe_values
from timm_tokens.cli.parser import build
from timm_tokens.recipes import load, names
from timm_tokens.training import Settings
from timm_tokens.training.batches import Plan
from timm_tokens.training.optimization import Optimization

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of timm's data sets

EPOCH = 10  # steps
VIT = {"patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2}


# --- schedules, by epoch or step and their number ---


def half_cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def warm_then_cosine(peak, end, warm, start):
    """DINO, iBOT, BEiT (DTM) and MIRA: a line to the peak, then half a cosine over what is left."""
    return lambda at, epochs: (
        start + (peak - start) * at / warm if at < warm else half_cosine(peak, end, (at - warm) / (epochs - warm))
    )


def warm_and_cosine(peak, end, warm, start):
    """timm and Swin: half a cosine over the whole run, whose beginning the warm-up hides."""
    return lambda at, epochs: start + (peak - start) * at / warm if at < warm else half_cosine(peak, end, at / epochs)


def over_the_run(start, end):
    return lambda at, epochs: half_cosine(start, end, at / epochs)


def constant(value):
    return lambda at, epochs: value


def risen(start, end, epochs):
    """A line of so many values, one for each epoch, and then the last of them."""
    return lambda at, _: start + (end - start) * min(int(at) / (epochs - 1), 1)


def within_a_step(schedule, epoch, epochs):
    """What the schedule has at an epoch's start, or a step from there."""
    value = schedule(epoch, epochs)
    return pytest.approx(value, rel=1e-6, abs=abs(schedule(epoch + 1 / EPOCH, epochs) - value))


# --- which parameters have no weight decay ---


def vectors(name, shape):
    return len(shape) == 1 or name.endswith(".bias")


def vectors_and_positions(name, shape):
    return vectors(name, shape) or name.rpartition(".")[2] in ("pos_embed", "cls_token")


class Published(NamedTuple):
    """What a paper's code does; global batches, epochs and rates of the published runs."""

    batch: int
    epochs: int
    lr: Callable
    weight_decay: Callable
    exempt: Callable
    clip: tuple[str, float] | None
    drop_path: float
    adam: tuple[float, float, float] | None  # betas and eps; None: LARS
    momentum: Callable | None = None  # of the teacher
    frozen_epochs: float = 0
    ema: float | None = None


def dino(batch, epochs, **changes):
    lr = warm_then_cosine(5e-4 * batch / 256, 1e-6, 10, 0)
    decay, momentum = over_the_run(0.04, 0.4), over_the_run(0.996, 1)
    run = Published(
        batch, epochs, lr, decay, vectors, ("parameter", 3.0), 0.1, (0.9, 0.999, 1e-8), momentum, frozen_epochs=1
    )
    return run._replace(**changes)


def mira(epochs):
    lr = warm_then_cosine(0.3 * 4096 / 256, 0, 10, 0.3)
    decay, momentum = constant(1e-6), over_the_run(0.99, 1)
    return Published(4096, epochs, lr, decay, vectors, None, 0, None, momentum, frozen_epochs=1)


def lvvit(peak, drop_path):
    lr = warm_and_cosine(peak, 1e-5, 5, 1e-6)
    adam, exempt = (0.9, 0.999, 1e-8), vectors_and_positions
    return Published(1024, 300, lr, constant(0.05), exempt, None, drop_path, adam, ema=0.99992)


ADAM = (0.9, 0.999, 1e-8)
RUNS = {
    ("mte", "dino"): dino(512, 100),
    ("mte", "dino-boosted"): dino(1024, 300),
    ("mte", "ibot"): dino(1024, 800),
    ("mte", "moby"): Published(
        512,
        300,
        warm_and_cosine(1e-3, 5e-6, 5, 5e-7),
        constant(0.05),
        vectors,
        ("norm", 5.0),
        0.2,
        ADAM,
        over_the_run(0.99, 1),
    ),
    ("mira", "mira"): mira(800),
    ("mira", "mira-multicrop"): mira(400),
    ("dtm", "dtm"): Published(  # beta2 is open there
        2048,
        300,
        warm_then_cosine(1.5e-3, 1e-5, 5, 0),
        constant(0.05),
        vectors_and_positions,
        ("norm", 3.0),
        0.1,
        (0.9, 0.98, 1e-8),
    ),
    ("token-label", "lvvit-s"): lvvit(1.6e-3, 0.1),
    ("token-label", "lvvit-m"): lvvit(1.6e-3, 0.2),
    ("token-label", "lvvit-l"): lvvit(1e-3, 0.3),
    ("token-label", "lvvit-s-384"): Published(
        512, 300, warm_and_cosine(5e-6, 5e-6, 5, 1e-6), constant(1e-8), vectors_and_positions, None, 0.1, ADAM
    ),
    ("dtem", "dtem"): Published(1024, 30, over_the_run(1e-4, 1e-6), constant(1e-4), vectors, ("norm", 5.0), 0, ADAM),
}
SMALL = {  # what makes the models small; all else is the recipe's
    "mte": {"model": "vit_small_patch16_224", "prototypes": 12, "head_hidden": 8, "num_pooled": 0},
    "mira": {"model": "test_resnet", "prototypes": 12, "head_hidden": 8, "head_dim": 4},
    "dtm": {"model": "beit_base_patch16_224", "teacher": "test_vit", "teacher_head": False},
    "token-label": {"model": "lvvit_s"},
    "dtem": {"model": "vit_small_patch16_224"},
}
SHAPES = {
    "mira": {},
    "dtm": {**VIT, "use_shared_rel_pos_bias": True, "global_pool": "token"},
    "token-label": {name: value for name, value in VIT.items() if name != "patch_size"},
}


class Built(NamedTuple):
    options: object
    settings: Settings
    task: torch.nn.Module
    dataset: object
    optimization: Optimization
    run: Published

    def start(self, epoch):
        """What holds for the step at this epoch, which need not be whole."""
        step, steps = round(epoch * EPOCH), self.run.epochs * EPOCH
        self.optimization.start_step(step)
        self.task.start_step(step, steps, EPOCH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for i in range(4):
        for split in ("train", "val"):
            path = root / "images" / split / ("n01440764", "n02102040")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 40), (60 * i, 100, 200)).save(path)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), root / "teacher.safetensors")
    save_file(timm.create_model("vit_small_patch16_224", **VIT).state_dict(), root / "vit.safetensors")
    return root


@pytest.fixture(scope="module")
def built(folder):
    """Every recipe, built as the command does, with small models."""
    return {key: make(folder, *key) for key in RUNS}


def make(folder, objective, name):
    module = import_module(f"timm_tokens.cli.train.{objective.replace('-', '_')}")
    given = {"out": folder / name, "data_dir": folder / "images", "workers": 0, "device": "cpu"} | SMALL[objective]
    given["model_kwargs"] = SHAPES.get(objective, VIT)
    if objective == "dtm":
        given["teacher_checkpoint"] = folder / "teacher.safetensors"
    if objective == "dtem":
        given["checkpoint"] = folder / "vit.safetensors"
    recipe, run = load(objective, name), RUNS[objective, name]
    options = build(module.Options, recipe_values(recipe, given) | given)
    torch.manual_seed(0)
    made = module.build(options)
    settings = Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)})
    settings = settings.scaled(run.batch // settings.batch_size)
    plan = Plan(run.batch, EPOCH, settings.epochs * EPOCH)
    task = made.task.train()
    return Built(options, settings, task, made.dataset, Optimization(task.student, settings, plan), run)


def test_every_published_recipe_is_held():
    known = {(objective, name) for objective in SMALL for name in names(objective)}
    assert {key for key in known if key[1] != "short"} == RUNS.keys()


def test_rates_and_weight_decay(built):
    for (_, name), it in built.items():
        run, groups = it.run, it.optimization.optimizer.param_groups
        assert it.settings.epochs == run.epochs, name
        for epoch in (0, 3, 30 if run.epochs > 30 else 20, run.epochs // 2, run.epochs - 1):
            it.start(epoch)
            lr = within_a_step(run.lr, epoch, run.epochs) if epoch <= 10 else pytest.approx(run.lr(epoch, run.epochs))
            assert all(group["lr"] == lr for group in groups), (name, epoch)
            none, decay = sorted({group["weight_decay"] for group in groups})
            assert (none, decay) == (0, within_a_step(run.weight_decay, epoch, run.epochs)), (name, epoch)


def test_parameters_without_weight_decay(built):
    for (_, name), it in built.items():
        named = {id(p): key for key, p in it.task.student.named_parameters() if p.requires_grad}
        found = {
            named[id(p)] for g in it.optimization.optimizer.param_groups for p in g["params"] if not g["weight_decay"]
        }
        grouped = [id(p) for g in it.optimization.optimizer.param_groups for p in g["params"]]
        assert sorted(grouped) == sorted(named), name
        shapes = {key: p.shape for key, p in it.task.student.named_parameters() if p.requires_grad}
        assert found == {key for key, shape in shapes.items() if it.run.exempt(key, shape)}, name


def fill_gradients(it, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in it.optimization.parameters:
        parameter.grad = size * torch.randn(parameter.shape, generator=generator)


def clipped(gradients, clip):
    if clip is None:
        return gradients
    kind, most = clip
    norms = [g.double().norm() for g in gradients]
    if kind == "norm":
        norms = [torch.stack(norms).norm()] * len(norms)
    return [g * min(1.0, most / float(norm)) for g, norm in zip(gradients, norms, strict=True)]


def test_a_step_in_the_middle(built):
    """The new weights are those of the published optimizer, after the published clipping."""
    for (_, name), it in built.items():
        run, at = it.run, it.run.epochs // 2
        it.start(at)
        fill_gradients(it, 10.0)
        gradients = clipped([p.grad.clone() for p in it.optimization.parameters], run.clip)
        before = [p.detach().clone() for p in it.optimization.parameters]
        it.optimization.step(lambda: None)
        names_of = {id(p): key for key, p in it.task.student.named_parameters()}
        lr, decay = run.lr(at, run.epochs), run.weight_decay(at, run.epochs)
        for parameter, old, gradient in zip(it.optimization.parameters, before, gradients, strict=True):
            key = names_of[id(parameter)]
            own = 0 if run.exempt(key, parameter.shape) else decay
            new = adamw(old, gradient, lr, own, run.adam[2]) if run.adam else lars(old, gradient, lr, own)
            torch.testing.assert_close(parameter.detach(), new, rtol=1e-3, atol=lr * 2e-4, msg=f"{name}: {key}")


def adamw(weights, gradient, lr, decay, eps):
    """Its first step, where the averages' corrections leave the gradient's sign."""
    return weights - lr * decay * weights - lr * gradient / (gradient.abs() + eps)


def lars(weights, gradient, lr, decay):
    """Vectors, which have no weight decay, are not adapted either."""
    if decay:
        gradient = gradient + decay * weights
        if weights.norm() > 0 and gradient.norm() > 0:
            gradient = gradient * 0.001 * weights.norm() / gradient.norm()
    return weights - lr * gradient


def test_momenta_of_optimizers(built):
    for (_, name), it in built.items():
        for group in it.optimization.optimizer.param_groups:
            if it.run.adam is None:
                assert (group["momentum"], group["dampening"], group["nesterov"]) == (0.9, 0, False), name
            else:
                assert (*group["betas"], group["eps"]) == it.run.adam, name


def test_teachers_and_frozen_prototypes(built):
    for (_, name), it in built.items():
        run = it.run
        assert it.settings.ema == run.ema, name
        if run.momentum is None:
            continue
        for epoch in (0, run.epochs // 3, run.epochs - 1):
            it.start(epoch)
            assert it.task.momentum == within_a_step(run.momentum, epoch, run.epochs), (name, epoch)
        prototypes = it.task.student.prototypes
        for epoch, expected in ((0, True), (0.9, True), (1, False)):
            it.start(epoch)
            if prototypes is None:
                continue
            for parameter in prototypes.parameters():
                parameter.grad = torch.ones_like(parameter)
            it.task.before_optimizer()
            frozen = all(parameter.grad is None for parameter in prototypes.parameters())
            assert frozen == (expected and run.frozen_epochs == 1), (name, epoch)


def test_stochastic_depth_is_the_students_alone(built):
    for (_, name), it in built.items():
        rates = [m.drop_prob for m in it.task.student.modules() if isinstance(m, DropPath)]
        depth = len(VIT) - 1
        wanted = (
            [it.run.drop_path * i / (depth - 1) for i in range(depth) for _ in range(2)] if it.run.drop_path else []
        )
        assert rates == pytest.approx([rate for rate in wanted if rate]), name
        teacher = getattr(it.task, "teacher", None)
        for module in () if teacher is None else teacher.modules():
            assert not (isinstance(module, DropPath) and module.training), name


TEMPERATURES = {  # of the teacher
    "dino": constant(0.04),
    "dino-boosted": risen(0.04, 0.07, 30),
    "ibot": risen(0.04, 0.07, 30),
}


def test_temperatures(built):
    for (_, name), it in built.items():
        if name in TEMPERATURES:
            losses = [it.task.criterion.baseline] + ([it.task.patch_criterion] if name == "ibot" else [])
            for epoch in (0, 10, 29, 60):
                it.start(epoch)
                within = (0.07 - 0.04) / 30  # it rises with every step here, with every epoch there
                for loss in losses:
                    expected = TEMPERATURES[name](epoch, it.run.epochs)
                    assert (loss.tau_student, loss.tau_teacher) == (0.1, pytest.approx(expected, abs=within)), name
                    assert loss.center.momentum == 0.9
            it.start(60)
            assert all(loss.tau_teacher == TEMPERATURES[name](60, 0) for loss in losses)
        if name == "moby":
            assert it.task.criterion.baseline.tau == 0.2
            assert it.task.criterion.baseline.queue.shape == (2, 4096, 256)
        if name.startswith("mira"):
            loss = it.task.criterion
            assert (loss.tau_student, loss.tau_teacher, loss.iterations) == (0.1, 0.225, 30)
            for epoch in (0, it.run.epochs // 3, it.run.epochs - 1):
                it.start(epoch)
                assert it.task.beta == pytest.approx(over_the_run(0.75, 2 / 3)(epoch, it.run.epochs), abs=1e-5)


# --- heads and losses ---


def test_sizes_of_heads(built):
    """As published, where the small models of this test have others."""
    sizes = {
        "dino": (65536, 2048, 256, False), "dino-boosted": (65536, 2048, 256, True), "ibot": (8192, 2048, 256, True),
        "moby": (None, 4096, 256, None), "mira": (3000, 2048, 256, False), "mira-multicrop": (3000, 2048, 256, False),
    }  # fmt: skip
    for name, (prototypes, hidden, width, learn_scale) in sizes.items():
        objective = "mira" if name.startswith("mira") else "mte"
        module = import_module(f"timm_tokens.cli.train.{objective}")
        options = build(module.Options, load(objective, name).options | {"out": "run", "data_dir": "images"})
        found = (options.prototypes, options.head_hidden, getattr(options, "head_dim", 256))
        assert found == (prototypes, hidden, width), name
        student = built[objective, name].task.student
        if prototypes is not None:
            assert (student.prototypes.scale is not None) == learn_scale, name
        heads = student.encoder.projector if objective == "mira" else student.encoder.heads
        norms = [module for module in heads.modules() if isinstance(module, torch.nn.BatchNorm1d)]
        assert len(norms) == (2 if objective == "mira" else name == "moby"), name
        crop_by_crop = student.encoder.crop_by_crop if objective == "mira" else student.crop_by_crop
        assert crop_by_crop == (objective == "mira" or name == "moby")


def test_losses_of_labels_and_tokens(built):
    for name in ("lvvit-s", "lvvit-m", "lvvit-l", "lvvit-s-384"):
        it = built["token-label", name]
        loss = it.task.loss
        found = (loss.cls_weight, loss.dense_weight, loss.smoothing, loss.ground_truth)
        assert (*found, it.task.mix, it.task.even_boxes) == (1, 1, 0.1, False, True, True), name
    dtm = built["dtm", "dtm"].task
    loss = dtm.criterion
    assert (loss.distance, loss.beta, loss.draws, loss.max_rounds, loss.min_tokens) == ("smooth_l1", 2, 2, 14, 0)
    assert dtm.masked_only is False
    dtem = built["dtem", "dtem"].task
    mixup = dtem.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1, 1, 0.5)
    assert (mixup.mode, mixup.label_smoothing, dtem.target) == ("batch", 0, "labels")
    merger = dtem.product.merger
    assert (merger.candidates, merger.tau1, merger.tau2) == (3, 0.1, 0.1)
    built["dtem", "dtem"].start(3)
    assert set(merger.schedule[:-1]) == {16}
    dtem.end_step()


# --- masks ---


def ibots_mask(rows, columns, draw):
    """A mask by rejection: rectangles of 16 patches (of 14 x 14) or more that mask something and not too much."""
    share = draw.uniform(0.1, 0.5) if draw.random() < 0.5 else 0
    wanted, masked = share * rows * columns, set()
    while len(masked) < wanted:
        for _ in range(10):
            left = wanted - len(masked)
            area = draw.uniform((min(rows, columns) // 3) ** 2, left)
            ratio = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (height < rows and width < columns):
                continue
            top, start = draw.randint(0, rows - height), draw.randint(0, columns - width)
            new = {(y, x) for y in range(top, top + height) for x in range(start, start + width)} - masked
            if 0 < len(new) <= left:
                masked |= new
                break
        else:
            break
    return len(masked)


def test_masks_of_ibot(built):
    task, many = built["mte", "ibot"].task, 400
    task.start_step(0, 100, 10)
    found = task._draw_mask([torch.zeros(1, 3, 224, 224).expand(many, -1, -1, -1)]).sum(1).float()
    draw = random.Random(0)
    expected = torch.tensor([ibots_mask(14, 14, draw) for _ in range(2 * many)]).float()
    assert len(found) == 2 * many
    for statistic in (lambda x: (x == 0).float().mean(), lambda x: x[x > 0].mean(), lambda x: x[x > 0].std()):
        assert float(statistic(found)) == pytest.approx(float(statistic(expected)), rel=0.12)


def test_masks_of_dtm(built):
    task = built["dtm", "dtm"].task
    mask = task._draw_masks(torch.zeros(50, 3, 224, 224)).view(-1, 14, 14)
    assert (mask.sum((1, 2)) == 75).all()
    alone = mask[:, 1:-1, 1:-1] & ~(mask[:, :-2, 1:-1] | mask[:, 2:, 1:-1] | mask[:, 1:-1, :-2] | mask[:, 1:-1, 2:])
    assert alone.sum() < 50  # in rectangles, of which the last one alone is cut


# --- images ---

GLOBAL, LOCAL = {"size": 224}, {"size": 96}
COLOURS = {"flip": 0.5, "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_prob": 0.8, "grayscale": 0.2, "blur_sigma": (0.1, 2.0)}
CROPS = {  # scales of global and local crops, local crops, interpolation
    "dino": ((0.4, 1.0), (0.05, 0.4), 8, "bicubic"),
    "dino-boosted": ((0.4, 1.0), (0.05, 0.4), 8, "bicubic"),
    "ibot": ((0.25, 1.0), (0.05, 0.25), 10, "bicubic"),
    "moby": ((0.08, 1.0), None, 0, "bilinear"),
    "mira": ((0.14, 1.0), None, 0, "bicubic"),
    "mira-multicrop": ((0.14, 1.0), (0.05, 0.14), 6, "bicubic"),
}


def test_crops(built):
    for (objective, name), it in built.items():
        if name not in CROPS:
            continue
        scale, local_scale, count, interpolation = CROPS[name]
        side = 224 if objective == "mte" else 160  # of test_resnet
        local_side = 96 if objective == "mte" else 69
        wanted = [
            COLOURS | {"size": side, "count": 1, "scale": scale, "blur": 1.0, "solarize": 0.0},
            COLOURS | {"size": side, "count": 1, "scale": scale, "blur": 0.1, "solarize": 0.2},
            COLOURS | {"size": local_side, "count": count, "scale": local_scale, "blur": 0.5, "solarize": 0.0},
        ]
        transform = it.dataset.transform
        assert len(transform.crops) == (3 if count else 2), name
        for crop, expected in zip(transform.crops, wanted, strict=False):
            assert {key: getattr(crop, key) for key in expected} == expected, name
            assert crop.ratio == (3 / 4, 4 / 3)
        for _, steps in transform.steps:
            assert steps.transforms[0].interpolation == InterpolationMode(interpolation), name
        crops, _ = it.dataset[0]
        assert [x.shape[-1] for x in crops] == [side] * 2 + [local_side] * count, name


def test_images_of_dtm(built):
    steps = {type(step).__name__: step for step in built["dtm", "dtm"].dataset.transform.transforms}
    crop, flip, jitter = (
        steps[name] for name in ("RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "ColorJitter")
    )
    assert (crop.size, tuple(crop.scale), tuple(crop.ratio)) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == InterpolationMode.BICUBIC and flip.p == 0.5
    assert [tuple(jitter.__dict__[name]) for name in ("brightness", "contrast", "saturation")] == [(0.6, 1.4)] * 3
    assert jitter.hue is None and steps.keys() <= {
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "ColorJitter",
        "MaybeToTensor",
        "Normalize",
    }


def test_images_of_classifiers(built):
    for objective, name, size in (
        ("token-label", "lvvit-s", 224), ("token-label", "lvvit-m", 224), ("token-label", "lvvit-l", 224),
        ("token-label", "lvvit-s-384", 384), ("dtem", "dtem", 224),
    ):  # fmt: skip
        transform = built[objective, name].dataset.transform.transforms[0]
        assert (transform.size, transform.scale, transform.ratio) == ((size, size), (0.08, 1), (3 / 4, 4 / 3)), name
        assert (transform.hflip, transform.vflip) == (0.5, 0)
        assert (transform.steps[-1] == transform._crop) == (objective == "token-label")
        names = {"bicubic"} if objective == "dtem" else {"bilinear", "bicubic"}
        assert {mode.value for mode in transform.interpolations} == names
        erase = transform.erase
        assert (erase.probability, erase.per_pixel, erase.min_count, erase.max_count) == (0.25, True, 1, 1)
        augment = transform.rand_augment
        assert augment.num_layers == (3 if name == "lvvit-l" else 2), name
        assert {(op.magnitude, op.magnitude_std, op.prob) for op in augment.ops} == {(9, 0.5, 0.5)}


def test_recipes_name_models_of_the_published_kind_and_statistics():
    for (objective, name), model in {
        ("mte", "dino"): "deit_small_patch16_224", ("mte", "dino-boosted"): "deit_small_patch16_224",
        ("mte", "ibot"): "deit_small_patch16_224", ("mte", "moby"): "deit_small_patch16_224",
        ("mira", "mira"): "resnet50", ("mira", "mira-multicrop"): "resnet50",
        ("token-label", "lvvit-s"): "lvvit_s", ("token-label", "lvvit-s-384"): "lvvit_s",
        ("token-label", "lvvit-m"): "lvvit_m", ("token-label", "lvvit-l"): "lvvit_l",
        ("dtem", "dtem"): "deit_small_patch16_224",
    }.items():  # fmt: skip
        assert load(objective, name).options["model"] == model
        cfg = timm.get_pretrained_cfg(model)
        assert (cfg.mean, cfg.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_the_student_of_dtm_is_that_of_its_authors():
    options = load("dtm", "dtm").options
    assert options["teacher"] == "vit_base_patch16_clip_224.openai" and options["teacher_head"]
    with torch.device("meta"):
        vit = timm.create_model(options["model"], num_classes=0, **options["model_kwargs"])
    assert (len(vit.blocks), vit.embed_dim, vit.patch_embed.patch_size, vit.pos_embed) == (12, 768, (16, 16), None)
    tables = [name for name, _ in vit.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 1 + 12 and isinstance(vit.norm, torch.nn.LayerNorm)
    assert timm.create_model(options["model"], depth=1, **options["model_kwargs"]).blocks[0].gamma_1.eq(0.1).all()
