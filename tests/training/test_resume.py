"""`drmm train` processes that are killed or stopped, and end as one that was left alone.

A process ends itself, with a real signal, at a chosen one of its operations on files: that is where a killed run can
leave something half done, so the moments are seeded and repeatable, in saves as between them. This file is also the
server that forks those processes, so that they do not import everything each time.
"""

import csv
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from drmm_hf.data.coco import categories
from drmm_hf.data.labels import LabelMap
from drmm_hf.data.loading import DetectionDataset
from drmm_hf.training.build import build_model, load_split, training_loader


RECIPE = Path(__file__).parent / "tiny.yaml"
# 7 batches, 4 steps an epoch, the last of a single batch; checkpoints in the middle of epochs and at their ends.
OPTIONS = {
    "num_train_images": 14,
    "num_workers": 0,
    "epochs": 2,
    "save_every_steps": 3,
    "evaluate_every": 1,
    "ema_decay": 0.9,
    "backbone_lr_factor": 0.1,
    "horizontal_flip": 0.5,
}
TIMES = {"seconds", "images_per_second", "training_seconds"}
# What a process does to files, as Python's audit hooks name it.
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}


def serve():
    """Fork the processes that each line of stdin asks for, and answer with their exit codes."""
    sys.argv[0] = "drmm"
    import drmm_hf.commands.evaluate
    import drmm_hf.commands.train  # noqa: F401
    from drmm_hf.training import loop
    from drmm_hf.visualization import evaluation_pictures, plots

    for module, name in (
        (loop, "save_augmented_pictures"),
        (evaluation_pictures, "draw_detections"),
        (plots, "training_curves"),
    ):
        setattr(module, name, lambda *_: None)  # pictures take a third of the time of such a run
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank in range(request["processes"]):
            child = os.fork()
            if child == 0:
                run(rank, **request)
            children.append(child)
        # Processes that would wait for each other for ever.
        signal.signal(signal.SIGALRM, lambda *_, leaders=children: end_groups(leaders))
        signal.alarm(120)
        codes = {}
        while len(codes) < len(children):
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            if codes[child] < 0:  # a launcher ends the others too; processes that read pictures are in the same group
                end_groups(children)
        signal.alarm(0)
        print(json.dumps([codes[child] for child in children]), flush=True)


def end_groups(leaders):
    for leader in leaders:
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def run(rank, arguments, processes, signal_number, name, at_event, output, environment):
    """Be one training process, which ends with its exit code."""
    os.setsid()
    file = os.open(f"{output}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in ranks.items()} | {"ACCELERATE_USE_CPU": "true"}
        store = torch.distributed.FileStore(f"{output}.store", processes)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        use_accelerate_config(environment)
    if rank == 0 and at_event is not None:
        folder = Path(arguments[arguments.index("--output") + 1])
        send_at(signal_number, at_event, str(folder if name is None else folder / name))
    from drmm_cli import main

    code = 1
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def use_accelerate_config(environment):
    """Set what `accelerate launch` sets for a config; for FSDP, let accelerate take the CPU for a GPU, as it must."""
    os.environ |= environment
    if "ACCELERATE_USE_FSDP" in environment:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def send_at(number, at_event, place):
    """Send this process a signal just before its n-th operation on files in a place."""
    process, count = os.getpid(), 0

    def hook(event, arguments):
        nonlocal count
        if event in FILE_EVENTS and os.getpid() == process and str(arguments[0]).startswith(place):
            count += 1
            if count == at_event:
                if event == "open" and "w" in str(arguments[1]) and number == signal.SIGKILL:
                    with suppress(FileNotFoundError):
                        os.truncate(arguments[0], 0)  # just after opening it, rather: what was there is gone
                os.kill(process, number)

    sys.addaudithook(hook)


class Server:
    """The forking process, seen from the tests."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, name, processes=1, at_event=None, number=signal.SIGKILL, inside=None, environment=None, **options):
        """Run `drmm train`, in the end or until its n-th operation on files (`inside` a folder of the run, or any).

        Returns the exit codes of its processes.
        """
        self.count += 1
        arguments = ["train", str(RECIPE), "--output", str(self.folder / name)]
        if (self.folder / name).exists():
            arguments.append("--resume")
        for option, value in {**OPTIONS, **options}.items():
            arguments += [f"--{option.replace('_', '-')}", str(value)]
        request = {
            "arguments": arguments,
            "processes": processes,
            "signal_number": int(number),
            "name": inside,
            "at_event": at_event,
            "output": str(self.folder / f"output-{self.count}"),
            "environment": environment or {},
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def output(self):
        """Return what the processes of the last run wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"output-{self.count}.[0-9]")))

    def train_and_kill(self, name, events, **options):
        """Run until it is done, killed at each of these operations on files."""
        for event in events:
            codes = self.train(name, at_event=event, **options)
            assert codes[0] == -signal.SIGKILL, self.output()
        codes = self.train(name, **options)
        assert set(codes) == {0}, self.output()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("runs"))
    yield server
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture(scope="module")
def whole(server):
    assert server.train("whole") == [0], server.output()
    return results(server.folder / "whole")


