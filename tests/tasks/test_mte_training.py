"""MTE through the training loop: two processes give what one gives, and a run that is killed goes on as it was."""

import pytest
import torch
import torch.multiprocessing
from gloo import on_two
from timm.models import VisionTransformer
from torch.utils.data import Dataset

import timm_tokens
from timm_tokens.data import MultiCrop, dino_crops
from timm_tokens.tasks import MTETask
from timm_tokens.training import Settings, compiling, train
from timm_tokens.training.history import read

OBJECTIVES = ["dino", "ibot", "moby", "ibot, batch norm"]


class Noise(Dataset):
    def __init__(self, objective):
        self.images = torch.randint(256, (12, 3, 12, 12), generator=torch.Generator().manual_seed(0)).byte()
        self.transform = MultiCrop(dino_crops(16, 8, 0 if objective == "moby" else 1))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), 0


class Killed(Exception):
    pass


def run(objective, out, kill=None, drop_path=0.0, **changes):
    torch.manual_seed(0)
    shape = dict(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True)
    model = timm_tokens.add_aux_tokens(VisionTransformer(**shape, drop_path_rate=drop_path), 2, 1, kernel_size=3)
    name, *norm = objective.split(", ")
    shape = dict(num_prototypes=8, hidden=16, width=8, batch_norm=bool(norm))
    task = MTETask(model, name, **shape, queue_size=16, mask_prob=0.7)
    if kill is not None:
        before = task.before_optimizer

        def die():
            if task.step == kill:
                raise Killed
            before()

        task.before_optimizer = die
    options = dict(out=out, epochs=2, batch_size=4, workers=0, log_every=1, save_every=2, warmup_epochs=0)
    options |= dict(weight_decay_end=0.4, clip_grad=0.5, clip_mode="parameter", seed=1)
    # AdamW would step by the rounding errors that are all the gradient of some biases; and batch norm over a few tokens
    # that are nearly equal magnifies them, the more the larger the steps
    options |= dict(opt="sgd", lr=0.005)
    train(task, Noise(objective), Settings(**options | changes))
    return task


def work(rank, folder):
    compiling.BACKEND = "eager"
    found = {name: run(name, folder / name, batch_size=2).get_task_state() for name in OBJECTIVES}
    return found | {
        "compiled": run("dino", folder / "c", batch_size=2, drop_path=0.5, steps=2, compile=True).get_task_state()
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    return folder, on_two(work, folder)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_are_one(objective, two, tmp_path):
    """Losses and all that is logged, parameters of student and teacher, centres and queues."""
    expected = run(objective, tmp_path).get_task_state()
    folder, states = two
    for found in (state[objective] for state in states):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=name)
    rows = zip(read(folder / objective / "steps.csv"), read(tmp_path / "steps.csv"), strict=True)
    for found, reference in rows:
        assert found == pytest.approx(reference, rel=1e-3, abs=1e-5)


def test_two_processes_that_compile_are_one_that_does_not(two, tmp_path):
    """With stochastic depth, whose draws for the global batch are made outside of the graphs."""
    expected = run("dino", tmp_path, drop_path=0.5, steps=2).get_task_state()
    for name, value in expected.items():
        torch.testing.assert_close(two[1][0]["compiled"][name], value, atol=2e-5, rtol=1e-4, msg=name)
    gradients = [name for name in read(tmp_path / "steps.csv")[0] if name.startswith("gradient/")]
    for found, reference in zip(read(two[0] / "c" / "steps.csv"), read(tmp_path / "steps.csv"), strict=True):
        assert all(found[name] == pytest.approx(reference[name], rel=1e-3) for name in ["loss", *gradients])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_killed_and_resumed(objective, tmp_path):
    whole = run(objective, tmp_path / "whole", drop_path=0.2).get_task_state()
    for kill in (1, 3):
        with pytest.raises(Killed):
            run(objective, tmp_path / "killed", kill=kill, drop_path=0.2, resume=True)
    resumed = run(objective, tmp_path / "killed", drop_path=0.2, resume=True).get_task_state()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert (tmp_path / "killed" / "steps.csv").read_text() == (tmp_path / "whole" / "steps.csv").read_text()
    assert len(read(tmp_path / "whole" / "steps.csv")) == 6
