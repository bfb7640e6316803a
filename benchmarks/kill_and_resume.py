"""Kill runs at random moments and resume them: python benchmarks/kill_and_resume.py [--kills 20] [--only annotate].

Each row is a command of `timm-tokens` on a tiny model and images that are made here. It runs once undisturbed; then for
each kill it is started, killed by SIGKILL at a moment drawn evenly from the processor time that the undisturbed run
took, and started again. Every file that it leaves must have the same bytes as that of the undisturbed run, and no
other file may be left. It forks and reads /proc, so it takes Linux; the processes compute on the CPU, each with one
thread.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_tokens.cli.commands import COMMANDS, main, module_of

MODEL = {"depth": 2, "num_heads": 2, "embed_dim": 32}  # of test_vit
COMMON = (
    "--data-dir images --model test_vit --img-size 32 --batch-size 8 --workers {workers} --device cpu --model-kwargs "
)
COMMON += " ".join(f"{name}={value}" for name, value in MODEL.items())
COMMON += " --save-every 2 --log-every 2 --out run --resume"
CROPS = "--prototypes 16 --head-hidden 16 --local-crops 1 --local-size 16 --epochs 3"
ROWS = {
    "dino": f"train mte --loss dino {CROPS} {COMMON}",
    "ibot": f"train mte --loss ibot {CROPS} {COMMON}",
    "moby": f"train mte --loss moby --head-hidden 16 --queue-size 32 --epochs 3 {COMMON}",
    "dtm": f"train dtm --teacher test_vit --teacher-checkpoint teacher.safetensors --epochs 5 {COMMON}",
    "mira": f"train mira {CROPS} {COMMON}",
    "token-label": f"train token-label --labels labels --ema 0.9 --clip-grad 1 --epochs 4 {COMMON}",
    "merging": f"train dtem --checkpoint small.safetensors --val-split= --epochs 4 {COMMON}",  # its table has speeds
    "annotate": "annotate images/train run --model test_vit --checkpoint teacher.safetensors --batch-size 4 "
    "--workers {workers} --device cpu --shard-size 10 --top-k 2 --num-classes 2",
}


class Row(NamedTuple):
    """What one command went through.

    Attributes:
        seconds: Processor time that it took undisturbed.
        kills: How many runs were killed; those that were done before that don't count.
        unsaved: How many of them had no checkpoint, or no map, by then.
        same: How many of them have the same bytes after they were resumed.
    """

    name: str
    seconds: float
    kills: int
    unsaved: int
    same: int


def run() -> None:
    options = parse()
    random.seed(options.seed)
    torch.set_num_threads(1)
    for command in COMMANDS:
        module_of(command)  # imported here, so that the processes start at once
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        make_inputs()
        print(f"{'':12} {'seconds':>8} {'killed':>7} {'unsaved':>8} {'same bytes':>11}")
        failed = 0
        for name in options.only or ROWS:
            if name == "merging" and "train dtem" not in COMMANDS:
                continue
            row = measure(name, options.kills, options.workers)
            failed += row.same < options.kills
            same = f"{row.same} of {options.kills}"
            print(f"{row.name:12} {row.seconds:8.1f} {row.kills:7} {row.unsaved:8} {same:>11}", flush=True)
    sys.exit(int(failed > 0))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills of each command (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=ROWS, help="commands to try (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    return parser.parse_args()


def make_inputs() -> None:
    """Images of two classes, a teacher, and label maps by it, in the current folder."""
    torch.manual_seed(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in "ab":
            folder = Path("images", split, name)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(255, (40, 40 + i, 3), dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    save_file(timm.create_model("test_vit", num_classes=2).state_dict(), "teacher.safetensors")
    save_file(timm.create_model("test_vit", img_size=32, num_classes=2, **MODEL).state_dict(), "small.safetensors")
    finish(start(ROWS["annotate"].format(workers=0).split()))
    Path("run").rename("labels")


def measure(name: str, kills: int, workers: int) -> Row:
    """Run one command undisturbed, and then until it was killed so often."""
    command, out = ROWS[name].format(workers=workers).split(), Path("run")
    seconds = finish(start(command))
    wanted, killed, unsaved, same = contents(out), 0, 0, 0
    while killed < kills:
        shutil.rmtree(out, ignore_errors=True)
        if not kill_after(start(command), random.random() * seconds):
            continue
        killed += 1
        unsaved += not any(out.glob("*.pth")) and not any(out.glob("*.journal")) and not any(out.glob("labels-*"))
        finish(start(command))
        odd = sorted(name for name, _ in contents(out).items() ^ wanted.items())
        same += not odd
        if odd:
            print(f"kill {killed} of {name}: {', '.join(odd)} differ", flush=True)
    shutil.rmtree(out)
    return Row(name, seconds, killed, unsaved, same)


def start(arguments: list[str]) -> int:
    """The command in a process of its own, whose output goes to a file."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = main(arguments)
        finally:
            os._exit(code)
    return child


def finish(child: int) -> float:
    """Wait for the end: the processor time that it took, in seconds."""
    _, status, usage = os.wait4(child, 0)
    if status:
        raise RuntimeError(f"the command failed: {Path('log.txt').read_text()[-2000:]}")
    return usage.ru_utime + usage.ru_stime


def kill_after(child: int, seconds: float) -> bool:
    """Whether the process was still there to be killed after so much processor time."""
    while processor_time(child) < seconds:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def processor_time(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files but the empty ones that serve as locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


if __name__ == "__main__":
    run()
