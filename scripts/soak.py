"""Wear the package out: kill a training run again and again, predict for long, let one of two processes die.

    python scripts/soak.py kills --number 50
    python scripts/soak.py predictions --number 1000
    python scripts/soak.py rank

Each prints what happened and exits with 1 if it is not what should happen. That training keeps its memory over 2,000
steps is `scripts/measure_training_memory.py`'s to show.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import yaml
from measure_training_memory import RECIPE
from safetensors.torch import load_file
from tqdm import tqdm

from drmm_hf import DrmmConfig, DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.generated import generate_shapes
from drmm_hf.evaluation.predict import predict


TRAINING = {"max_steps": 60, "save_every_steps": 1, "evaluate_every": 1, "warmup_steps": 5, "log_every": 1}
DATA = {"num_train_images": 40, "num_val_images": 8, "num_workers": 0}


def write_recipe(folder: Path, **training: object) -> Path:
    """Write a small recipe that evaluates and saves all the time.

    Args:
        folder (`Path`): Where to.
        **training (`object`): Further fields of its section `training`.

    Returns:
        `Path`: The recipe.
    """
    recipe = {
        "model": RECIPE["model"] | {"dropout": 0.1},
        "data": RECIPE["data"] | DATA,
        "training": RECIPE["training"] | TRAINING | training,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(recipe: Path, output: Path, *launcher: str) -> subprocess.Popen:
    """Start `drmm train --resume` in a process group of its own.

    Args:
        recipe (`Path`): The recipe.
        output (`Path`): Folder of the run; what is printed goes to the file of its name that ends in `.log`.
        *launcher (`str`): What to start it with, such as `torchrun` and its options; by default this Python.

    Returns:
        `subprocess.Popen`: The process that leads the group.
    """
    command = [*(launcher or [sys.executable]), "-m", "drmm_hf", "train", str(recipe), "--output", str(output)]
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen([*command, "--resume"], stdout=log, stderr=log, start_new_session=True)


def kills(number: int) -> bool:
    """Kill a run at random moments until it has been killed often enough, then let it end.

    Args:
        number (`int`): Kills.

    Returns:
        `bool`: Whether its weights and figures are those of a run that nobody disturbed, to the last bit.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = write_recipe(folder)
        began = time.perf_counter()
        if train(recipe, folder / "whole").wait() != 0:
            print((folder / "whole.log").read_text())
            return False
        seconds = time.perf_counter() - began
        log, done = folder / "killed" / "log.jsonl", 0
        for _ in tqdm(range(number), desc="kills"):
            process = train(recipe, folder / "killed")
            before = log.stat().st_size if log.is_file() else 0
            # Most kills hit the start otherwise: wait for the first new line of most starts.
            while random.random() < 0.98 and process.poll() is None:
                if log.is_file() and log.stat().st_size > before:
                    break
                time.sleep(0.05)
            time.sleep(random.uniform(0, 0.3))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                done += 1
            process.wait()
            if (folder / "killed" / "summary.json").is_file():
                break
        code = train(recipe, folder / "killed").wait()
        said = (folder / "killed.log").read_text()
        same = code == 0 and _same_run(folder / "whole", folder / "killed")
        print(f"{done} kills, then exit code {code}; undisturbed, {TRAINING['max_steps']} steps took {seconds:.0f} s")
        defects = len(re.findall("Traceback|--debug shows", said))
        print(f"starts that ended in a defect: {defects}; weights and figures the same: {same}")
        if not same:
            print(said[-4000:])
    return same and done == number and not defects


def _same_run(first: Path, second: Path) -> bool:
    """Compare the weights of both checkpoints, to the bit, and all figures of the best one."""
    for name in ("best", "last"):
        one, other = (load_file(run / name / "model.safetensors") for run in (first, second))
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in ("metrics.json", "detections.json")
    )


def predictions(number: int) -> bool:
    """Predict on pictures of changing size and read the memory.

    Args:
        number (`int`): Pictures.

    Returns:
        `bool`: Whether the second half of them added less than 1 MiB for 100 pictures.
    """
    model = DrmmForObjectDetection(DrmmConfig(**RECIPE["model"])).eval()
    processor = DrmmImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    sizes = [(96, 128), (160, 96), (64, 64), (100, 333), (333, 100)]
    rows = [next(iter(generate_shapes(1, seed, image_size=size))) for seed, size in enumerate(sizes)]
    process, readings = psutil.Process(), []
    for index in tqdm(range(number), desc="predictions"):
        predict(model, processor, [rows[index % len(rows)]], progress=False)
        readings.append(process.memory_info().rss / 2**20)
    half = np.arange(number // 2, number)
    slope = 100 * np.polyfit(half, np.array(readings)[half], 1)[0]
    print(f"{number} predictions: {readings[0]:.1f} MiB after the first, {readings[-1]:.1f} after the last;")
    print(f"a straight line through the second half rises by {slope:.3f} MiB for 100 predictions")
    return bool(slope < 1)


def rank() -> bool:
    """Kill one of two processes of a run.

    Returns:
        `bool`: Whether the other and their launcher end within a minute, with an exit code that is not 0.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = write_recipe(folder, max_steps=100_000, evaluate_every=0)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = train(recipe, folder / "run", *launcher)
        while process.poll() is None and not (folder / "run" / "last").is_dir():
            time.sleep(0.5)
        if process.poll() is not None:
            print((folder / "run.log").read_text())
            return False
        ranks = psutil.Process(process.pid).children(recursive=True)
        ranks[-1].kill()
        began = time.perf_counter()
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            print("still running after 120 s")
            return False
        seconds = time.perf_counter() - began
        left = [one for one in ranks if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        again = train(write_recipe(folder, max_steps=3), folder / "run").wait()
        print(
            f"exit code {code} {seconds:.1f} s after the kill, {len(left)} processes left; --resume: exit code {again}"
        )
        if again:
            print((folder / "run.log").read_text()[-4000:])
        return code != 0 and seconds < 60 and not left and again == 0


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["kills", "predictions", "rank"])
    parser.add_argument("--number", type=int, help="of kills (50) or predictions (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    random.seed(args.seed)
    torch.manual_seed(0)
    if args.what == "kills":
        return not kills(args.number or 50)
    return not (predictions(args.number or 1000) if args.what == "predictions" else rank())


if __name__ == "__main__":
    raise SystemExit(main())
