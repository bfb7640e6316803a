"""TokenLabelTask against the loss written out, MixToken, and what it does without token labels."""

import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import nn

import timm_tokens
from timm_tokens import seeding
from timm_tokens.data import LabeledTarget
from timm_tokens.losses import TokenLabelLoss
from timm_tokens.ops import crop_maps, draw_mix_box, warp_token_labels
from timm_tokens.tasks import TokenLabelTask


def labelled(batch=4):
    generator = torch.Generator().manual_seed(3)
    indices = torch.rand(batch, 10, 6, 6, generator=generator).argsort(1)[:, :3].int()
    values = torch.randn(batch, 3, 6, 6, generator=generator).half()
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6]]).expand(batch, 4)
    flips = torch.arange(batch) % 2 == 0
    return LabeledTarget(torch.arange(batch), values, indices, crop_maps(boxes, flips))


def task(**kwargs):
    torch.manual_seed(0)  # for the head
    task = TokenLabelTask(timm_tokens.token_label_head(tiny.base()), **kwargs).train()
    task.start_step(4, 10, 5)
    return task


@pytest.mark.parametrize("truth", [False, True])
@pytest.mark.parametrize("batch", [4, 5])
def test_is_the_loss_of_the_parts(batch, truth):
    loss = TokenLabelLoss(ground_truth=truth, smoothing=0.1)
    images, target, trained = tiny.images(batch), labelled(batch), task(loss=loss)
    out = trained(images, target)
    box = draw_mix_box((4, 4), task().step_generator())
    assert 0 < (box[2] - box[0]) * (box[3] - box[1]) < 16  # else this step would show nothing
    dense = warp_token_labels(target.values, target.indices, target.map, 10, (4, 4), dense=True)
    losses = 0
    for pair in torch.arange(batch).split(2):  # neighbours are partners; the last of an odd number is alone
        logits = trained.student(images[pair], dense=True, box=box)
        losses = losses + loss(logits, dense[pair], target.label[pair], box) * len(pair) / batch
        torch.testing.assert_close(out["output"][pair], logits.cls)
    torch.testing.assert_close(out["loss"], losses)
    assert not out["output"].requires_grad
    out["loss"].backward()
    assert trained.student.head.tokens.weight.grad.abs().sum() > 0


def test_even_boxes():
    even = task(even_boxes=True)
    box = draw_mix_box((4, 4), task().step_generator(), even=True)
    assert not torch.equal(box, draw_mix_box((4, 4), task().step_generator()))
    images = tiny.images(2)
    torch.testing.assert_close(even(images, labelled(2))["output"], even.student(images, dense=True, box=box).cls)


def test_mixing_is_for_training_and_can_be_left_out():
    images, target = tiny.images(4), labelled()
    plain = task(mix=False)(images, target)["loss"]
    mixed = task()
    assert mixed(images, target)["loss"] != plain
    torch.testing.assert_close(mixed.eval()(images, target)["loss"], plain)
    first, second = task(), task()
    assert first(images, target)["loss"] == second(images, target)["loss"]  # the same step, the same box


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_plain_targets_go_to_every_token(kind):
    target = torch.tensor([1, 2, 3, 4])
    target = target if kind == "classes" else F.one_hot(target, 10) * 0.9 + 0.01
    trained = task(mix=False)
    logits = trained.student(tiny.images(4), dense=True)
    torch.testing.assert_close(trained(tiny.images(4), target)["loss"], TokenLabelLoss()(logits, target))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_any_classifier_is_trained_as_always(name):
    model = timm.create_model(name, num_classes=7)
    trained = TokenLabelTask(model, TokenLabelLoss(smoothing=0.1))
    images, target = torch.randn(3, 3, *model.pretrained_cfg["input_size"][1:]), torch.tensor([0, 6, 2])
    torch.manual_seed(0)
    out = trained(images, target)
    torch.manual_seed(0)
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(model(images), target)
    torch.testing.assert_close(out["loss"], expected)
    assert trained.product is model
    with pytest.raises(ValueError, match="token labels need a model with a token-label head"):
        trained(images, labelled(3))


def test_refuses_labels_over_other_classes():
    vit = tiny.base()
    TokenLabelTask(vit, num_classes=10)
    with pytest.raises(ValueError, match=r"over 1000 classes, the model has 10: make the model with num_classes=1000"):
        TokenLabelTask(vit, num_classes=1000)
    with pytest.raises(ValueError, match=r"over 10 classes, the model's token-label head has 5"):
        TokenLabelTask(timm_tokens.token_label_head(vit, 5), num_classes=10)


def test_mixup_mixes_neighbours_and_the_loss_smooths():
    torch.manual_seed(0)
    model = tiny.base()
    mixup = Mixup(mixup_alpha=1.0, num_classes=10, label_smoothing=0.0)
    own, x, target = (
        TokenLabelTask(model, TokenLabelLoss(smoothing=0.1), mixup=mixup).train(),
        tiny.images(4),
        torch.arange(4),
    )
    own.seed = 3
    own.start_step(1, 2, 2)
    found = own(x, target)["loss"]
    with seeding.seeded(3, 1):
        lam = mixup._params_per_batch()[0]
    partner = torch.tensor([1, 0, 3, 2])
    logits = model(lam * x + (1 - lam) * x[partner]).log_softmax(1)
    truth = lam * F.one_hot(target, 10) + (1 - lam) * F.one_hot(target[partner], 10)
    torch.testing.assert_close(found, -((0.9 * truth + 0.01) * logits).sum(1).mean())
    own.eval()
    plain = F.cross_entropy(model(x), target, label_smoothing=0.1)
    torch.testing.assert_close(own(x, target)["loss"], plain)  # in training alone


def test_mixup_is_refused_where_it_makes_no_sense():
    def mixup(**options):
        return Mixup(cutmix_alpha=1.0, num_classes=10, **{"label_smoothing": 0.0} | options)

    with pytest.raises(ValueError, match="smooth labels by the loss, not by mixup, which has 0"):
        TokenLabelTask(tiny.base(), mixup=mixup(label_smoothing=0.1))
    with pytest.raises(ValueError, match="mixup must have mode='batch', got 'elem'"):
        TokenLabelTask(tiny.base(), mixup=mixup(mode="elem"))
    own = TokenLabelTask(timm_tokens.token_label_head(tiny.base()), mixup=mixup())
    assert not own.mix
    with pytest.raises(ValueError, match="needs an even batch, got 3 images"):
        own(tiny.images(3), torch.arange(3))
    labelled = LabeledTarget(torch.arange(2), *[torch.zeros(2, 1, 4, 4)] * 2, torch.eye(3).expand(2, 3, 3))
    with pytest.raises(ValueError, match="mixup and CutMix mix classes, not token labels"):
        own(tiny.images(2), labelled)
