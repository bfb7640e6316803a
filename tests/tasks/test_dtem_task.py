import copy

import families
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from tiny import base, images, merging

import timm_tokens
from timm_tokens import TokenViT, apply_dtem_merging
from timm_tokens.outputs import classifies
from timm_tokens.tasks import DTEMTask


def steps(task, count, batch=8, lr=1e-2, target=None, seed=0):
    """Losses of some steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in task.student.parameters() if p.requires_grad], lr=lr)
    losses, x = [], images(batch, seed)
    for step in range(count):
        task.train().start_step(step, count, count)
        optimizer.zero_grad()
        out = task(x, target)
        out["loss"].backward()
        optimizer.step()
        task.end_step()
        losses.append(out["loss"].item())
    return losses


def test_logits_are_distilled_from_the_model_without_merging():
    model = merging(r=4)
    out = DTEMTask(model).train()(images())
    teacher = base()(images())
    student = merging(r=4).train()(images())
    torch.testing.assert_close(out["output"], student)
    expected = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    torch.testing.assert_close(out["loss"], expected)
    assert expected > 1e-3 and not torch.allclose(student, model.eval()(images()))  # relaxed


def test_features_are_distilled_where_there_are_no_classes():
    for family, head in (("class_token", {}), ("average", {}), ("attention_pool", {})):
        model = merging(family, r=4, base_args={"num_classes": 0} | head)
        out = DTEMTask(model).train()(images())
        student, teacher = model(images(), tokens=True), TokenViT(model.base)(images(), tokens=True)
        distances = [
            1 - F.cosine_similarity(s, t, dim=-1).mean()
            for s, t in ((student.cls, teacher.cls), (student.patches, teacher.patches))
        ]
        torch.testing.assert_close(out["loss"], sum(distances) / 2)
        assert out.keys() == {"loss"} and out["loss"] > 1e-3


def test_labels():
    model, classes = merging(r=4), torch.tensor([1, 0, 9])
    task = DTEMTask(model, target="labels").train()
    logits = model(images())
    torch.testing.assert_close(task(images(), classes)["loss"], F.cross_entropy(logits, classes))
    soft = torch.softmax(torch.randn(3, 10), dim=1)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task(images(), soft)["loss"], expected)


def test_the_embeddings_learn_alone():
    for target, share in (("distill", 0.9), ("labels", 0.985)):
        model = timm_tokens.add_aux_tokens(timm_tokens.token_label_head(merging(r=4)), 2, 2)
        before = copy.deepcopy(model.state_dict())
        task = DTEMTask(model, target=target)
        losses = steps(task, 30, target=torch.arange(8))
        assert sum(losses[-5:]) < share * sum(losses[:5])
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {name for name in before if name.startswith("merger.embed.")}
        assert not model.base.training and model.merger.training  # relaxed, around a frozen base
        assert task.product is model and model.merger.r == 4


def test_the_frozen_base_is_its_own_teacher():
    task = DTEMTask(merging(r=4))
    own = {id(p) for p in task.student.parameters()}
    assert {id(p) for p in task.parameters()} == own
    assert task.get_task_state().keys() == {f"trainable_module.{name}" for name in task.student.state_dict()}
    with torch.no_grad():
        task.product.base.head.bias += 1
    torch.testing.assert_close(task._teach(images()), task.product.base(images()))


def test_everything_learns_from_a_copy_of_what_it_was():
    model = merging(r=4)
    task, was = DTEMTask(model, train="all"), base()(images())
    losses = steps(task, 20, lr=1e-3)
    assert losses[-1] < 0.9 * losses[0]
    assert model.base.training and not torch.allclose(model.eval().base(images()), was, atol=1e-3)
    torch.testing.assert_close(task._teach(images()), was)
    again = DTEMTask(merging(r=2), train="all")
    again.load_task_state(task.get_task_state())
    torch.testing.assert_close(again._teach(images()), was)
    assert torch.equal(again.product.eval().base(images()), model.base(images()))


def test_training_free_merging_can_be_trained_around():
    model = merging(r=4, metric="keys")
    losses = steps(DTEMTask(model, train="all"), 10, lr=1e-4)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="metric='keys' has no embeddings to train"):
        DTEMTask(model)


def test_a_frozen_model_thaws_to_train_all():
    task = DTEMTask(merging(r=4).freeze_base(), train="all")
    assert all(p.requires_grad for p in task.student.parameters()) and task.train().product.base.training


def test_r_is_drawn_by_step_and_seed():
    task, drawn = DTEMTask(merging(r=7), r=(2, 5)), {}
    for seed in (0, 1):
        task.seed = seed
        for step in (*range(40), *range(40)):
            task.start_step(step, 40, 40)
            r = task.product.merger.r
            assert drawn.setdefault((seed, step), r) == r
            task.end_step()
            assert task.product.merger.r == 7
    draws = [[drawn[seed, step] for step in range(40)] for seed in (0, 1)]
    assert set(draws[0]) == {2, 3, 4, 5} and draws[0] != draws[1]


def test_one_r_while_training_and_the_models_own_afterwards():
    model, seen = merging(r=[3, 1]), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(module.merger.r))
    steps(DTEMTask(model, r=6), 2)
    assert seen == [6, 6] and model.merger.r == (3, 1)
    steps(DTEMTask(model), 1)
    assert seen[2] == (3, 1)


def test_r_stays_for_recomputed_blocks():
    def gradients(recompute):
        model = merging(r=1)
        model.set_grad_checkpointing(recompute)
        task = DTEMTask(model, r=5).train()
        task.start_step(0, 1, 1)
        task(images())["loss"].backward()
        return [p.grad for p in model.merger.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_every_family_learns():
    for name in families.MERGEABLE:
        for classes in (5, 0):
            vit = families.create(name)
            vit.reset_classifier(classes)
            model = apply_dtem_merging(vit, 5)
            out = DTEMTask(model).train()(families.images())
            out["loss"].backward()
            assert out["loss"].isfinite() and out["loss"] > 0, name
            for parameter in model.merger.parameters():
                assert parameter.grad.isfinite().all(), name
            assert sum(p.grad.abs().sum() for p in model.merger.embed[0].parameters()) > 0, name
            assert all(p.grad is None for p in vit.parameters()), name


def test_towers_that_project_do_not_classify():
    def vit(tag="openai", num_classes=10, architecture="vit_tiny_patch16_clip_224", pretrained_classes=10):
        model = merging(base_args={"num_classes": num_classes})
        model.base.pretrained_cfg = {"architecture": architecture, "tag": tag, "num_classes": pretrained_classes}
        return model

    for model, expected in (
        (vit(), False),
        (vit(architecture="vit_pe_core_tiny_patch16_384", tag="fb"), False),
        (vit(tag="openai_ft_in1k"), True),
        (vit(num_classes=7), True),  # a classifier instead of the projection
        (vit(num_classes=0), False),
        (vit(architecture="vit_tiny_patch16_224"), True),
        (merging(), True),
        (timm_tokens.token_label_head(vit(), 4), True),
    ):
        assert classifies(model) is expected, model.base.pretrained_cfg
    assert "output" not in DTEMTask(vit()).train()(images())
    openai = timm.create_model("vit_base_patch16_clip_224.openai", img_size=32, depth=1, embed_dim=48, num_heads=3)
    assert not classifies(apply_dtem_merging(openai))


def test_ddp_is_told_of_unused_embeddings():
    assert not DTEMTask(merging(r=3)).find_unused_parameters
    for r in ([3, 0], 3):
        task = DTEMTask(merging(r=r, depth=5 if r == 3 else 2), r=None if r != 3 else (1, 8))  # 8 + 4 + 2 + 1 of 16
        assert task.find_unused_parameters


def test_mixup_mixes_neighbours():
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.0, num_classes=10)
    x, classes, seen = images(6), torch.tensor([1, 0, 9, 3, 4, 5]), []
    task = DTEMTask(merging(r=3), target="labels", mixup=mixup)
    task.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for step in (0, 1, 0):
        task.train().start_step(step, 2, 2)
        out = task(x.clone(), classes)
        assert out.keys() == {"loss"}
    mixed = seen[0]
    share = ((mixed[0] - x[1]) / (x[0] - x[1])).median()  # what remains of the first image
    assert 0.01 < share < 0.99
    for row, (a, b) in enumerate(((0, 1), (2, 3), (4, 5), (5, 4), (3, 2), (1, 0))):
        torch.testing.assert_close(mixed[row], share * x[a] + (1 - share) * x[b])
    assert torch.equal(seen[2], mixed) and not torch.allclose(seen[1], mixed)
    logits, order = task.student(mixed), [0, 2, 4, 5, 3, 1]
    target = share * F.one_hot(classes[order], 10) + (1 - share) * F.one_hot(classes[order].flip(0), 10)
    torch.testing.assert_close(out["loss"], F.cross_entropy(logits, target))
    assert "output" in task.eval()(x, classes)  # not in evaluation
    with pytest.raises(ValueError, match="an even batch, got 3 images"):
        task.train()(images(3), classes[:3])
    with pytest.raises(ValueError, match="mode='batch', got 'elem'"):
        DTEMTask(merging(), mixup=Mixup(mode="elem"))
    assert DTEMTask(merging(), mixup=mixup).train()(images(2))["loss"] > 0  # no labels


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"target": "teacher"}, ValueError, "target must be one of .*'distill', 'labels'.*got 'teacher'"),
        ({"train": "head"}, ValueError, "got 'distill' and 'head'"),
        ({"r": 0}, ValueError, "r must be at least 1.*got 0"),
        ({"r": (8, 2)}, ValueError, r"from the lowest to the highest, got \(8, 2\)"),
        ({"r": (8, -1.0)}, TypeError, r"a range \(lowest, highest\) of ints, got \(8, -1.0\)"),
        ({"r": (1, 2, 3)}, TypeError, "a range"),
    ],
)
def test_what_can_not_be_meant_is_refused(options, error, match):
    with pytest.raises(error, match=match):
        DTEMTask(merging(), **options)


def test_models_that_do_not_fit_are_refused():
    for model in (base(), TokenViT(base())):
        with pytest.raises(ValueError, match="merges no tokens"):
            DTEMTask(model)
    with pytest.raises(ValueError, match="target='labels' needs a model that classifies"):
        DTEMTask(merging(base_args={"num_classes": 0}), target="labels")
    broken = merging()
    with torch.no_grad():
        broken.base.blocks[1].mlp.fc1.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"base\.blocks\.1\.mlp\.fc1\.weight of the model has 1 of 9216 numbers"):
        DTEMTask(broken)
