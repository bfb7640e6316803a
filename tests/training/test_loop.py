"""The loop against plain torch, its schedules, what it refuses and what it writes."""

import math

import pytest
import timm
import torch
from runs import Follow, Points, nan_from, run, settings
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset

from timm_tokens.distributed import norms_of
from timm_tokens.tasks import TokenTask
from timm_tokens.training import Accuracy, Settings, train
from timm_tokens.training.batches import Plan, plan, step_batches, to_device
from timm_tokens.training.history import read
from timm_tokens.training.optimization import Optimization, clip, parameter_groups


class Plain(TokenTask):
    def forward(self, input, target=None):
        output = self.trainable_module(input)
        return {"loss": nn.functional.cross_entropy(output, target), "output": output}


class Fixed(Points):
    def __getitem__(self, index):
        return self.x[index], int(self.x[index, 0] > 0)


def test_is_the_loop_that_one_would_write(tmp_path):
    net, reference = nn.Linear(4, 2), nn.Linear(4, 2)
    reference.load_state_dict(net.state_dict())
    data = Fixed(10)
    options = settings(
        tmp_path, opt="momentum", momentum=0.0, weight_decay=0.0, sched="none", warmup_epochs=0, clip_grad=0.1
    )
    result = train(Plain(net), data, options)
    losses, norms = [], []
    for batch in step_batches(10, plan(data, options), options):
        x, y = torch.stack([data[i][0] for _, i in batch]), torch.tensor([data[i][1] for _, i in batch])
        loss = nn.functional.cross_entropy(reference(x), y)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt()
        with torch.no_grad():
            for p, g in zip(reference.parameters(), gradients, strict=True):
                p -= 0.05 * g * min(1, 0.1 / norm)
        losses.append(loss.item())
        norms.append(norm.item())
    torch.testing.assert_close(result.model.weight, reference.weight)
    assert [row["loss"] for row in read(tmp_path / "steps.csv")] == pytest.approx(losses)
    assert [row["grad_norm"] for row in read(tmp_path / "steps.csv")] == pytest.approx(norms)  # before clipping
    assert result.epochs[-1]["train_loss"] == pytest.approx(sum(losses[-2:]) / 2)


def test_two_parts_make_one_batch(tmp_path):
    halves, _ = run(tmp_path / "halves", Follow(0, 0), batch_size=5, accumulate=2)
    whole, _ = run(tmp_path / "whole", Follow(0, 0), batch_size=10)
    # The task's own buffer follows the last part alone, so it is compared where it plays no role: at the first step.
    first = [read(tmp_path / name / "steps.csv")[0]["loss"] for name in ("halves", "whole")]
    assert first[0] == pytest.approx(first[1])
    del halves, whole
    tasks = [Plain(nn.Sequential(nn.Linear(4, 2))) for _ in range(2)]
    tasks[1].load_state_dict(tasks[0].state_dict())
    for name, task, size in (("a", tasks[0], dict(batch_size=5, accumulate=2)), ("b", tasks[1], dict(batch_size=10))):
        train(task, Points(), settings(tmp_path / name, **size))
    torch.testing.assert_close(tasks[0].student[0].weight, tasks[1].student[0].weight)


def test_an_epoch_sees_every_image_once_and_another_order_each_time():
    options = settings(".", batch_size=3, accumulate=2)
    batches = list(step_batches(12, plan(range(12), options), options))
    epochs = [[i for batch in batches[4 * e : 4 * e + 4] for n, i in batch if n == e] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches[6:] == list(step_batches(12, plan(range(12), options), options, start=3))


def test_schedules(tmp_path):
    run(tmp_path, weight_decay=0.04, weight_decay_end=0.4, warmup_lr=0.01, min_lr=0.0)
    lr = [row["lr"] for row in read(tmp_path / "steps.csv")]
    cosine = [0.025 * (1 + math.cos(math.pi * t / 15)) for t in range(15)]
    assert lr == pytest.approx([0.01 + t * 0.04 / 5 for t in range(5)] + cosine[5:])
    module = nn.Linear(2, 2)
    optimization = Optimization(module, settings(tmp_path, weight_decay=0.04, weight_decay_end=0.4), Plan(4, 5, 15))
    optimization.start_step(14)
    assert [g["weight_decay"] for g in optimization.optimizer.param_groups] == [0.0, 0.4]


def test_what_a_part_exempts_from_weight_decay_stays_exempt():
    vit = timm.create_model("test_vit")
    groups = parameter_groups(nn.ModuleDict({"backbone": vit, "head": nn.Linear(4, 4)}), 0.1)
    free = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert id(vit.pos_embed) in free and id(vit.cls_token) in free and id(vit.patch_embed.proj.weight) not in free
    with pytest.raises(ValueError, match=r"layer_decay needs a model that sorts its layers .*: ModuleDict"):
        parameter_groups(nn.ModuleDict({"backbone": vit}), 0.1, layer_decay=0.7)


def test_clipping_each_parameter():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 4]), torch.tensor([0.1, 0, 0])
    clip(parameters, norms_of([p.grad for p in parameters[:2]]), 1.0, "parameter")
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0, 0.8]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.1, 0, 0]))


