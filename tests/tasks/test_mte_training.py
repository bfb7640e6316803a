"""MTE through the training loop: two processes give what one gives, and a run that is killed goes on as it was."""

import pytest
import torch
import torch.multiprocessing
from gloo import on_two
from killing import Killed, dies_before
from timm.models import VisionTransformer
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import to_pil_image

import timm_tokens
from timm_tokens.data import DeviceCrops, MultiCrop, dino_crops
from timm_tokens.tasks import MTETask
from timm_tokens.training import Settings, compiling, train
from timm_tokens.training.history import read

OBJECTIVES = ["dino", "ibot", "moby", "ibot, batch norm", "dino, crops on the device"]


class Noise(Dataset):
    def __init__(self, objective):
        self.images = torch.randint(256, (12, 3, 12, 12), generator=torch.Generator().manual_seed(0)).byte()
        crops = MultiCrop(dino_crops(16, 8, 0 if objective == "moby" else 1))
        self.augment = DeviceCrops(crops) if "device" in objective else None
        self.transform = self.augment.draw if self.augment else crops

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return self.transform(to_pil_image(image) if self.augment else image), 0


def run(objective, out, kill=None, drop_path=0.0, aux=(2, 1), **changes):
    torch.manual_seed(0)
    shape = dict(img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True)
    model = timm_tokens.add_aux_tokens(VisionTransformer(**shape, drop_path_rate=drop_path), *aux, kernel_size=3)
    name, data = objective.partition(",")[0], Noise(objective)
    shape = dict(num_prototypes=8, hidden=16, width=8, batch_norm="norm" in objective)
    task = MTETask(model, name, **shape, queue_size=16, mask_prob=0.7)
    dies_before(task, kill)
    options = dict(out=out, epochs=2, batch_size=4, workers=0, log_every=1, save_every=2, warmup_epochs=0)
    options |= dict(weight_decay_end=0.4, clip_grad=0.5, clip_mode="parameter", seed=1)
    # AdamW would step by the rounding errors that are all the gradient of some biases; and batch norm over a few tokens
    # that are nearly equal magnifies them, the more the larger the steps
    options |= dict(opt="sgd", lr=0.005)
    train(task, data, Settings(**options | changes), augment=data.augment)
    return task


def work(rank, folder):
    return {name: run(name, folder / name, batch_size=2).get_task_state() for name in OBJECTIVES}


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


def test_compiled_it_trains_and_logs_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    changes = dict(steps=2, aux=(0, 1))
    torch._dynamo.utils.counters.clear()
    graphs, end = [], MTETask.end_step
    counts = torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(MTETask, "end_step", lambda task: graphs.append(counts["unique_graphs"]) or end(task))
    expected = run("dino", tmp_path / "plain", **changes).get_task_state()
    found = run("dino", tmp_path / "compiled", compile=True, **changes).get_task_state()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)
    assert graphs[:2] == [0, 0] and 0 < graphs[2] == graphs[3]  # none is compiled after the first step
    rows = [read(tmp_path / name / "steps.csv")[0] for name in ("compiled", "plain")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4) and rows[0]["gradient/pooled0"] > 0


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
