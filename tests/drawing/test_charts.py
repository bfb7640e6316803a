"""Charts say what they show: tokens of a loss share a panel, axes start at zero or say where."""

import torch

from timm_tokens.drawing import (
    draw_accuracy,
    draw_attention,
    draw_bars,
    draw_curves,
    draw_probe,
    draw_scores,
    draw_speed,
)
from timm_tokens.drawing.style import LINES


def lines(axes):
    return {line.get_label(): [tuple(map(float, point)) for point in line.get_xydata()] for line in axes.get_lines()}


def test_tokens_of_one_loss_share_a_panel():
    steps = [{"step": i, "loss": 1.0 + i, "loss/global": 2.0, "loss/aux1": 3.0 - i, "lr": 0.1} for i in range(3)]
    picture = draw_curves(steps, [{"epoch": 0, "train_loss": 1.0, "eval_top1": 50.0}, {"epoch": 1, "train_loss": 1.0}])
    by_title = {axes.get_title(): lines(axes) for axes in picture.axes if axes.get_title()}
    assert set(by_title) == {"loss by step", "loss by step, per token", "lr by step", "eval_top1 by epoch"}
    assert by_title["loss by step, per token"] == {
        "global": [(0, 2), (1, 2), (2, 2)],
        "aux1": [(0, 3), (1, 2), (2, 1)],
    }
    assert by_title["eval_top1 by epoch"] == {"eval_top1": [(0, 50)]}


def test_bars_start_at_zero_and_reach_their_values():
    picture = draw_bars(
        {"1 shot": {"a": {"x": (50, 1), "y": (60, 1)}}, "5 shots": {"a": {"x": (90, 1), "y": (80, 2)}}}, "%"
    )
    assert [bar.get_height() for axes in picture.axes for bar in axes.patches] == [50, 60, 90, 80]
    for axes in picture.axes:
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] > 91


def test_an_axis_that_does_not_start_at_zero_says_so():
    far = draw_accuracy({"learned": [(1, 90.0), (2, 91.0)]}, ["r = 8", "r = 0"]).axes[0]
    near = draw_accuracy({"learned": [(1, 10.0), (2, 91.0)]}, ["r = 8", "r = 0"]).axes[0]
    assert f"axis starts at {far.get_ylim()[0]:.3g}" in far.get_ylabel()
    assert near.get_ylim()[0] == 0
    assert "starts" not in near.get_ylabel()


def test_charts_hold_their_numbers():
    probe = draw_probe({1: 40.0, 20: 50.0}, {0.1: 55.0, 1.0: 60.0}, (1.0, 58.0), {"global": 30.0, "aux 1": 35.0})
    assert [next(iter(lines(axes).values())) for axes in probe.axes] == [
        [(1, 40), (20, 50)],
        [(0.1, 55), (1, 60)],
        [(0, 30), (1, 35)],
    ]
    assert lines(probe.axes[1])["chosen, on validation images"] == [(1, 58)]
    speed = lines(draw_speed({"forward, batch 1": [(8, 1.2)]}, [(8, 1.3)]).axes[0])
    assert speed["forward, batch 1"] == [(8, 1.2)]
    assert speed["ideal (FLOPs)"] == [(8, 1.3)]
    scores = draw_scores({"k-NN": {"DINO": [80.0, 84.0], "DINO + MTE": []}})
    assert [[float(y) for y in line.get_ydata()] for line in scores.axes[0].get_lines()] == [[80, 84], [82, 82], []]


def test_attention_maps_of_a_kind_share_one_scale_from_zero():
    maps = {"attention": {"cls": torch.full((2, 2), 0.1), "aux 1": torch.full((2, 2), 0.4)}}
    picture = draw_attention(torch.rand(3, 8, 8), maps, torch.eye(2))
    maps = [image for axes in picture.axes for image in axes.images if image.get_array().ndim == 2]
    heats = [image for image in maps if image.cmap.name == "viridis"]
    assert [image.get_clim() for image in heats] == [(0, 0.4000000059604645)] * 2
    (cosines,) = [axes for axes in picture.axes if axes.get_title() == "cosine similarity"]
    assert [label.get_text() for label in cosines.get_xticklabels()] == ["cls", "aux 1"]


def test_lines_have_colours_that_colour_blind_readers_tell_apart():
    picture = draw_accuracy({"a": [(1, 1)], "b": [(1, 2)]}, ["r"])
    assert [line.get_color() for line in picture.axes[0].get_lines()] == list(LINES[:2])