@pytest.fixture(scope="module")
def whole_of_two(server):
    assert server.train("whole_of_two", processes=2) == [0, 0], server.output()
    return results(server.folder / "whole_of_two")


def timeless(values):
    return {name: value for name, value in values.items() if name not in TIMES}


def results(folder):
    """Return everything that a run leaves behind, but for its times."""
    log = [timeless(json.loads(line)) for line in (folder / "log.jsonl").read_text().splitlines()]
    optimizer = torch.load(folder / "last" / "training_state" / "optimizer.bin")["state"]
    return {
        "losses": [(line["step"], line["loss"]) for line in log if "loss" in line],
        "log": log,
        "table": [timeless(row) for row in csv.DictReader((folder / "results.csv").open())],
        "weights": {
            f"{name}/{path.relative_to(folder / name)}": load_file(path)
            for name in ("last", "best")
            for path in sorted((folder / name).rglob("*.safetensors"))
        },
        "optimizer": {f"{key} {name}": value for key, state in optimizer.items() for name, value in state.items()},
        "summary": timeless(json.loads((folder / "summary.json").read_text())),
    }


def assert_same(found, expected):
    for part in ("losses", "log", "table", "summary"):
        assert found[part] == expected[part]
    assert_equal_tensors(found["optimizer"], expected["optimizer"])
    assert found["weights"].keys() == expected["weights"].keys()
    for file, weights in expected["weights"].items():
        assert_equal_tensors(found["weights"][file], weights)


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_an_undisturbed_run_is_what_the_others_are_compared_with(whole):
    assert [step for step, _ in whole["losses"]] == list(range(1, 9))
    assert len(whole["table"]) == 2 and whole["summary"]["steps"] == 8
    files = {"last": ["model.raw", "model", "training_state/model"], "best": ["model.raw", "model"]}
    names = [f"{folder}/{name}.safetensors" for folder, names in files.items() for name in names]
    assert sorted(whole["weights"]) == sorted(names)
    average, raw, state = (whole["weights"][name] for name in (names[1], names[0], names[2]))
    assert_equal_tensors(raw, state)
    assert not any(torch.equal(average[name], raw[name]) for name in raw if name.endswith("box_mean.weight"))


def moments(seed, count):
    """Draw operations at which to kill; a run has about 200, of which 95 until its first evaluation."""
    return [random.Random(seed + index).randrange(1, 160) for index in range(count)]


@pytest.mark.parametrize(("num_workers", "events"), [(0, moments(0, 4)), (2, moments(10, 2))])
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(server, whole, num_workers, events):
    """Batches do not depend on the number of workers either."""
    name = f"killed, {num_workers} workers"
    server.train_and_kill(name, events, num_workers=num_workers)
    assert_same(results(server.folder / name), whole)
    starts = json.loads((server.folder / name / "manifest.json").read_text())
    assert len({start["step"] for start in starts}) > 1  # it did get on between the kills


def test_so_do_two_processes_that_are_killed_together(server, whole_of_two):
    server.train_and_kill("killed, two processes", moments(20, 2), processes=2)
    assert_same(results(server.folder / "killed, two processes"), whole_of_two)


