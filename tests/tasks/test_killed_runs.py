"""A run of the trainer that is killed between checkpoints and resumed ends with the weights of one that was not."""

import csv

import pytest
import timm
import torch
from killing import Killed
from tiny import base

from timm_tokens.data import Crop, MultiCrop
from timm_tokens.tasks import DTMTask, MIRATask
from timm_tokens.training import Settings, train


class Images(torch.utils.data.Dataset):
    """Eight noisy images; crops of them where a transform makes some."""

    def __init__(self, transform=None):
        self.images = torch.randint(256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (image.float() / 128 - 1 if self.transform is None else self.transform(image)), 0


def dtm(seed):
    torch.manual_seed(seed)
    student = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=0, drop_path_rate=0.2)
    return DTMTask(student, base()), Images()


def mira(seed):
    torch.manual_seed(seed)
    task = MIRATask(timm.create_model("test_resnet", num_classes=0), num_prototypes=10, hidden=16, width=8)
    return task, Images(MultiCrop([Crop(32, 2), Crop(16)]))


def run(make, out, seed=0, kill_after=None, resume=False):
    task, dataset = make(seed)
    if kill_after is not None:
        end_step = task.end_step

        def killed():
            end_step()
            if task.step == kill_after:
                raise Killed

        task.end_step = killed
    train(task, dataset, Settings(out=out, steps=7, batch_size=3, workers=0, save_every=3, resume=resume))
    with (out / "steps.csv").open() as file:
        losses = [row["loss"] for row in csv.DictReader(file)]
    return losses, task.get_task_state()


@pytest.mark.parametrize("make", [dtm, mira])
def test_killed_and_resumed(make, tmp_path):
    losses, whole = run(make, tmp_path / "whole")
    with pytest.raises(Killed):
        run(make, tmp_path / "killed", kill_after=4)
    again, resumed = run(make, tmp_path / "killed", seed=1, resume=True)  # other first weights: all must come back
    assert again == losses and len(losses) == 7
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
