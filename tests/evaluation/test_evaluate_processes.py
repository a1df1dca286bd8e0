"""`drmm evaluate` in two processes on gloo, killed and repeated: the files of one process that was left alone.

This file is also what those processes run.
"""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_config
from drmm_cli import main
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor


NUM_PICTURES = 11  # no multiple of 2 processes x 2 pictures


def run_in_this_process(arguments):
    """Be one of the processes that the environment tells of."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(os.environ["STORE"], 2)
    torch.distributed.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
    if os.environ.get("KILL_AT") and os.environ["RANK"] == "0":
        kill_at_rename(int(os.environ["KILL_AT"]))
    sys.exit(main(arguments))


def kill_at_rename(number):
    """Kill this process, and none of the others, just before it puts its n-th part in place."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event == "os.rename" and str(arguments[1]).endswith(".npz"):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a model and data of two sizes of pictures."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(0)
    DrmmForObjectDetection(tiny_config()).save_pretrained(folder / "model")
    DrmmImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder / "model")
    (folder / "data" / "annotations").mkdir(parents=True)
    (folder / "data" / "val").mkdir()
    images, annotations = [], []
    for index in range(NUM_PICTURES):
        width, height = (40, 30) if index % 3 else (30, 40)
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data" / "val" / f"{index}.png")
        images.append({"id": 100 - index, "file_name": f"{index}.png", "width": width, "height": height})
        annotations.append({"id": index + 1, "image_id": 100 - index, "category_id": 1, "bbox": [2, 3, 20, 20]})
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": index, "name": f"LABEL_{index}"} for index in range(3)]
    (folder / "data" / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return folder


def arguments_for(folder, name):
    command = ["evaluate", str(folder / "model"), str(folder / "data"), "--batch-size", "2"]
    return [*command, "--device", "cpu", "--output", str(folder / name)]


def run_two(folder, name, kill_at=None):
    """Return what two processes said, and their exit codes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"ACCELERATE_USE_CPU": "true", "STORE": str(folder / f"store {name} {kill_at}")}
    environment |= {"OMP_NUM_THREADS": "1", "KILL_AT": str(kill_at or "")}
    processes = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank}
        # As a module it would find the conftest.py beside it, and not that of all tests.
        code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        command = [sys.executable, "-c", code, __file__, *arguments_for(folder, name)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment | ranks, **pipes))
    said = [process.communicate(timeout=300)[0] for process in processes]
    return said, [process.returncode for process in processes]


def files(folder):
    return [(folder / name).read_bytes() for name in ("detections.json", "metrics.json")]


def test_two_processes_one_of_them_killed_and_one_that_goes_on_write_the_same_bytes(folder, capsys):
    assert main(arguments_for(folder, "alone")) == 0
    assert main([*arguments_for(folder, "stream"), "--streaming"]) == 0
    assert files(folder / "stream") == files(folder / "alone")
    entries = json.loads((folder / "alone" / "detections.json").read_text())
    assert len({entry["image_id"] for entry in entries}) == NUM_PICTURES

    said, codes = run_two(folder, "both")
    assert codes == [0, 0], said
    assert files(folder / "both") == files(folder / "alone")
    assert "11 images" in said[0] and "images" not in said[1] and "class" not in said[1]

    said, codes = run_two(folder, "killed", kill_at=1)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0, said
    assert not (folder / "killed" / "detections.json").exists()
    (parts,) = (folder / "killed" / "parts").iterdir()
    assert sorted(path.name for path in parts.glob("*.npz")) == ["000001.npz"]
    capsys.readouterr()
    assert main(arguments_for(folder, "killed")) == 0
    assert "going on from 1 parts" in capsys.readouterr().out
    assert files(folder / "killed") == files(folder / "alone") and not parts.parent.exists()


if __name__ == "__main__":
    run_in_this_process(sys.argv[1:])
