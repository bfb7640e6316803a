"""k-NN and NMI while a run trains: the values, the same on two processes and after a kill, and what is refused."""

import pytest
import torch
from gloo import on_two
from PIL import Image
from torch import nn

from timm_tokens.cli import CommandError, call
from timm_tokens.probing import knn_accuracy
from timm_tokens.training import checkpoints
from timm_tokens.training.history import read
from timm_tokens.training.neighbours import Neighbours

# timm's ImageDataset leaves the closing of its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def points(seed, count=13, classes=3):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 4, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % classes
    return [
        (x, int(y))
        for x, y in zip(centers[labels] + 0.8 * torch.randn(count, 4, generator=generator), labels, strict=True)
    ]


def measured():
    torch.manual_seed(0)
    return Neighbours(points(0), points(1, 11), k=3, batch_size=4)(nn.Linear(4, 6))


def work(rank, folder):
    return measured()


def test_values_and_two_processes(tmp_path):
    torch.manual_seed(0)
    net, train, val = nn.Linear(4, 6), points(0), points(1, 11)
    (x, y), (u, v) = ((torch.stack([a for a, _ in each]), torch.tensor([b for _, b in each])) for each in (train, val))
    found = measured()
    assert found["knn"] == pytest.approx(100 * knn_accuracy(net(x), y, net(u), v, [3])[3]) and 40 < found["knn"] < 100
    assert on_two(work, tmp_path) == [found, found]
    apart = [(100 * nn.functional.one_hot(torch.tensor(c), 4).float() + x, c) for x, c in val]
    assert Neighbours(apart, apart)(Passing())["nmi"] == pytest.approx(100)
    noise = Neighbours(train, [(x, n % 2) for n, (x, _) in enumerate(points(3, 400, 1))])(Passing())
    assert noise["nmi"] < 5  # clusters of noise say nothing


class Passing(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x


QUICK = {"model": "test_vit", "img_size": 32, "epochs": 3, "batch_size": 4, "workers": 0, "device": "cpu"}
QUICK |= {"prototypes": 8, "head_hidden": 16, "local_crops": 0, "plot": True}


def images(root, classes=2):
    for i in range(16):
        path = root / ("train", "val")[i // 8] / str(i % classes) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (250 * (i % 2), 10 * i, 100)).save(path)
    return root


def test_the_command_measures_and_goes_on(tmp_path, monkeypatch):
    given = QUICK | {"data_dir": images(tmp_path / "images"), "knn_every": 2, "knn": 3}
    result = call("train mte", out=tmp_path / "whole", **given)
    rows = read(tmp_path / "whole" / "summary.csv")
    assert ["eval_knn" in row for row in rows] == [False, True, True] and rows[2]["eval_knn"] == 100  # of two colours
    assert 0 <= rows[1]["eval_nmi"] <= 100 and result.epochs == rows
    assert (tmp_path / "whole" / "curves.png").is_file()
    save = checkpoints.save

    def die(folder, state):
        save(folder, state)
        if state["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", die)
    with pytest.raises(KeyboardInterrupt):
        call("train mte", out=tmp_path / "killed", **given)
    call("train mte", out=tmp_path / "killed", resume=True, **given)
    assert read(tmp_path / "killed" / "summary.csv") == rows


@pytest.mark.parametrize(("classes", "message"), [(1, "two classes or more, got 1: leave it out")])
def test_images_without_classes_are_refused(classes, message, tmp_path):
    given = QUICK | {"data_dir": images(tmp_path / "images", classes), "knn_every": 1, "out": tmp_path / "out"}
    with pytest.raises(CommandError, match=message):
        call("train mte", **given)
    (tmp_path / "images" / "train" / "more").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "train" / "more" / "x.png")
    with pytest.raises(CommandError, match="--knn-every needs the same classes in --train-split and --val-split val"):
        call("train mte", **given)
