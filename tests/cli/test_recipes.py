"""Published recipes: what they say is what was published, and what a run then does."""

from dataclasses import fields
from importlib import import_module

import pytest
import torch
from torch.utils.data import TensorDataset

from timm_tokens import recipes
from timm_tokens.cli import main
from timm_tokens.cli.errors import CommandError
from timm_tokens.cli.parser import build, parse
from timm_tokens.training import Settings
from timm_tokens.training.batches import plan
from timm_tokens.training.optimization import Optimization

OBJECTIVES = {"dtem": "dtem", "mte": "dino", "mira": "mira", "dtm": "dtm", "token-label": "lvvit-s"}
GIVEN = {"out": "run", "data_dir": "images", "model": "test_vit"}
# As published, from the papers' READMEs and scripts: global batch, epochs, rate at that batch, weight decay at the
# start and at the end, gradient clipping.
PUBLISHED = {
    ("dtem", "dtem"): (1024, 30, 1e-4, 1e-4, None, 5.0),
    ("mte", "dino"): (512, 100, 5e-4 * 2, 0.04, 0.4, 3.0),
    ("mte", "dino-boosted"): (1024, 300, 5e-4 * 4, 0.04, 0.4, 3.0),
    ("mte", "ibot"): (1024, 800, 5e-4 * 4, 0.04, 0.4, 3.0),
    ("mte", "moby"): (512, 300, 1e-3, 0.05, None, 5.0),
    ("mira", "mira"): (4096, 800, 4.8, 1e-6, None, None),
    ("mira", "mira-multicrop"): (4096, 400, 4.8, 1e-6, None, None),
    ("dtm", "dtm"): (2048, 300, 1.5e-3, 0.05, None, 3.0),
    ("token-label", "lvvit-s"): (1024, 300, 1.6e-3, 0.05, None, None),
    ("token-label", "lvvit-m"): (1024, 300, 1.6e-3, 0.05, None, None),
    ("token-label", "lvvit-l"): (1024, 300, 1e-3, 0.05, None, None),
    ("token-label", "lvvit-s-384"): (512, 300, 5e-6, 1e-8, None, None),
}


def options_of(objective, name, **given):
    of = import_module(f"timm_tokens.cli.train.{objective.replace('-', '_')}").Options
    required = {"teacher": "test_vit"} if (objective, name) == ("dtm", "short") else {}
    return build(of, recipes.load(objective, name).options | GIVEN | required | given)


def settings_of(options):
    return Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)} | {"device": "cpu"})


def test_every_recipe_is_of_options_that_there_are():
    for objective in OBJECTIVES:
        assert "short" in recipes.names(objective)
        for name in recipes.names(objective):
            recipe = recipes.load(objective, name)
            assert all(recipe.sources.values()) and recipe.title and recipe.source and recipe.published, name
            options = options_of(objective, name)  # refuses unknown names and values out of range
            for option, value in recipe.options.items():
                if option in GIVEN:
                    continue
                wanted = tuple(value) if isinstance(value, list) else value
                assert getattr(options, option) == wanted, (name, option)


def test_global_batch_rate_decay_and_clipping_are_the_published_ones():
    known = {(objective, name) for objective in OBJECTIVES for name in recipes.names(objective) if name != "short"}
    assert known == PUBLISHED.keys()
    for (objective, name), (batch, epochs, lr, decay, decay_end, clip) in PUBLISHED.items():
        options = options_of(objective, name)
        settings = settings_of(options)
        scaled = settings.scaled(batch // settings.batch_size)
        assert scaled.lr == pytest.approx(lr), name
        found = (options.epochs, options.weight_decay, options.weight_decay_end, options.clip_grad)
        assert found == (epochs, decay, decay_end, clip), name


def test_rates_follow_the_global_batch(tmp_path):
    settings = Settings(out=tmp_path, lr=1.0, min_lr=0.1, warmup_lr=0.2, batch_size=4, accumulate=2, lr_base_size=32)
    twice = settings.scaled(2)
    assert (twice.lr, twice.min_lr, twice.warmup_lr) == (0.5, 0.1, 0.2)
    assert twice.scaled(2) == twice
    moby = Settings(**vars(settings) | {"scale_schedule": True}).scaled(1)
    assert (moby.lr, moby.min_lr, moby.warmup_lr) == (0.25, 0.025, 0.05)
    root = Settings(**vars(settings) | {"lr_base_scale": "sqrt"}).scaled(1)
    assert root.lr == 0.5


def test_a_run_of_moby_warms_up_and_ends_at_scaled_rates(tmp_path):
    options = options_of("mte", "moby", out=tmp_path, batch_size=8, epochs=20)
    settings = settings_of(options).scaled(1)
    data = TensorDataset(torch.zeros(80, 1), torch.zeros(80))
    optimization = Optimization(torch.nn.Linear(2, 2), settings, plan(data, settings))
    rates = []
    for step in (0, 50, 199):
        optimization.start_step(step)
        rates.append(optimization.lr)
    factor = 8 / 512
    assert rates[:2] == pytest.approx([5e-7 * factor, 1e-3 * factor], rel=0.2)
    assert 5e-6 * factor < rates[2] < 6e-6 * factor


def test_explicit_options_win():
    of = import_module("timm_tokens.cli.train.mte").Options
    line = "--recipe moby --clip-grad 1 --model m --data-dir d --out o"
    options = parse("train mte", of, line.split())
    assert (options.clip_grad, options.drop_path, options.loss, options.recipe) == (1.0, 0.2, "moby", "moby")
    with pytest.raises(
        CommandError, match="mte has no recipe 'byol': choose from dino, dino-boosted, ibot, moby, short"
    ):
        parse("train mte", of, ["--recipe", "byol"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_recipes_are_listed(objective, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", objective, "--list-recipes"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name in recipes.names(objective):
        assert f"{name}: {recipes.load(objective, name).title}" in printed


def test_the_config_is_printed_with_sources(capsys):
    with pytest.raises(SystemExit):
        main(["train", "mte", "--recipe", "moby", "--clip-grad", "1", "--print-config"])
    lines = capsys.readouterr().out.splitlines()
    assert "drop_path: 0.2  # configs/moby_deit_small.yaml" in lines
    assert "clip_grad: 1.0" in lines
    assert "global_scale: [0.08, 1.0]  # data/build.py:97-118" in lines
