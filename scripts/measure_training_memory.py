"""Measure whether the memory of a training run stays flat: a real `drmm train` of a tiny model on generated pictures.

The run has everything that could keep something: loader workers, pictures of changing size, a moving average,
checkpoints, evaluations, logs. Memory is what the training process and its workers have resident, read each time that
a line of the log appears. Prints the first and last reading and the slope of a straight line through the second half;
writes the readings and a picture.

    python scripts/measure_training_memory.py OUTPUT [STEPS]
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


LOG_EVERY = 10
RECIPE = {
    "model": {
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "num_queries": 16,
        "proposal_grid": [4, 4],
        "num_stages": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "dynamic_size": 4,
        "box_delta_unit": "box",
    },
    "data": {
        "source": "generated",
        "num_train_images": 400,
        "num_val_images": 20,
        "image_size": [96, 128],
        "shortest_edge": 96,
        "longest_edge": 128,
        "augmentation": "flip_multiscale",
        "short_edges": [64, 72, 80, 88, 96],
        "num_workers": 1,
    },
    "training": {
        "batch_size": 2,
        "learning_rate": 5e-4,
        "warmup_steps": 100,
        "ema_decay": 0.99,
        "evaluate_every": 2,
        "log_every": LOG_EVERY,
    },
}


def measure(output: Path, steps: int) -> np.ndarray:
    """Train and read the memory at each line of the log.

    Args:
        output (`Path`): Folder for the recipe, the run and its standard output; new or empty.
        steps (`int`): Optimiser steps.

    Returns:
        `np.ndarray` of shape `(readings, 3)`: Step, and MiB of the training process and of its workers.
    """
    output.mkdir(parents=True, exist_ok=True)
    recipe = {**RECIPE, "training": {**RECIPE["training"], "max_steps": steps, "output_dir": str(output / "run")}}
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    readings, log = [], output / "run" / "log.jsonl"
    with (output / "train.log").open("w") as file:
        command = [sys.executable, "-m", "drmm_hf", "train", str(output / "recipe.yaml")]
        trainer = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        process, read = psutil.Process(trainer.pid), 0
        while trainer.poll() is None:
            time.sleep(0.05)
            lines = log.read_text().splitlines() if log.exists() else []
            if len(lines) > read and "loss" in (line := json.loads(lines[-1])):
                try:
                    workers = sum(child.memory_info().rss for child in process.children(recursive=True))
                    readings.append((line["step"], process.memory_info().rss / 2**20, workers / 2**20))
                except psutil.NoSuchProcess:
                    pass  # it has just ended
            read = len(lines)
    if trainer.returncode:
        raise SystemExit(f"the training failed, see {output / 'train.log'}")
    return np.array(readings)


def draw(readings: np.ndarray, slopes: np.ndarray, path: Path):
    """Draw the memory against the steps.

    Args:
        readings (`np.ndarray` of shape `(readings, 3)`): From `measure`.
        slopes (`np.ndarray` of shape `(2,)`): KiB a step of process and workers, over the second half.
        path (`Path`): Picture to write.
    """
    figure = Figure(figsize=(7, 3.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for column, (name, colour) in enumerate((("training process", "#0072b2"), ("its loader worker", "#e69f00"))):
        label = f"{name}: {slopes[column]:+.2f} KiB a step over the second half"
        axes.plot(readings[:, 0], readings[:, 1 + column], color=colour, label=label)
    axes.set(xlabel="step", ylabel="resident memory (MiB)", ylim=(0, None), xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d9dde3", linewidth=0.7)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    table = measure(folder, int(sys.argv[2]) if len(sys.argv) > 2 else 2000)
    half = table[len(table) // 2 :]
    slopes = 1024 * np.polyfit(half[:, 0], half[:, 1:], 1)[0]
    np.savetxt(folder / "memory.csv", table, "%.4f", ",", header="step,process_mib,workers_mib")
    draw(table, slopes, folder / "memory.png")
    for column, name in enumerate(("training process", "loader worker")):
        values = table[:, 1 + column]
        first, middle, last = (values[position] for position in (0, len(values) // 2, -1))
        print(
            f"{name}: {first:.1f} MiB at step {table[0, 0]:.0f}, {middle:.1f} at step {half[0, 0]:.0f}, {last:.1f} at "
            f"step {table[-1, 0]:.0f}, most {values.max():.1f}; second half {slopes[column]:+.3f} KiB a step"
        )
