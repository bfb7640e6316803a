"""The token-label example, run as a user runs it but for few images."""

import csv
import json
from pathlib import Path

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

# timm's ImageDataset leaves the closing of its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import token_labels

    monkeypatch.setattr(token_labels, "DIGITS", 40)
    return token_labels.main  # stays imported: it registers models


def table(out):
    with (out / "table.csv").open(newline="") as file:
        return {row[0]: [float(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]}


def test_digits(example, tmp_path, capsys):
    line = f"--epochs 1 --seeds 2 --batch-size 20 --out {tmp_path} --device cpu".split()
    assert example(line) == 0
    rows = table(tmp_path)
    assert [*rows] == ["classes alone", "token labels", "gain, token labels"]
    gain = rows["gain, token labels"]
    assert gain[0] == pytest.approx(rows["token labels"][0] - rows["classes alone"][0], abs=0.011)
    assert gain[2] == pytest.approx(sum(gain[:2]) / 2, abs=0.011)
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.width > 400
    assert "| gain, token labels | " in capsys.readouterr().out
    assert example(line) == 0 and table(tmp_path) == rows  # what is done is not done again, and is reported the same


def test_folder_of_images(example, tmp_path, capsys):
    for split in ("train", "val"):
        for name in "abcdef":
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), (80 + 9 * i, 40, 200)).save(tmp_path / "images" / split / name / f"{i}.png")
    save_file(timm.create_model("test_vit", num_classes=6).state_dict(), tmp_path / "vit.safetensors")
    line = f"--data-dir {tmp_path / 'images'} --annotator test_vit --checkpoint {tmp_path / 'vit.safetensors'}"
    line += " --num-classes 6 --model test_vit --img-size 32 --model-kwargs depth=1 --epochs 1 --seeds 1 --batch-size 4"
    assert example([*line.split(), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert len(table(tmp_path / "out")) == 3
    assert example([*line.split(), "--variants", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert len(table(tmp_path / "out")) == 9
    notes = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/options.json")]
    assert sorted((bool(note["labels"]), note["mix"], note["ground_truth"]) for note in notes) == [
        (False, True, False), (True, False, False), (True, False, True), (True, True, False), (True, True, True),
    ]  # fmt: skip
    assert example([*line.split(), "--out", str(tmp_path / "new"), "--val-split", "other"]) == 2
    assert "token_labels: no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example(["--data-dir", str(tmp_path)])
    assert "--data-dir needs --annotator" in capsys.readouterr().err