def test_nan_stops_with_the_last_good_checkpoint(tmp_path):
    good = r"the last good checkpoint is .*last.pth, after 6 steps"
    with pytest.raises(FloatingPointError, match=f"the loss is nan at step 7; {good}"):
        run(tmp_path / "loss", nan_from(7), log_every=100)
    saved = torch.load(tmp_path / "loss" / "last.pth")["task_state"]
    assert all(value.isfinite().all() for value in saved.values())
    task = Follow()
    task.before_optimizer = lambda: task.step == 7 and task.student[0].weight.grad.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=rf"; {good}"):
        run(tmp_path / "gradient", task)
    with pytest.raises(FloatingPointError, match=r"nan at step 0; there is no checkpoint yet"):
        run(tmp_path / "start", nan_from(0))


def test_writes_models_that_timm_loads(tmp_path):
    class Images(Fixed):
        def __getitem__(self, index):
            return torch.randn(3, 32, 32), index % 2

    options = dict(model_name="test_vit", num_classes=2, img_size=32)
    task = Plain(timm.create_model(**options))
    evaluate = Accuracy(Images(5), batch_size=2)
    result = train(task, Images(8), settings(tmp_path, epochs=2, ema=0.5, amp="bfloat16"), evaluate=evaluate)
    assert result.path == tmp_path / "model.safetensors" and not result.model.training
    for name in ("model.safetensors", "last.pth"):  # both give the average
        loaded = timm.create_model(**options, checkpoint_path=str(tmp_path / name))
        for key, value in result.model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
    assert not torch.equal(loaded.head.weight, task.product.head.weight)
    assert load_file(tmp_path / "best.safetensors").keys() == task.product.state_dict().keys()
    assert not list(tmp_path.glob(".*"))


def test_accuracy_counts_every_image_once():
    model = nn.Linear(4, 6)
    data = [(x, k % 6) for k, x in enumerate(torch.randn(11, 4))]
    logits = model(torch.stack([x for x, _ in data]))
    labels = torch.tensor([k for _, k in data])
    got = Accuracy(data, batch_size=4)(model)
    assert got["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert got["top5"] == pytest.approx(100 * (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item())


def test_evaluation_leaves_every_mode_as_it_was(tmp_path):
    task = Follow()
    task.student[2].eval()
    modes = []
    task.end_step = lambda: modes.append([m.training for m in task.student.modules()])
    run(tmp_path, task, epochs=2, evaluate=lambda model: {"quiet": float(not model.training)})
    assert all(all(mode) for mode in modes) and read(tmp_path / "summary.csv")[0]["eval_quiet"] == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(batch_size=21), ValueError, r"a batch takes 21 images \(21 x 1 parts x 1 processes\), and there are 20"),
        (dict(warmup_epochs=3), ValueError, "warm-up of 15 steps is not shorter than the run of 15: lower"),
        (dict(sched="none"), ValueError, "a warm-up takes a schedule: with sched none, warmup_epochs must be 0, got 1"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(lr=-1.0), ValueError, "lr must be above 0, got -1.0"),
        (dict(weight_decay=0.0, weight_decay_end=0.1), ValueError, "weight_decay_end needs weight_decay above 0"),
        (dict(ema=1.0), ValueError, "ema must be at least 0 and below 1, got 1.0"),
        (dict(amp="float16"), ValueError, "amp float16 needs a GPU"),
        (dict(opt="adamm"), ValueError, "adamm"),
        (dict(dataset=Stream()), TypeError, "Stream is a stream: training takes data sets with a length"),
    ],
)
def test_refuses_in_words(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path, **changes)


def test_scalars_must_stay_the_same(tmp_path):
    task = Follow()
    forward = task.forward
    task.forward = lambda x, y: forward(x, y) | ({"extra": torch.tensor(1.0)} if task.step else {})
    message = (
        r"the same scalars every step; \['loss', 'agreement', 'grad_norm'\] became \['loss', .*'extra', .*\] at step 1"
    )
    with pytest.raises(ValueError, match=message):
        run(tmp_path, task)


def test_moves_nests():
    moved = to_device({"a": [torch.ones(1)], "b": (None, torch.ones(2, dtype=torch.int64))}, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["b"][0] is None and moved["b"][1].is_meta


def test_settings_are_plain():
    assert Settings(out="x").curve().keys() >= {"lr", "seed", "batch_size"}
