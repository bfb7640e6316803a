"""Fine-tuning what a run has trained, by one command: at another size, with mixup, CutMix and layer decay."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

from timm_tokens.cli import CommandError, call, main
from timm_tokens.cli.config import defaults
from timm_tokens.cli.parser import build
from timm_tokens.cli.train import token_label
from timm_tokens.tasks import TokenLabelTask
from timm_tokens.training.batches import Plan
from timm_tokens.training.optimization import Optimization
from timm_tokens.training.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of timm's data sets

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
QUICK = {"batch_size": 4, "workers": 0, "device": "cpu", "steps": 2, "val_split": ""}
MODELS = {
    "vit_small_patch16_224": VIT,
    "beit_base_patch16_224": VIT | {"use_shared_rel_pos_bias": True},
    "eva02_tiny_patch14_224": VIT,
    "lvvit_s": {"embed_dim": 24, "depth": 2, "num_heads": 2},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(8):
        path = root / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (30 * i, 100, 200 - 20 * i)).save(path)
    return root


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    """A run of each model, at 32 px."""
    root = tmp_path_factory.mktemp("runs")
    for name, kwargs in MODELS.items():
        options = {"model": name, "model_kwargs": kwargs, "img_size": 32, "data_dir": images, "mix": False}
        call("train token-label", out=root / name, **QUICK | options)
    return root


def options_of(given):
    return build(token_label.Options, defaults("train token-label", given) | given)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about how timm resizes BEiT's bias
@pytest.mark.parametrize("name", MODELS)
def test_at_a_higher_resolution_it_is_what_timm_makes_of_it(name, images, runs, tmp_path):
    given = {"run_dir": runs / name, "img_size": 48, "data_dir": images, "out": tmp_path} | QUICK
    options = options_of(given)
    assert (options.model, options.model_kwargs) == (name, MODELS[name])
    model = token_label.build(options).task.product
    sized = timm.create_model(name, num_classes=2, img_size=32, **MODELS[name])
    sized.load_state_dict(load_file(runs / name / "model.safetensors"))
    if not hasattr(sized, "set_input_size"):
        pytest.skip("this timm's BEiT is tied to one size")
    sized.set_input_size(img_size=48)
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(model.eval()(x), sized.eval()(x))
    if name == "vit_small_patch16_224":
        before = load_file(runs / name / "model.safetensors")["pos_embed"]
        assert torch.equal(model.pos_embed, resample_abs_pos_embed(before, [6, 6], num_prefix_tokens=1))


def test_one_command_and_its_own_size(images, runs, tmp_path):
    line = f"train token-label --run {runs / 'vit_small_patch16_224'} --data-dir {images} --batch-size 4 --workers 0"
    line += " --device cpu --steps 2 --mixup 0.8 --cutmix 1 --layer-decay 0.65 --ema 0.5 --drop-path 0.1"
    words = [*line.split(), "--val-split", ""]
    assert main([*words, "--out", str(tmp_path / "same")]) == 0
    assert main([*words, "--img-size", "48", "--out", str(tmp_path / "larger")]) == 0
    kept = [json.loads((tmp_path / name / "options.json").read_text()) for name in ("same", "larger")]
    assert [each["img_size"] for each in kept] == [32, 48]
    assert load_file(tmp_path / "larger" / "model.safetensors")["pos_embed"].shape == (1, 37, 24)
    assert main([*words, "--img-size", "48", "--out", str(tmp_path / "larger"), "--resume"]) == 0


def test_a_recipe_decides_the_size_and_the_run_the_model(images, runs, tmp_path):
    options = options_of(
        {"recipe": "lvvit-s-384", "run_dir": runs / "lvvit_s", "data_dir": images, "out": tmp_path} | QUICK
    )
    assert (options.img_size, options.model_kwargs, options.lr) == (384, MODELS["lvvit_s"], 5e-6)
    model = token_label.build(options).task.product
    assert model.base.pos_embed.shape == (1, 1 + 24 * 24, 24)


def test_layers_learn_at_their_rates(images, runs, tmp_path):
    given = {"run_dir": runs / "vit_small_patch16_224", "data_dir": images, "out": tmp_path, "layer_decay": 0.5}
    options = options_of(given | QUICK | {"warmup_epochs": 0, "drop_path": 0.2})
    task = token_label.build(options).task
    settings = Settings(out=tmp_path, layer_decay=0.5, lr=1.0, warmup_epochs=0, sched="none")
    optimization = Optimization(task.student, settings, Plan(4, 2, 4))
    optimization.start_step(0)
    names = {id(p): name for name, p in task.student.named_parameters()}
    rates = {
        names[id(p)]: g["lr"] * g.get("lr_scale", 1) for g in optimization.optimizer.param_groups for p in g["params"]
    }
    expected = {"head.weight": 1, "blocks.1.mlp.fc1.weight": 0.5, "blocks.0.mlp.fc1.weight": 0.25, "cls_token": 0.125}
    assert {name: rates[name] for name in expected} == expected
    assert task.student.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_mixup_reaches_the_task(images, runs, tmp_path):
    given = {"run_dir": runs / "lvvit_s", "data_dir": images, "out": tmp_path, "mixup": 0.8, "cutmix": 1.0} | QUICK
    task = token_label.build(options_of(given)).task
    assert isinstance(task, TokenLabelTask) and not task.mix
    assert (task.mixup.mixup_alpha, task.mixup.cutmix_alpha, task.mixup.num_classes) == (0.8, 1.0, 2)
    assert (task.mixup.label_smoothing, task.loss.smoothing) == (0, 0.1)


def test_refusals(images, runs, tmp_path):
    def train(**options):
        call("train token-label", data_dir=images, out=tmp_path / "out", **QUICK | options)

    with pytest.raises(CommandError, match="mixup and cutmix are for training without labels"):
        train(model="test_vit", labels=tmp_path, mixup=0.8)
    with pytest.raises(CommandError, match="give --run or --model, not both"):
        train(model="test_vit", run_dir=runs / "lvvit_s")
    (tmp_path / "begun").mkdir()
    with pytest.raises(CommandError, match=r"No such file.*options.json|options.json"):
        train(run_dir=tmp_path / "begun")
    (tmp_path / "begun" / "options.json").write_text((runs / "lvvit_s" / "options.json").read_text())
    with pytest.raises(CommandError, match=r"the run in .*begun has not ended: there is no .*model.safetensors"):
        train(run_dir=tmp_path / "begun")
