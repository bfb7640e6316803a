"""The few-shot example runs on its embedded digits and on a folder of images."""

import runpy
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "fewshot.py"


def test_digits(capsys):
    pytest.importorskip("sklearn")
    runpy.run_path(str(EXAMPLE))["main"](["--episodes", "2"])
    assert capsys.readouterr().out.count("| bd_cspn |") == 2  # of one shot, and of five


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves closing to the garbage collector
def test_images(tmp_path, capsys):
    for k in range(5):
        (tmp_path / "images" / str(k)).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (50 * k, 10 * i, 0)).save(tmp_path / "images" / str(k) / f"{i}.png")
    command = f"--data-dir {tmp_path / 'images'} --model test_vit --random --episodes 2 --out {tmp_path / 'out'}"
    runpy.run_path(str(EXAMPLE))["main"](command.split())
    assert capsys.readouterr().out.count("| bd_cspn |") == 3
    assert (tmp_path / "out" / "fewshot.csv").is_file()
