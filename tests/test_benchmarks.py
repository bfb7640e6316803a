"""What the benchmarks compare with is what they say it is."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu
from families import MERGEABLE
from references import Dropping, ToMe, in_turns, ratio

from timm_tokens.cli.bench.timing import dropping


@torch.no_grad()
@pytest.mark.parametrize("schedule", [(0, 0, 0), (2, 5, 3), (100, 0, 1)])
def test_tomes_operations_give_what_merging_by_keys_gives(schedule):
    model, images = tiny.merging(depth=3, r=schedule, metric="keys"), tiny.images()
    torch.testing.assert_close(ToMe(model.base, schedule)(images), model(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dropping_nothing_is_the_model_itself_and_dropping_something_is_not():
    base, images = tiny.base(depth=3), tiny.images()
    torch.testing.assert_close(Dropping(base, (0, 0, 0))(images), base(images), atol=1e-5, rtol=1e-5)
    assert (Dropping(base, (2, 5, 3))(images) - base(images)).abs().max() > 0.01


@torch.no_grad()
def test_the_commands_row_of_dropped_tokens_is_the_same_model():
    base, images = tiny.base(depth=3), tiny.images()
    expected = Dropping(base, (2, 5, 3))(images)
    torch.testing.assert_close(dropping(base, (2, 5, 3)).eval()(images), expected, atol=1e-5, rtol=1e-5)
    for make in MERGEABLE.values():
        net = dropping(make().eval(), (2, 5, 3)).eval()
        assert net(torch.randn(2, 3, 48, 48)).isfinite().all() and net.flops() < net.flops(0)


def test_calls_are_made_in_turns():
    made = []
    seconds = in_turns([lambda: made.append("a"), lambda: made.append("b")], rounds=3, warm_up=1)
    assert "".join(made) == "ab" * 4 and [len(times) for times in seconds] == [3, 3]
    assert ratio([4.0, 9.0, 2.0], [2.0, 1.0, 1.0]) == 2.0


@pytest.mark.parametrize("train", [False, True])
def test_the_gpus_benchmark_runs(capsys, train):
    words = ["test_vit", "--device", "cpu", "--batch-size", "2", "--r", "8", "--modes", "eager", "--rounds", "1"]
    gpu.main([*words, "--train"] if train else words)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| test_vit")]
    assert [row[4] for row in rows] == ["base", "dropped", "ToMe", "mask", "channel", "no weights"]
    assert all(float(row[5]) > 0 and float(row[6]) > 0 for row in rows)
    assert "flash" in rows[4][-1]
    gpu.main([*words, "--which", "mask"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| test_vit")]
    assert [row[4] for row in rows] == ["base", "mask"]
