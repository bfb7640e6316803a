"""The published linear evaluations: their rates, their steps against torch's own SGD, and their features."""

import math

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_tokens.cli import call
from timm_tokens.cli.probe.protocol import features_of
from timm_tokens.probing.protocols import PROTOCOLS, Sweep

# timm's ImageDataset leaves the closing of its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def test_rates_are_the_published_ones():
    """At a batch of 1024: DINO 0.004, MoBY 2, MIRA 0.3; iBOT 45 rates from 4e-4 to 36."""
    rates = {name: [lr * 1024 / p.base_size for lr in p.lrs] for name, p in PROTOCOLS.items()}
    assert rates["dino"] == [pytest.approx(0.004)] and rates["moby"] == [2.0] and rates["mira"] == [pytest.approx(0.3)]
    assert len(rates["ibot"]) == 45 and [rates["ibot"][0], rates["ibot"][-1]] == pytest.approx([4e-4, 36.0])
    assert all(p.epochs == 100 for p in PROTOCOLS.values())


@pytest.mark.parametrize("name", ["dino", "moby"])
def test_steps_are_those_of_torchs_sgd(name):
    protocol, lrs = PROTOCOLS[name], [0.1, 0.5]
    if name == "moby":
        protocol = protocol._replace(warmup_epochs=1)
    x, labels = torch.randn(12, 5), torch.arange(12) % 3
    sweep = Sweep(protocol, 5, 3, lrs, epochs=4, steps_per_epoch=2, generator=torch.Generator().manual_seed(1))
    assert 0.005 < sweep.weight.std() < 0.02
    models = []
    for number, lr in enumerate(lrs):
        layer = nn.Linear(5, 3)
        layer.weight.data, layer.bias.data = sweep.weight[:, number].T.clone(), torch.zeros(3)
        models.append((layer, torch.optim.SGD(layer.parameters(), lr, momentum=0.9, nesterov=protocol.nesterov), lr))
    for step in range(8):
        batch = slice(6 * (step % 2), 6 * (step % 2) + 6)
        by_epoch = (1 + math.cos(math.pi * (step // 2) / 4)) / 2
        by_step = step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 6)) / 2
        for layer, optimizer, lr in models:
            optimizer.param_groups[0]["lr"] = lr * (by_epoch if name == "dino" else by_step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(x[batch]), labels[batch], label_smoothing=protocol.smoothing).backward()
            optimizer.step()
        sweep.train(x[batch], labels[batch])
    for number, (layer, *_) in enumerate(models):
        torch.testing.assert_close(sweep.weight[:, number], layer.weight.T)
        assert sweep.accuracies(x, labels)[number] == (layer(x).argmax(1) == labels).float().mean()


def test_features_are_those_of_the_papers():
    x = torch.randn(2, 3, 160, 160)
    vit = timm.create_model("test_vit", num_classes=0, depth=5).eval()
    words, extract = features_of(vit, PROTOCOLS["dino"])
    layers, hidden = [], vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for block in vit.blocks:
        hidden = block(hidden)
        layers.append(vit.norm(hidden))
    assert words == "class tokens of the last four blocks"
    torch.testing.assert_close(extract(x), torch.cat([layer[:, 0] for layer in layers[1:]], 1), atol=1e-5, rtol=1e-5)
    vit.num_features = 768  # from ViT-B on
    expected = torch.cat([layers[-1][:, 0], layers[-1][:, 1:].mean(1)], 1)
    torch.testing.assert_close(features_of(vit, PROTOCOLS["ibot"])[1](x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features_of(vit, PROTOCOLS["mira"])[1](x), vit(x))
    conv = timm.create_model("test_resnet", num_classes=0).eval()
    assert features_of(conv, PROTOCOLS["dino"])[0] == "the model's pooled features"


def test_the_command(tmp_path, capsys):
    for i in range(16):
        path = tmp_path / "images" / ("train", "val")[i // 12] / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (250 * (i % 2), 10 * i, 100)).save(path)
    options = {"model": "test_vit", "random": True, "img_size": 32, "workers": 0, "device": "cpu", "batch_size": 4}
    options |= {"data_dir": tmp_path / "images", "out": tmp_path / "out", "epochs": 3}
    found = call("probe", protocol="ibot", lrs=[0.1, 1.0], **options)
    assert found.best()[2] == 1.0 and [len(values) for values in found.accuracy.values()] == [3, 3]  # two colours
    assert call("probe", protocol="ibot", lrs=[0.1, 1.0], **options) == found
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Linear evaluation of ibot (bytedance/ibot" in report and "| 100.00% |" in report
    assert len((tmp_path / "out" / "probe.csv").read_text().splitlines()) == 7
    call("probe", neighbours=[1], plot=False, **options)
    assert "not comparable with published figures" in (tmp_path / "out" / "report.md").read_text().replace("\n", " ")
