"""DDP and FSDP2 train, calibrate and save a merger as one plain process does."""

import pytest
import tiny
import torch
import torch.distributed as dist
from gloo import on_two
from test_scale import FSDP_ON_CPU, sharded
from torch.distributed.tensor import DTensor

from timm_tokens import apply_dtem_merging, calibrate, save_merger
from timm_tokens.merger_file import read_merger
from timm_tokens.tasks import DTEMTask

STEPS = 2


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def made(folder, way):
    """The embeddings' weights after two steps, the FLOPs, and what the file holds after a calibration."""
    model = tiny.merging("class_token", depth=3, r=4)
    if way == "fsdp":
        model = sharded(model)
    task = DTEMTask(model, r=(2, 5))
    if way == "ddp":
        task.prepare_distributed()
    rank = dist.get_rank() if dist.is_initialized() else 0
    part = slice(4 * rank, 4 * rank + 4) if dist.is_initialized() else slice(None)
    optimizer = torch.optim.SGD(model.merger.parameters(), lr=0.02)
    for step in range(STEPS):
        task.train().start_step(step, STEPS, STEPS)
        optimizer.zero_grad()
        task(tiny.images(8, seed=step)[part])["loss"].backward()
        optimizer.step()
        task.end_step()
    given = task.trainable_module
    flops = model.flops()
    if way == "fsdp":
        with pytest.raises(ValueError, match="sharded by FSDP2, but calibration runs its pieces one by one"):
            calibrate(given, tiny.images(4), 0.7)
    else:
        calibrate(given, tiny.images(4), 0.7, progress=False)
    file = save_merger(given, folder / f"{way}{rank}.safetensors")
    weights = {name: whole(value.detach()).clone() for name, value in model.merger.state_dict().items()}
    return {"weights": weights, "flops": flops, "file": read_merger(file)._asdict()}


def work(rank, folder):
    return {way: made(folder, way) for way in ("ddp", "fsdp") if way == "ddp" or FSDP_ON_CPU}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return on_two(work, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_make_the_merger_of_one(two, way, tmp_path):
    if way == "fsdp" and not FSDP_ON_CPU:
        pytest.skip("FSDP2 of torch 2.6 needs a GPU")
    one, start = made(tmp_path, "plain"), tiny.merging("class_token", depth=3, r=4).merger.state_dict()
    for result in (each[way] for each in two):
        torch.testing.assert_close(result["weights"], one["weights"], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(result["file"]["weights"], result["weights"])
        assert result["flops"] == one["flops"]
        if way == "ddp":
            assert result["file"]["config"]["r"] == one["file"]["config"]["r"]
    assert max((one["weights"][name] - value).abs().max() for name, value in start.items()) > 1e-4
    loaded = apply_dtem_merging(tiny.base("class_token", depth=3), weights=tmp_path / "plain0.safetensors")
    assert loaded.merger.schedule == tuple(one["file"]["config"]["r"]) != (4, 4, 4)