@pytest.mark.parametrize("name", ["recipe.yaml", "log.jsonl", "results.csv"])
def test_so_does_a_run_killed_as_it_opens_a_file_to_write(server, whole, name):
    """Once it has a checkpoint: at the first and the second operation on the file, of one process after another."""
    assert server.train(f"killed in {name}", at_event=1, inside="step-00000003") == [-signal.SIGKILL], server.output()
    for event in (1, 2, 1):
        server.train(f"killed in {name}", at_event=event, inside=name)
    assert server.train(f"killed in {name}") == [0], server.output()
    assert_same(results(server.folder / f"killed in {name}"), whole)


@pytest.mark.parametrize(("inside", "event"), [("best.partial", 1), ("results.csv", 2)])
def test_so_does_a_run_whose_newest_checkpoint_was_damaged_after_the_kill(server, whole, inside, event):
    """Killed in its first and in its second evaluation, with two checkpoints to go on from."""
    name = f"damaged in {inside}"
    assert server.train(name, at_event=event, inside=inside) == [-signal.SIGKILL], server.output()
    folder = server.folder / name
    optimizer = folder / "last" / "training_state" / "optimizer.bin"
    os.truncate(optimizer, optimizer.stat().st_size // 2)
    before = sorted(path.name for path in folder.glob("step-*"))
    assert before
    assert server.train(name) == [0], server.output()
    output = server.output()
    assert "warning: damaged in" in output and f"{before[-1]} is the newest whole checkpoint" in output
    assert_same(results(folder), whole)


STOPS = [
    (signal.SIGINT, 1, "last.partial", 4),
    (signal.SIGTERM, 2, "last.partial", 2),
    (signal.SIGTERM, 1, "best.partial", 4),
]


@pytest.mark.parametrize(("number", "processes", "inside", "step"), STOPS)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(server, request, number, processes, inside, step):
    """The signal comes to one process, in its first checkpoint (of two, at an epoch's end) or as it saves the best."""
    expected = request.getfixturevalue("whole" if processes == 1 else "whole_of_two")
    name = f"stopped by {number.name} in {inside}, {processes} processes"
    codes = server.train(name, processes, 1, number, inside)
    assert codes == [128 + number] * processes, server.output()
    folder = server.folder / name
    assert json.loads((folder / "last" / "training_state" / "record.json").read_text())["step"] == step
    assert f"stopped by {number.name}; the run is saved in last/" in server.output()
    assert set(server.train(name, processes)) == {0}, server.output()
    assert_same(results(folder), expected)


def test_a_folder_in_use_is_refused_by_the_command(server, whole):
    with (server.folder / "whole" / "run.lock").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert server.train("whole") == [2]
    assert "drmm train: output_dir" in server.output() and "is in use by process" in server.output()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pictures_of_skipped_batches_are_not_read(tiny_recipe, monkeypatch, num_workers):
    """Resumed after 3 of 5 batches, the loader reads the pictures of the other two, as it would have."""
    read = torch.zeros(10, dtype=torch.int64).share_memory_()
    getitem = DetectionDataset.__getitem__

    def count_and_get(dataset, index):
        read[index] += 1
        return getitem(dataset, index)

    monkeypatch.setattr(DetectionDataset, "__getitem__", count_and_get)
    recipe = tiny_recipe(num_workers=num_workers)
    dataset, _ = load_split(recipe.data, "train")
    label_map = LabelMap.from_categories(categories(dataset))
    _, processor = build_model(recipe, label_map)
    loader = Accelerator(cpu=True).prepare(training_loader(dataset, label_map, processor, recipe))
    loader.set_epoch(1)
    pixels = [batch["pixel_values"] for batch in loader]
    assert read.tolist() == [1] * 10
    loader.set_epoch(1)
    rest = [batch["pixel_values"] for batch in skip_first_batches(loader, 3)]
    assert sorted(read.tolist()) == [1] * 6 + [2] * 4
    assert len(rest) == 2 and all(torch.equal(*pair) for pair in zip(rest, pixels[3:], strict=True))


if __name__ == "__main__":
    serve()
