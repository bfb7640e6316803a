import json
import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from timm_tokens.data import (
    LabelMap,
    TokenLabelStore,
    TokenLabelWriter,
    image_id,
    label_writer,
    pack_labels,
    unpack_labels,
)

SHAPE = (5, 6, 7)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
# Python 3.12 warns of threads that a forked process doesn't have; these don't need them
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def label(seed, num_classes=100, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).half()
    return LabelMap(values, torch.randint(num_classes, shape, generator=generator, dtype=torch.int32))


def write(folder, names, **kwargs):
    with TokenLabelWriter(folder, kwargs.pop("num_classes", 100), **kwargs) as writer:
        for name in names:
            if name not in writer:
                writer.add(name, *label(int(name.rpartition("_")[2])))
    return TokenLabelStore(folder)


def check(store, names):
    assert set(store) == set(names) and len(store) == len(names)
    for name in names:
        for got, want in zip(store[name], label(int(name.rpartition("_")[2])), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


NAMES = [f"class{i % 3}/image_{i}" for i in range(23)]


@pytest.mark.parametrize("shard_size", [1, 5, 23, 100])
def test_round_trip(tmp_path, shard_size):
    store = write(tmp_path, NAMES, shard_size=shard_size)
    check(store, NAMES)
    assert store.num_classes == 100
    assert "class0/image_0" in store and "class0/image_1" not in store
    assert len(list(tmp_path.glob("*.safetensors"))) == -(-23 // shard_size)
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.journal"))


def test_an_empty_store(tmp_path):
    store = write(tmp_path, [])
    check(store, [])
    assert "a/b_0" not in store


def test_unicode_names_and_large_classes(tmp_path):
    big = LabelMap(torch.ones(1, 2, 2).half(), torch.full((1, 2, 2), 20_841, dtype=torch.int32))
    with TokenLabelWriter(tmp_path, 21_843) as writer:
        writer.add("Köln/Dom_ß", *big)
    assert torch.equal(TokenLabelStore(tmp_path)["Köln/Dom_ß"].indices, big.indices)


def test_maps_in_any_memory_layout(tmp_path):
    values, indices = label(0)
    with TokenLabelWriter(tmp_path, 100) as writer:
        writer.add(NAMES[0], *(x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in (values, indices)))
    check(TokenLabelStore(tmp_path), NAMES[:1])


def test_bytes_on_disk(tmp_path):
    names = [f"n01440764/n01440764_{i}" for i in range(200)]
    with TokenLabelWriter(tmp_path, 1000, shard_size=128) as writer:
        for i, name in enumerate(names):
            writer.add(name, *label(i, 1000, (5, 18, 18)))
    tensors = 200 * 5 * 18 * 18 * (2 + 4)
    assert tensors < sum(p.stat().st_size for p in tmp_path.iterdir()) < 1.02 * tensors


def test_reads_are_copies(tmp_path):
    store = write(tmp_path, NAMES)
    store[NAMES[0]].values.zero_()
    check(store, NAMES)


@needs_fork
def test_pickles_small_and_reads_in_workers(tmp_path):
    store = write(tmp_path, NAMES, shard_size=5)
    check(store, NAMES)
    assert len(pickle.dumps(store)) < 2000
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for name, got in zip(NAMES, pool.map(store.__getitem__, NAMES), strict=True):
            assert torch.equal(got.values, store[name].values)


# --- crashes ---


def run_killed(folder, module, function, call, half=False):
    """Write in a process of its own that is killed at the given call of a function; the names that add returned for."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_until_killed(folder, module, function, call, half, write)
        finally:
            os._exit(1)
    os.close(write)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with open(read) as pipe:  # noqa: PTH123
        return pipe.read().split()


def write_until_killed(folder, module, function, call, half, pipe):
    real, calls = getattr(module, function), []

    def kill(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            if half:
                args[0].write_bytes(b"half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(module, function, kill)
    writer = TokenLabelWriter(folder, 100, shard_size=5)
    for name in NAMES[:13]:
        writer.add(name, *label(int(name.rpartition("_")[2])))
        os.write(pipe, f"{name}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
@pytest.mark.parametrize(
    ("module", "function", "call", "half", "finished"),
    [
        (label_writer, "write_shard", 99, False, 13),  # between two images
        (label_writer, "write_shard", 2, True, 9),  # within a shard
        (os, "fsync", 3, False, 4),  # a shard written, not named; the first index, before, takes two
        (label_writer, "write_index", 2, False, 4),  # a shard named, not in the index
        (label_writer, "write_index", 1, False, 0),
        (os, "fsync", 5, False, 4),
    ],
)
def test_a_killed_run_loses_nothing(tmp_path, module, function, call, half, finished):
    names = run_killed(tmp_path, module, function, call, half)
    assert names == NAMES[:finished]
    if (tmp_path / "index.json").exists():
        before = TokenLabelStore(tmp_path)
        check(before, NAMES[: len(before)])  # whole, if not all yet
    resumed = TokenLabelWriter(tmp_path, 100, shard_size=5)
    assert all(name in resumed for name in names)
    resumed.close()
    recovered = TokenLabelStore(tmp_path)
    assert len(recovered) in (finished, finished + 1)  # one more where the kill came after its journal entry
    check(recovered, NAMES[: len(recovered)])
    check(write(tmp_path, NAMES, shard_size=5), NAMES)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@needs_fork
def test_a_kill_before_a_full_shard_is_written_leaves_the_shards_as_they_would_be(tmp_path):
    run_killed(tmp_path / "killed", label_writer, "write_shard", 2)
    for folder in ("killed", "whole"):
        write(tmp_path / folder, NAMES, shard_size=5)
    for path in (tmp_path / "whole").glob("labels-*"):
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


@needs_fork
@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_torn_journal_loses_the_torn_record_alone(tmp_path, cut):
    run_killed(tmp_path, label_writer, "write_shard", 99)
    journal = tmp_path / "part-00000.journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    with TokenLabelWriter(tmp_path, 100) as writer:
        assert len(writer) == 12 and NAMES[11] in writer and NAMES[12] not in writer
    check(TokenLabelStore(tmp_path), NAMES[:12])


def test_a_torn_record_does_not_hide_those_after_it(tmp_path):
    run_killed(tmp_path, label_writer, "write_shard", 99)
    journal = tmp_path / "part-00000.journal"
    journal.write_bytes(journal.read_bytes()[:-1])
    with pytest.raises(ZeroDivisionError), TokenLabelWriter(tmp_path, 100) as writer:
        writer.add(NAMES[12], *label(12))
        _ = 1 / 0
    with TokenLabelWriter(tmp_path, 100) as writer:
        assert len(writer) == 13
    check(TokenLabelStore(tmp_path), NAMES[:13])


def test_an_error_leaves_the_journal_to_the_next_run(tmp_path):
    with pytest.raises(ZeroDivisionError), TokenLabelWriter(tmp_path, 100) as writer:
        writer.add(NAMES[0], *label(0))
        _ = 1 / 0
    assert not list(tmp_path.glob("*.safetensors"))
    check(write(tmp_path, NAMES), NAMES)


def test_a_full_disk_keeps_the_journal_whole(tmp_path):
    writer = TokenLabelWriter(tmp_path, 100)
    writer.add(NAMES[0], *label(0))
    file = writer._journal._file

    class Full:
        def write(self, data):
            return file.write(data[: len(data) // 2])

        def __getattr__(self, name):
            return getattr(file, name)

    writer._journal._file = Full()
    with pytest.raises(OSError, match=f"{NAMES[1]}.*is the disk full"):
        writer.add(NAMES[1], *label(1))
    writer._journal._file = file
    writer.add(NAMES[2], *label(2))
    writer._release()
    check(write(tmp_path, []), [NAMES[0], NAMES[2]])


# --- several writers ---


def test_two_writers_are_refused(tmp_path):
    refused = pytest.raises(BlockingIOError, match=r"another writer is at work on part 0 of .*give each its own part")
    with TokenLabelWriter(tmp_path, 100), refused:
        TokenLabelWriter(tmp_path, 100)
    TokenLabelWriter(tmp_path, 100).close()


def test_parts_fill_one_store_and_may_change_in_number(tmp_path):
    parts = [TokenLabelWriter(tmp_path, 100, shard_size=3, part=part) for part in range(2)]
    for i, name in enumerate(NAMES[:16]):
        parts[i % 2].add(name, *label(i))
    parts[1].add(NAMES[0], *label(0))  # a distributed sampler fills up with repeats
    for part in parts:
        part.close()
    check(TokenLabelStore(tmp_path), NAMES[:16])
    check(write(tmp_path, NAMES, part=7), NAMES)


def test_parts_of_other_shapes_are_refused(tmp_path):
    first, second = (TokenLabelWriter(tmp_path, 100, part=part) for part in range(2))
    first.add(NAMES[0], *label(0))
    with pytest.raises(ValueError, match=r"'class1/image_1' has shape \(5, 6, 8\), the others in .* \(5, 6, 7\)"):
        second.add(NAMES[1], *label(1, shape=(5, 6, 8)))
    second.add(NAMES[1], *label(1))
    for part in (first, second):
        part.close()
    check(TokenLabelStore(tmp_path), NAMES[:2])
    with pytest.raises(ValueError, match="100 classes, got num_classes=10"):
        TokenLabelWriter(tmp_path, 10, part=2)


def test_shards_of_other_shapes_are_refused(tmp_path):
    write(tmp_path / "other", NAMES[:3])
    with TokenLabelWriter(tmp_path / "labels", 100, part=1) as writer:
        writer.add("a/b_7", *label(7, shape=(5, 6, 8)))
    index = json.loads((tmp_path / "labels" / "index.json").read_text())
    index["shards"] += json.loads((tmp_path / "other" / "index.json").read_text())["shards"]
    (tmp_path / "labels" / "index.json").write_text(json.dumps(index))
    shard = next((tmp_path / "other").glob("*.safetensors"))
    (tmp_path / "labels" / shard.name).write_bytes(shard.read_bytes())
    for read in (lambda: len(TokenLabelStore(tmp_path / "labels")), lambda: TokenLabelWriter(tmp_path / "labels", 100)):
        with pytest.raises(ValueError, match=rf"{shard.name} holds maps of .* \(5, 6, 7\), the store's .* \(5, 6, 8\)"):
            read()


# --- the published layout ---


def publish(folder, names):
    for name in names:
        path = folder / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        values, indices = label(int(name.rpartition("_")[2]))
        torch.save(torch.stack([values, indices.half()]), path)


def test_published_files_read_and_convert_both_ways(tmp_path):
    publish(tmp_path / "files", NAMES)
    files = TokenLabelStore(tmp_path / "files")
    check(files, NAMES)
    assert NAMES[0] in files and "class0/image_1" not in files
    packed = pack_labels(tmp_path / "files", tmp_path / "shards", 100, shard_size=4)
    check(packed, NAMES)
    check(unpack_labels(tmp_path / "shards", tmp_path / "again"), NAMES)
    for name in NAMES:
        first, again = (torch.load(tmp_path / place / f"{name}.pt", weights_only=True) for place in ("files", "again"))
        assert first.dtype == again.dtype and torch.equal(first, again)


def test_published_files_with_a_number_of_classes(tmp_path):
    publish(tmp_path / "files", NAMES)
    check(TokenLabelStore(tmp_path / "files", 100), NAMES)
    few = TokenLabelStore(tmp_path / "files", 3)
    assert few.num_classes == 3
    with pytest.raises(ValueError, match=r"'class0/image_0': classes must be in \[0, 3\), got"):
        few[NAMES[0]]
    pack_labels(tmp_path / "files", tmp_path / "shards", 100)
    assert TokenLabelStore(tmp_path / "shards", 100).num_classes == 100
    with pytest.raises(ValueError, match="shards are over 100 classes, not 3"):
        TokenLabelStore(tmp_path / "shards", 3)


def test_a_class_that_half_precision_cannot_hold_is_not_unpacked(tmp_path):
    with TokenLabelWriter(tmp_path / "shards", 5000) as writer:
        writer.add("a/b_0", torch.ones(1, 2, 2), torch.full((1, 2, 2), 2049))
    with pytest.raises(ValueError, match=r"'a/b_0'.*exact up to 2048, got 2049"):
        unpack_labels(tmp_path / "shards", tmp_path / "files")


def test_image_ids():
    assert image_id("n01440764/n01440764_10026.JPEG") == "n01440764/n01440764_10026"
    assert image_id("a/v1.2_photo.png") == "a/v1.2_photo"
    assert image_id("a/v1.2_photo") == "a/v1.2_photo"


# --- bad input ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a tensor", r"label file of 'c/x_1' can't be read"),
        (torch.zeros(3, 5, 2, 2), r"'c/x_1' must hold a \(2, top, H, W\) tensor, got \(3, 5, 2, 2\)"),
        ({"values": torch.zeros(1)}, r"'c/x_1' must hold a \(2, top, H, W\) tensor, got dict"),
        (torch.full((2, 1, 2, 2), 0.5), r"'c/x_1' holds classes that are not whole numbers"),
        (torch.full((2, 1, 2, 2), -1.0), r"'c/x_1': classes must be in .* got -1 to -1"),
    ],
)
def test_bad_published_files(tmp_path, content, message):
    (tmp_path / "c").mkdir()
    path = tmp_path / "c" / "x_1.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        TokenLabelStore(tmp_path)["c/x_1"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (label(0, shape=(5, 6, 6)), r"'bad' has shape \(5, 6, 6\), the others in .* \(5, 6, 7\)"),
        (LabelMap(torch.zeros(5, 6, 7), torch.zeros(5, 6, 8).int()), r"'bad': values and indices must both be"),
        (LabelMap(torch.zeros(SHAPE), torch.zeros(SHAPE)), "'bad': classes must be integers, got torch.float32"),
        (LabelMap(torch.zeros(SHAPE), torch.full(SHAPE, 100)), r"'bad': classes must be in \[0, 100\), got 100 to 100"),
        (LabelMap(torch.full(SHAPE, 1e6), torch.zeros(SHAPE).int()), "'bad': scores must be finite in float16"),
    ],
)
def test_bad_labels_are_refused_and_harm_nothing(tmp_path, bad, message):
    with TokenLabelWriter(tmp_path, 100) as writer:
        writer.add(NAMES[0], *label(0))
        with pytest.raises(ValueError, match=message):
            writer.add("bad", *bad)
        with pytest.raises(ValueError, match=f"'{NAMES[0]}' has a label in .* already"):
            writer.add(NAMES[0], *label(0))
    check(TokenLabelStore(tmp_path), NAMES[:1])


def test_missing_labels_and_folders(tmp_path):
    store = write(tmp_path / "a", NAMES)
    with pytest.raises(KeyError, match="no label for image 'class9/image_9'"):
        store["class9/image_9"]
    publish(tmp_path / "b", NAMES)
    with pytest.raises(KeyError, match=r"no label for image 'class9/image_9': there is no .*image_9.pt"):
        TokenLabelStore(tmp_path / "b")["class9/image_9"]
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        TokenLabelStore(tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither index.json nor .pt files"):
        TokenLabelStore(tmp_path / "d")


def test_damaged_stores(tmp_path):
    write(tmp_path, NAMES, shard_size=10)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{path.name} must be {len(whole)} bytes, got {len(whole) - 1}"):
        TokenLabelStore(tmp_path)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match=f"{path.name} can't be read"):
        TokenLabelStore(tmp_path)[NAMES[0]]
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is in the index but missing"):
        TokenLabelStore(tmp_path)


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path):
    write(tmp_path, NAMES, shard_size=10)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    whole, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for place in [0, 9, *range(40, 400, 20), *torch.randint(400, len(whole), (40,), generator=generator).tolist()]:
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=path.name):
            dict(TokenLabelStore(tmp_path))
    path.write_bytes(whole)
    check(TokenLabelStore(tmp_path), NAMES)


def test_a_damaged_map_is_named_and_costs_no_other(tmp_path):
    write(tmp_path, NAMES)
    path = next(tmp_path.glob("*.safetensors"))
    data, damaged = bytearray(path.read_bytes()), label(3).values.numpy().tobytes()
    data[data.index(damaged)] ^= 8
    path.write_bytes(data)
    store = TokenLabelStore(tmp_path)
    assert torch.equal(store[NAMES[2]].values, label(2).values)
    with pytest.raises(ValueError, match=rf"label of image '{NAMES[3]}' in .*{path.name} is corrupt: copy the file"):
        store[NAMES[3]]


def test_a_resumed_run_does_not_bless_a_damaged_shard(tmp_path):
    write(tmp_path, NAMES)
    path = next(tmp_path.glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data.replace(b"class0/image_0", b"class0/image_9"))
    with pytest.raises(ValueError, match=f"{path.name} can't be read .its digest is not that in the index"):
        TokenLabelWriter(tmp_path, 100)
    path.write_bytes(data)
    TokenLabelWriter(tmp_path, 100).close()
    check(TokenLabelStore(tmp_path), NAMES)


def test_stores_without_digests_are_read(tmp_path):
    """As they were written before there were any."""
    write(tmp_path, NAMES)
    path, index = next(tmp_path.glob("*.safetensors")), json.loads((tmp_path / "index.json").read_text())
    tensors = {name: x.clone() for name, x in load_file(path).items() if name != "checksums"}
    save_file(tensors, path, metadata={"format": index["format"]})
    index["shards"] = [{"file": path.name, "bytes": path.stat().st_size}]
    (tmp_path / "index.json").write_text(json.dumps(index))
    check(TokenLabelStore(tmp_path), NAMES)
    check(write(tmp_path, ["class9/image_23"]), [*NAMES, "class9/image_23"])


def test_damaged_classes_name_the_image(tmp_path):
    write(tmp_path, NAMES)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"num_classes": 3}))
    with pytest.raises(ValueError, match=r"image 'class0/image_0' in .* is corrupt: classes must be in \[0, 3\)"):
        TokenLabelStore(tmp_path)[NAMES[0]]


def test_other_damaged_indexes(tmp_path):
    write(tmp_path, NAMES)
    with pytest.raises(ValueError, match="holds labels for 100 classes, got num_classes=10"):
        TokenLabelWriter(tmp_path, 10)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is corrupt"):
        TokenLabelStore(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other", "version": 2}')
    with pytest.raises(ValueError, match="got 'other', version 2"):
        TokenLabelStore(tmp_path)
    (tmp_path / "index.json").unlink()
    write(tmp_path, [])  # a writer makes a lost index again
    check(TokenLabelStore(tmp_path), NAMES)


def test_a_malformed_index_names_the_file(tmp_path):
    write(tmp_path, NAMES)
    path, good = tmp_path / "index.json", json.loads((tmp_path / "index.json").read_text())
    shard = good["shards"][0]
    contents = [b"\xff\xfe{", b"[" * 100_000, b"null", b"[]", b"3", b'"index"', b"{}"]
    changes = [{"num_classes": x} for x in (None, "100", 0, -1, True, 1.5, [100])]
    changes += [{"shape": x} for x in ([5, 6], [5, 6, "7"], [5, 6, -7], "5, 6, 7", {}, [5, 6, 7, 8])]
    changes += [{"shards": x} for x in (None, {}, "all", [None], ["a"], [[]], [{}], [3])]
    changes += [{"shards": [shard | {"file": x}]} for x in (None, 3, "", "labels", *OUTSIDE)]
    changes += [{"shards": [shard | {"file": x + ".safetensors"}]} for x in OUTSIDE]
    changes += [{"shards": [shard | {"bytes": x}]} for x in (None, "1", -1, 1.5, True)]
    changes += [{"shards": [shard | {"digest": x}]} for x in (3, [], {})]
    for content in contents + [json.dumps(good | change).encode() for change in changes]:
        path.write_bytes(content)
        for read in (TokenLabelStore, lambda folder: TokenLabelWriter(folder, 100)):
            with pytest.raises(ValueError, match=r"index\.json"):
                read(tmp_path)
    path.write_text(json.dumps(good))
    check(TokenLabelStore(tmp_path), NAMES)


# --- names that are paths elsewhere ---

OUTSIDE = ["../x", "/tmp/x", "a/../../x", "a\\b", "..\\x", "a/\0", "C:/x", "c:x"]


@pytest.mark.parametrize("name", [*OUTSIDE, "", ".", "..", "a/", "/", "a//b", "./a", "a/.", "a/..", "\\\\host\\x"])
def test_ids_that_leave_the_folder(tmp_path, name):
    with TokenLabelWriter(tmp_path / "labels", 100) as writer:
        with pytest.raises(ValueError, match="must be a relative path such as 'class/image', without"):
            writer.add(name, *label(0))
        writer.add("...a:b/..c d", *label(1))  # odd, but inside
    assert len(TokenLabelStore(tmp_path / "labels")) == 1
    publish(tmp_path / "files" / "inside", NAMES[:1])
    publish(tmp_path / "files", ["x_0"])
    files = TokenLabelStore(tmp_path / "files" / "inside")
    assert name not in files and "../x_0" not in files
    with pytest.raises(KeyError, match="no label for image"):
        files["../x_0"]


@pytest.mark.parametrize("name", ["../outside_1", "/tmp/outside_1", "a/../../outside_1", "..\\outside_1"])
def test_foreign_stores_are_not_unpacked_elsewhere(tmp_path, name, monkeypatch):
    monkeypatch.setattr(label_writer, "check_image_id", lambda name: name)
    write(tmp_path / "labels", [name])
    monkeypatch.undo()
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ValueError, match="must be a relative path"):
        unpack_labels(tmp_path / "labels", tmp_path / "a" / "b")
    with pytest.raises(ValueError, match="must be a relative path"):
        pack_labels(tmp_path / "labels", tmp_path / "again", 100)
    assert not list(tmp_path.rglob("*outside_1*"))


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_links_lead_nowhere(tmp_path):
    write(tmp_path / "labels", NAMES)
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "class1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"class1.* would be outside .*out, by a link in it"):
        unpack_labels(tmp_path / "labels", tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "labels")
    check(TokenLabelStore(tmp_path / "link"), NAMES)  # the folder itself may be anywhere
    shard = next((tmp_path / "labels").glob("*.safetensors"))
    shard.rename(tmp_path / "elsewhere" / shard.name)
    shard.symlink_to(tmp_path / "elsewhere" / shard.name)
    with pytest.raises(ValueError, match=rf"{shard.name} is a link to .*elsewhere.*, outside its folder"):
        TokenLabelStore(tmp_path / "labels")


def test_bad_writer_arguments(tmp_path):
    with pytest.raises(ValueError, match="at least 1, part at least 0: 0, 10, 0"):
        TokenLabelWriter(tmp_path, 10, shard_size=0)
