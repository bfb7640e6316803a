"""Files are there whole or not at all; what killed processes leave goes, and what others are writing stays."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from timm_tokens import files
from timm_tokens.digests import is_whole, save_checkpoint, save_tensors
from timm_tokens.files import read_json, remove_partials, replacing, write_json

# Python 3.12 warns of threads that a forked process doesn't have; this one doesn't need them
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing a file; it is killed by what the fixture gives."""
    child = os.fork()
    if child == 0:
        with replacing(tmp_path / "x.pth"):
            (tmp_path / "writing").touch()
            time.sleep(60)
        os._exit(1)
    while not (tmp_path / "writing").exists():
        time.sleep(0.01)
    (tmp_path / "writing").unlink()
    yield child
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "x.txt"
    with replacing(path) as partial:
        partial.write_text("one")
        assert not path.exists() and partial.suffix == ".txt"
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("two")
        _ = 1 / 0
    assert path.read_text() == "one"
    with replacing(path, keep=tmp_path / "new" / "before.txt") as partial:
        partial.write_text("three")
    assert path.read_text() == "three" and (tmp_path / "new" / "before.txt").read_text() == "one"
    assert {file.name for file in path.parent.iterdir()} == {"x.txt", "before.txt"}


@pytest.mark.skipif(files.fcntl is None, reason="there are no locks")
def test_only_what_killed_processes_left_is_removed(tmp_path, writer):
    others = [tmp_path / name for name in (".x.partial.pth", "x.1.partial.pth", ".x.12.pth", ".tmpAbCdEf", ".lock")]
    for other in others:
        other.write_text("somebody else's")
    remove_partials(tmp_path)
    assert (tmp_path / f".x.{writer}.partial.pth").exists()  # it is being written
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    remove_partials(tmp_path)
    assert set(tmp_path.iterdir()) == set(others)
    remove_partials(tmp_path / "nowhere")


@pytest.mark.skipif(files.fcntl is None, reason="there are no locks")
def test_a_partial_file_that_is_taken_for_a_dead_process_s_is_made_again(tmp_path, monkeypatch):
    real, taken = files.fcntl.flock, []

    def flock(file, how):
        if not taken:
            taken.append(file.name)
            Path(file.name).unlink()  # by another process, just before it is locked
        real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with replacing(tmp_path / "x") as partial:
        assert partial.exists()
        partial.write_text("whole")
    assert taken and (tmp_path / "x").read_text() == "whole"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_is_named_and_costs_nothing(tmp_path):
    path = tmp_path / "x.pth"
    path.write_text("before")
    for size in (3, 10**6):  # found out when the file is closed, and in the middle of it
        with pytest.raises(OSError, match=r"No space left on device: '.*x.pth'"), replacing(path) as partial:
            partial.unlink()
            partial.symlink_to("/dev/full")
            save_checkpoint(partial, {"x": torch.ones(size), "y": torch.ones(size)})
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_any_changed_byte_is_noticed(tmp_path, name):
    path, tensors = tmp_path / name, {"a": torch.arange(5.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    save = save_checkpoint if name == "x.pth" else save_tensors
    save(path, tensors)
    data = path.read_bytes()
    save(tmp_path / f"other.{name}", tensors)
    assert (tmp_path / f"other.{name}").read_bytes() == data
    loaded = torch.load(path, weights_only=True) if name == "x.pth" else load_file(path)
    assert all(torch.equal(loaded[key], value) for key, value in tensors.items())
    assert is_whole(path)
    for place in range(8 if name == "x.safetensors" else 0, len(data), 7):  # 8 bytes: the length of the header
        changed = bytearray(data)
        changed[place] ^= 4
        path.write_bytes(changed)
        with suppress(SafetensorError):  # its header can't be read at all
            assert not is_whole(path), place


def test_files_of_others_have_no_digest(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(b"short")
    assert is_whole(tmp_path / "x.pth") is None and is_whole(tmp_path / "y.pth") is None
    save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"format": "pt"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "sha256"}


def test_json_that_is_none_names_the_file(tmp_path):
    path = tmp_path / "x.json"
    assert read_json(path) == {}
    write_json(path, {"a": [1, "é"]})
    assert read_json(path) == {"a": [1, "é"]}
    for content in (b"{", b"[1]", b"3", b"\xff\xfe", b"[" * 100000, b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.json is corrupt \(.*\): delete it"):
            read_json(path)
