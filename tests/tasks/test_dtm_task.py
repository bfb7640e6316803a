import copy

import families
import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import base, images

import timm_tokens
from timm_tokens.losses import DTMLoss
from timm_tokens.tasks import DTMTask


def vit(seed=0, **kwargs):
    """timm's smallest ViT for 32 px: 16 patches."""
    torch.manual_seed(seed)
    return timm.create_model("test_vit", **{"img_size": 32, "patch_size": 8, "num_classes": 0} | kwargs)


def make(seed=0, teacher=None, student=None, **kwargs):
    return DTMTask(vit(seed, **(student or {})), base() if teacher is None else teacher, **kwargs)


def optimizer_of(task):
    return torch.optim.AdamW(task.student.parameters(), lr=1e-2)


def train(task, optimizer, steps, total=6):
    losses = []
    for step in steps:
        task.start_step(step, total, 2)
        optimizer.zero_grad()
        out = task(images(4, seed=step))
        out["loss"].backward()
        optimizer.step()
        task.end_step()
        losses.append(out["loss"].item())
    return losses


@pytest.mark.parametrize("masked_only", [False, True])
def test_without_rounds_it_compares_tokens(masked_only):
    teacher = base()
    task = make(teacher=teacher, criterion=DTMLoss(rounds=()), masked_only=masked_only)
    mask = torch.rand(3, 16) < 0.5
    student = task.student.project(task.student.vit(images(), tokens=True, mask=mask).patches)
    targets = teacher.forward_features(images())[:, 1:]
    if masked_only:
        student, targets = student[mask], targets[mask]
    expected = F.smooth_l1_loss(student, targets, beta=2.0)
    torch.testing.assert_close(task([images(), mask])["loss"], expected)


def test_the_mask_hides_patches_from_the_student_alone():
    task, mask = make().eval(), torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 5] = True
    other = images()
    other[:, :, 8:16, 8:16] += 1  # patch 5
    torch.testing.assert_close(task.student(images(), mask), task.student(other, mask))
    assert not torch.allclose(task.student(images(), ~mask), task.student(other, ~mask))
    assert not torch.allclose(task.teacher(images()), task.teacher(other))


@pytest.mark.parametrize(("ratio", "count"), [(75 / 196, 6), (1.0, 16), (0.001, 1)])
def test_masks(ratio, count):
    task, seen = make(mask_ratio=ratio), []
    task.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    for step in (0, 1, 0):
        task.start_step(step, 2, 2)
        task(images(8))
    assert all(mask.dtype == torch.bool and (mask.sum(1) == count).all() for mask in seen)
    assert torch.equal(seen[0], seen[2]) and (count == 16 or not torch.equal(seen[0], seen[1]))


def test_draws_follow_the_step_and_the_seed():
    def losses(seed):
        task = make(seed=0, mask_ratio=1.0)  # no chance in the masks
        task.seed, found = seed, []
        for step in (0, 1, 0):
            task.start_step(step, 2, 2)
            found.append(task(images())["loss"].item())
        return found

    first = losses(3)
    assert first[0] == first[2] != first[1] and losses(4)[0] != first[0]


