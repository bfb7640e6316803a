"""The command: its table, its errors, and what bench, draw and run do."""

import csv
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image

import timm_tokens
from timm_tokens.cli import COMMANDS, CommandError, call, main
from timm_tokens.cli.bench import timing

# PIL keeps a handle of a corrupt file open until it is collected
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = torch.randint(0, 255, (160, 160, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(path)
    return path


def fails(capsys, *argv):
    """The one line that the command prints as it fails."""
    assert main([str(arg) for arg in argv]) == 2
    out = capsys.readouterr()
    assert len(out.err.strip().splitlines()) == 1
    return out.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0 and command in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_about_all_commands_does_without_torch(words):
    """Whose import takes seconds."""
    code = "import sys; sys.argv[0] = 'bin/timm-tokens'; import timm_tokens.cli as cli\ntry: cli.main()\n"
    code += "except SystemExit: sys.exit({'torch', 'timm', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "set()\n" and "timm-tokens" in done.stdout
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "timm_tokens", *words], capture_output=True, text=True
    )
    assert done.returncode == 0 and " torch\n" not in done.stderr


def test_module_and_version():
    result = subprocess.run(
        [sys.executable, "-m", "timm_tokens", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"timm-tokens {timm_tokens.__version__}"


def test_bench_writes_what_it_prints(tmp_path, capsys):
    arguments = [
        "bench",
        "test_vit",
        "--r",
        "0",
        "8",
        "--batch-size",
        "2",
        "1",
        "--rounds",
        "2",
        "--no-memory",
        "--threads",
        "1",
        "--out",
    ]
    assert main([*arguments, str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    with (tmp_path / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = [("forward", ""), ("forward", "0"), ("forward", "8"), ("dropped", "8")]
    assert [(row["batch"], row["step"], row["r"]) for row in rows] == [(b, *line) for b in "21" for line in shown]
    assert rows[3]["tokens"] == "53" and float(rows[3]["ideal"]) > float(rows[2]["ideal"])  # it compares none
    assert rows[2]["tokens"] == "53" and float(rows[2]["ideal"]) > 1.2 and float(rows[0]["speed_up"]) == 1
    for row in rows:
        assert f"| {float(row['images_per_second']):.1f} |" in printed
        assert float(row["share"]) == pytest.approx(float(row["speed_up"]) / float(row["ideal"]))
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_bench_says_where_fewer_tokens_merge_than_asked_for(capsys):
    line = "bench test_vit --img-size 64 --r 1 8 --batch-size 1 --rounds 1 --no-memory --no-dropped --device cpu"
    assert main(line.split()) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("r = ")]
    depth = len(timm.create_model("test_vit").blocks)
    assert len(notes) == 1 and notes[0].startswith(f"r = 8 asks for {8 * depth} tokens in all, of which 15 merge: ")


def test_bench_of_training_steps_trains_what_it_says():
    options = dict(model="test_vit", batch_size=[2], rounds=1, train=True, memory=False, img_size=96)
    rows = call("bench", r=[0, 4], **options)  # where nothing merges there are no embeddings to train
    assert [(row.step, row.r, row.ideal) for row in rows] == [
        ("full", None, None),
        ("modular", 4, None),
        ("end-to-end", 4, None),
    ]
    machine = timing.MachineOptions(model="test_vit", img_size=96, device="cpu")
    model = timing.build(machine, timing.Setting("modular", 2, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    timing.make_step(machine, timing.Setting("modular", 2, 4), model)()
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"merger"}
    with pytest.raises(CommandError, match="merging by keys has none: leave out --train"):
        call("bench", metric="keys", **options)


def test_bench_measures_memory_in_a_process_of_its_own():
    machine = timing.MachineOptions(model="test_vit", metric="keys", device="cpu")
    grown = timing.peak_memory(machine, timing.Setting("forward", 64, None))
    assert grown is None or 10 < grown < 2000  # 64 images alone are 19 MiB


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("bench no_such_vit", "timm has no model 'no_such_vit'"),
        ("bench test_resnet --rounds 1", "can't be driven from outside"),
        ("bench test_vit --r -1", "--r must be at least 0, got -1"),
        ("bench test_vit --threads 0", "--threads must be at least 1 and at most 1024, got 0"),
        ("bench test_vit --image-size 100", "--img-size 100 does not fit: images of 100 x 100 px are not filled by"),
        ("bench test_vit --device nowhere", "can't use --device nowhere: "),
        ("bench test_vit --batch-size 0", "--batch-size must be at least 1, got 0"),
    ],
)
def test_bench_refuses(argv, words, capsys):
    assert words in fails(capsys, *argv.split())


def checkpoint(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    return path


def test_draw_paints_the_groups(tmp_path, photo):
    out = tmp_path / "pictures" / "groups.png"
    weights = checkpoint(tmp_path)
    argv = ["draw", photo, out, "--model", "test_vit", "--checkpoint", weights, "--r", "6", "--blocks", "1", "6"]
    assert main([str(arg) for arg in argv]) == 0
    width, height = Image.open(out).size
    assert width > 2 * height
    panels = call("draw", image=photo, out=out, model="test_vit", checkpoint=weights, r=6, blocks=[1, 6])
    assert [(p.block, p.tokens) for p in panels] == [(1, 94), (6, 64)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "missing.png"}, "no image"),
        ({"image": "."}, "is a folder, not an image"),
        ({"image": "corrupt.png"}, "can't be read as an image"),
        ({"out": "groups.docx"}, "end its name in .png"),
        ({"--model": "no_such_vit"}, "timm has no model"),
        ({"--model": "test_resnet"}, "can't be driven"),
        ({"--r": "60"}, "--r 60 is too large"),
        ({"--r": "-1"}, "--r must be at least 0, got -1"),
        ({"--blocks": "7"}, "numbers from 1 to 6, the model's depth, got 7"),
        ({"--checkpoint": "missing.pth"}, "no checkpoint file"),
        ({"--checkpoint": "corrupt.png"}, "can't be read as a checkpoint"),
        ({"--checkpoint": "other.pth"}, "doesn't fit the model"),
    ],
)
def test_draw_refuses_and_leaves_nothing(change, words, tmp_path, photo, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG no image")
    torch.save(timm.create_model("test_vit3").state_dict(), "other.pth")
    checkpoint(tmp_path)
    files = set(tmp_path.iterdir())
    given = {"image": "photo.png", "out": "groups.png", "--model": "test_vit", "--checkpoint": "weights.pth"} | change
    argv = [given.pop("image"), given.pop("out"), *(word for pair in given.items() for word in pair)]
    assert words in fails(capsys, "draw", *argv)
    assert set(tmp_path.iterdir()) == files


def test_run_gives_timms_scripts_the_registered_models(tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, timm, helper\n"
        "if __name__ == '__main__':\n    print(sys.argv[1:], helper.x, timm.is_model('deit_tiny_dtem'))\n"
    )
    (tmp_path / "helper.py").write_text("x = 3")
    before = sys.argv
    assert main(["run", str(script), "--model", "deit_tiny_dtem", "-b", "4"]) == 0
    assert capsys.readouterr().out.strip() == "['--model', 'deit_tiny_dtem', '-b', '4'] 3 True"
    assert sys.argv is before
    assert "no script" in fails(capsys, "run", tmp_path / "missing.py")
