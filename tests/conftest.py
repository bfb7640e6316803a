"""Shared helpers of the tests."""

import gc
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test waits for a network

torch.set_num_threads(1)  # tiny models: threads only wait for each other


def pytest_collection_finish():
    """Spare the garbage collector what the imports made, which stays: walking over it takes 4 % of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests on one worker, so that what they share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.option.dist == "load" else None


@pytest.fixture
def golden():
    """A loader of tests/golden/<name>.safetensors as a dict of tensors (see the README there for their origin)."""
    return lambda name: load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