def test_gradients():
    teacher = base()
    task = make(teacher=teacher).train()
    before = copy.deepcopy(teacher.state_dict())
    train(task, optimizer_of(task), [0])
    assert all(parameter.grad is not None for parameter in task.student.parameters())
    assert not any(parameter.requires_grad for parameter in task.teacher.vit.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    torch.testing.assert_close(task.teacher.vit.state_dict(), before)
    assert not task.teacher.vit.training


@pytest.mark.parametrize("options", [{}, {"num_classes": 5}, {"class_token": False, "global_pool": "avg"}])
def test_unused_parameters_are_announced(options):
    task = make(student=options)
    train(task, optimizer_of(task), [0])
    assert task.find_unused_parameters == any(parameter.grad is None for parameter in task.student.parameters())


def test_it_learns():
    task = make(criterion=DTMLoss("cosine"))
    optimizer = optimizer_of(task)
    losses = []
    for step in range(30):
        task.start_step(step, 30, 30)
        optimizer.zero_grad()
        loss = task(images(8))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def test_a_mask_token_of_its_own_is_kept():
    student = timm_tokens.wrap.add_mask_token(vit())
    assert DTMTask(student, base()).student.vit is student


def test_the_product_is_the_plain_model():
    student = vit()
    task = DTMTask(student, base())
    assert task.product is student
    train(task, optimizer_of(task), [0])
    fresh = vit(seed=1)
    assert type(task.product) is type(fresh)
    fresh.load_state_dict(task.product.state_dict())
    torch.testing.assert_close(fresh.eval()(images()), student.eval()(images()))


def test_resumed_equals_uninterrupted():
    whole = make()
    expected = train(whole, optimizer_of(whole), range(6))
    first = make()
    optimizer = optimizer_of(first)
    losses = train(first, optimizer, range(3))
    state = copy.deepcopy((first.get_task_state(), optimizer.state_dict()))
    assert not any("teacher" in name for name in state[0])  # it never changes, and may be large
    second = make(seed=1)
    second.load_task_state(state[0])
    optimizer = optimizer_of(second)
    optimizer.load_state_dict(state[1])
    assert losses + train(second, optimizer, range(3, 6)) == expected
    torch.testing.assert_close(second.product.state_dict(), whole.product.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("ratio", [0, 1.2])
def test_bad_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match=rf"mask_ratio must be in \(0, 1\], got {ratio}"):
        make(mask_ratio=ratio)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (DTMLoss(rounds=[9]), r"rounds\[0\] = 9: .* half .* 8 of 16"),
        (DTMLoss(min_tokens=17), "between 0 and the 16 tokens that may merge, got 17"),
    ],
)
def test_what_cannot_be_morphed_is_refused_when_building(criterion, message):
    with pytest.raises(ValueError, match=message):
        make(criterion=criterion)


def test_any_criterion_will_do():
    def distance(student, teacher, mask, generator):
        return (student - teacher).abs().mean()

    make(criterion=distance)(images())["loss"].backward()


@pytest.mark.parametrize("family", families.DRIVABLE)
def test_any_family_is_a_student(family):
    student, pixels = families.create(family), families.images()
    task = DTMTask(student, base(), image_size=48)
    task.start_step(0, 2, 2)
    loss = task(pixels)["loss"]
    loss.backward()
    assert loss.isfinite() and task.product is student and task.teacher.size == (48, 48)
    unused = {name for name, parameter in task.student.named_parameters() if parameter.grad is None}
    assert task.find_unused_parameters == bool(unused) and not any("blocks" in name for name in unused)
    assert task.student.vit.mask_token.grad.any()


def test_images_of_another_size():
    student = vit(dynamic_img_size=True)
    with pytest.raises(ValueError, match=r"\(48, 64\) have 6 x 8 patches, .* built for 4 x 4: .*image_size=\(48, 64\)"):
        DTMTask(student, base())(torch.randn(2, 3, 48, 64))
    task = DTMTask(student, base(), image_size=(48, 64))
    assert task.grid == (6, 8) and task.teacher.size == (48, 64)
    task(torch.randn(2, 3, 48, 64))["loss"].backward()


def test_a_size_that_the_student_cannot_take_is_refused():
    with pytest.raises(ValueError, match=r"takes images of \(32, 32\), got image_size=48: .*img_size=\(48, 48\)"):
        DTMTask(base(), base(), image_size=48)


def test_students_that_cannot_be_driven_are_refused():
    with pytest.raises(TypeError, match="ResNet"):
        DTMTask(timm.create_model("test_resnet"), base())


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="student takes 2 channels and the teacher 3"):
        DTMTask(vit(in_chans=2), base())


def test_a_grey_student_of_a_colour_teacher():
    task = DTMTask(vit(in_chans=1), base())
    loss = task(torch.randn(4, 1, 32, 32))["loss"]
    loss.backward()
    assert loss.isfinite() and task.student.vit.base.patch_embed.proj.weight.grad.abs().max() > 0
