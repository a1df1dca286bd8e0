import json
import os
import random
import re
import resource
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.evaluation.files import write_text
from drmm_hf.training import checkpoint
from drmm_hf.training.checkpoint import (
    Progress,
    find_checkpoint,
    finish_folder,
    load_checkpoint,
    save_checkpoint,
    save_model,
    start_folder,
)


class Saveable(nn.Linear):
    """A model whose `save_pretrained` can be told to fail."""

    broken = False

    def save_pretrained(self, folder):
        (folder / "weights").write_text(str(self.weight.detach().flatten().tolist()))
        if self.broken:
            raise OSError("no space left on device")


class Processor:
    def save_pretrained(self, folder):
        (folder / "processor").write_text("")


@pytest.fixture
def run(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = Saveable(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)

    def step(keep_last=2):
        progress.step += 1
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        save_checkpoint(accelerator, tmp_path, model, Processor(), progress, keep_last)

    return accelerator, model, optimizer, progress, step


def step_of(folder):
    return json.loads((folder / "training_state" / "record.json").read_text())["step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_small_file_is_never_half_there(tmp_path, monkeypatch):
    write_text(tmp_path / "log", "one\n")
    write_text(tmp_path / "log", "two\n")
    assert names(tmp_path) == ["log"] and (tmp_path / "log").read_text() == "two\n"
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: 1 / 0)  # killed just before
    with pytest.raises(ZeroDivisionError):
        write_text(tmp_path / "log", "three\n")
    assert (tmp_path / "log").read_text() == "two\n"


def test_a_folder_appears_only_when_finished(tmp_path):
    target = tmp_path / "best"
    (start_folder(target) / "a").write_text("1")
    assert not target.exists()
    finish_folder(target)
    assert names(tmp_path) == ["best"]
    (start_folder(target) / "b").write_text("2")
    assert names(target) == ["a"]
    finish_folder(target)
    assert names(target) == ["b"]
    assert names(tmp_path) == ["best"]


def test_leftovers_of_a_killed_write_do_not_get_in(tmp_path):
    target = tmp_path / "best"
    (start_folder(target) / "old").write_text("half")
    (start_folder(target) / "new").write_text("whole")
    finish_folder(target)
    assert names(target) == ["new"]


def test_a_failed_save_leaves_the_earlier_model(tmp_path):
    model = Saveable(2, 2)
    save_model(tmp_path / "best", model, Processor())
    before = (tmp_path / "best" / "weights").read_text()
    nn.init.zeros_(model.weight)
    model.broken = True
    with pytest.raises(OSError, match="no space"):
        save_model(tmp_path / "best", model, Processor())
    assert (tmp_path / "best" / "weights").read_text() == before
    model.broken = False
    save_model(tmp_path / "best", model, Processor())
    assert (tmp_path / "best" / "weights").read_text() == "[0.0, 0.0, 0.0, 0.0]"
    assert names(tmp_path) == ["best"]


def test_a_failed_checkpoint_leaves_the_earlier_one(run, tmp_path):
    _, model, _, _, step = run
    step()
    model.broken = True
    with pytest.raises(OSError, match="no space"):
        step()
    assert find_checkpoint(tmp_path) == tmp_path / "last"
    assert step_of(tmp_path / "last") == 1


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(run, tmp_path, keep_last):
    for _ in range(4):
        run[-1](keep_last)
    assert names(tmp_path) == ["last", *(f"step-{step:08d}" for step in range(5 - keep_last, 4))]
    assert step_of(tmp_path / "last") == 4


def test_the_whole_state_comes_back(run, tmp_path):
    accelerator, model, optimizer, progress, step = run

    def state():
        moments = optimizer.state_dict()["state"][0]
        return [model.weight.detach().clone(), moments["exp_avg"].clone(), moments["step"].clone()]

    progress.best_value, progress.seconds = 0.25, 12.5
    step()
    step()
    expected = state()
    step()
    assert not any(torch.equal(now, before) for now, before in zip(state(), expected, strict=True))
    progress.best_value = 0.5
    load_checkpoint(accelerator, tmp_path / "step-00000002")
    assert all(torch.equal(now, before) for now, before in zip(state(), expected, strict=True))
    assert progress == Progress(step=2, best_value=0.25, seconds=12.5)


def test_random_numbers_go_on_where_they_were(run, tmp_path):
    accelerator, *_, step = run

    def draw():
        return random.random(), np.random.rand(), torch.rand(5).tolist()

    step()
    drawn = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(12345)
    load_checkpoint(accelerator, tmp_path / "last")
    assert draw() == drawn


def test_the_one_before_is_found_when_the_newest_is_missing(run, tmp_path):
    assert find_checkpoint(tmp_path) is None
    for _ in range(3):
        run[-1](3)
    (tmp_path / "last").rename(tmp_path / "last.partial")  # a kill between the two renames
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000002"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("training_state/model.safetensors", cut, "model.safetensors has .* bytes instead of"),
    ("training_state/optimizer.bin", cut, "optimizer.bin has .* bytes instead of"),
    ("training_state/optimizer.bin", os.remove, "optimizer.bin is missing"),
    ("training_state/optimizer.bin", flip, "optimizer.bin has other contents"),
    ("training_state/random_states_0.pkl", cut, "random_states_0.pkl has .* bytes"),
    ("training_state/random_states_0.pkl", os.remove, "random_states_0.pkl is missing"),
    ("training_state/custom_checkpoint_0.pkl", os.remove, "custom_checkpoint_0.pkl is missing"),
    ("weights", cut, "weights has .* bytes"),
    ("training_state/record.json", lambda path: path.write_text(path.read_text()[:50]), "record.json cannot be read"),
    ("training_state/record.json", lambda path: path.write_text("[]"), "record.json cannot be read"),
    ("training_state/record.json", os.remove, "record.json is missing"),
    ("", empty, "record.json is missing"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run, tmp_path, capsys, name, damage, words):
    accelerator, _, _, progress, step = run
    step()
    step()
    damage(tmp_path / "last" / name)
    folder = find_checkpoint(tmp_path)
    assert folder == tmp_path / "step-00000001"
    message = " ".join(capsys.readouterr().out.split())
    assert "last (" in message and "step-00000001 is the newest whole checkpoint" in message
    assert re.search(words, message)
    load_checkpoint(accelerator, folder)
    assert progress.step == 1
    assert names(tmp_path) == ["last.damaged", "step-00000001"]
    step()
    step()
    assert names(tmp_path) == ["last", "last.damaged", "step-00000002"]
    assert find_checkpoint(tmp_path) == tmp_path / "last"


def test_a_run_without_a_whole_checkpoint_says_what_is_wrong_with_each(run, tmp_path):
    for _ in range(3):
        run[-1](3)
    os.remove(tmp_path / "last" / "training_state" / "optimizer.bin")
    cut(tmp_path / "step-00000002" / "weights")
    empty(tmp_path / "step-00000001")
    with pytest.raises(
        ValueError, match="no whole checkpoint: last .*optimizer.*step-0*2 .*weights.*step-0*1 .*record"
    ):
        find_checkpoint(tmp_path)


def test_an_older_checkpoint_may_be_chosen_and_newer_whole_ones_stay(run, tmp_path):
    for _ in range(3):
        run[-1](3)
    load_checkpoint(run[0], tmp_path / "step-00000001")
    assert names(tmp_path) == ["last", "step-00000001", "step-00000002"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint and the contents of the files that its record lists."""
    folder = tmp_path_factory.mktemp("run") / "last"
    accelerator = Accelerator(cpu=True)
    model, _ = accelerator.prepare(Saveable(3, 3), torch.optim.AdamW(nn.Linear(3, 3).parameters()))
    save_checkpoint(accelerator, folder.parent, model, Processor(), Progress(), 1)
    files = json.loads((folder / "training_state" / "record.json").read_text())["files"]
    contents = {name: (folder / name).read_bytes() for name in files}
    assert len(contents) == 5  # weights, processor; weights, optimizer and random numbers of the training state
    return folder, {name: content for name, content in contents.items() if content}


@given(st.data())
def test_any_byte_that_changes_or_is_lost_is_noticed(stored, data):
    folder, contents = stored
    name = data.draw(st.sampled_from(sorted(contents)))
    content = contents[name]
    position, change = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 255))
    changed = bytes([content[position] ^ change]) + content[position + 1 :] if change else b""
    (folder / name).write_bytes(content[:position] + changed)
    try:
        with pytest.raises(ValueError, match=f"no whole checkpoint: last .{name} has"):
            find_checkpoint(folder.parent)
    finally:
        (folder / name).write_bytes(content)
    assert find_checkpoint(folder.parent) == folder


@contextmanager
def largest_file(size):
    """Let the system refuse to write beyond so many bytes of a file, as a full disk does in its own words."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def large_run(tmp_path):
    """A run whose weights take 40 kB, its optimizer twice as many."""
    accelerator = Accelerator(cpu=True)
    bare_model = Saveable(100, 100)
    model, optimizer = accelerator.prepare(bare_model, torch.optim.AdamW(bare_model.parameters()))
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    progress = Progress(step=1)
    return progress, lambda: save_checkpoint(accelerator, tmp_path / "run", model, Processor(), progress, 2)


@pytest.mark.parametrize("size", [100, 10_000, 60_000])  # nothing fits; not the weights; not the optimizer
def test_a_full_disk_is_one_error_and_leaves_the_last_checkpoint(large_run, tmp_path, size):
    progress, save = large_run
    save()
    progress.step = 2
    message = r"run/last' cannot be written: .+\. It needs 0\.2 MB beside what is there, and .* MB are free"
    with largest_file(size), pytest.raises(OSError, match=message):
        save()
    assert names(tmp_path / "run") == ["last"]
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "last"
    assert step_of(tmp_path / "run" / "last") == 1
    save()
    assert names(tmp_path / "run") == ["last", "step-00000001"]


def test_a_full_disk_is_called_so_and_the_missing_room_is_named(large_run, tmp_path, monkeypatch):
    _, save = large_run
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    # Weights twice (100 x 100 weights, 100 biases, 4 bytes each), two moments of each and their two counts.
    message = r"the disk is full. It needs 0\.2 MB beside what is there, and 0\.0 MB are free"
    with largest_file(60_000), pytest.raises(OSError, match=message):
        save()
    assert checkpoint._count_bytes({"a": [torch.zeros(3), {"b": torch.zeros(2, dtype=torch.float64)}], "c": 1}) == 28


def test_the_average_is_the_model_and_the_weights_in_training_a_variant(tmp_path):
    accelerator = Accelerator(cpu=True)
    average, in_training = (DrmmForObjectDetection(tiny_config()) for _ in range(2))
    accelerator.prepare(in_training)
    save_model(tmp_path / "best", average, DrmmImageProcessor(), in_training)
    save_checkpoint(accelerator, tmp_path, average, DrmmImageProcessor(), Progress(), 1, in_training)
    assert find_checkpoint(tmp_path) == tmp_path / "last"
    for folder in ("best", "last"):
        for expected, options in ((average, {}), (in_training, {"variant": "raw"})):
            read = DrmmForObjectDetection.from_pretrained(tmp_path / folder, **options).state_dict()
            assert all(torch.equal(tensor, read[name]) for name, tensor in expected.state_dict().items())
    weights = tmp_path / "last" / "training_state" / "model.safetensors"
    assert os.path.samefile(weights, tmp_path / "last" / "model.raw.safetensors")


def test_a_calibration_may_be_saved_and_nothing_else_changed(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, _ = accelerator.prepare(DrmmForObjectDetection(tiny_config()), torch.optim.AdamW([nn.Parameter()]))
    save_checkpoint(accelerator, tmp_path, model, DrmmImageProcessor(), Progress(), 1)
    config, settings = (tmp_path / "last" / name for name in ("config.json", "preprocessor_config.json"))
    write_text(settings, settings.read_text().replace("{", '{\n  "note": "mine",', 1))
    assert find_checkpoint(tmp_path) == tmp_path / "last"
    before = config.read_text()
    write_text(config, before.replace("{", '{\n  "note": "mine",', 1))
    with pytest.raises(ValueError, match="no whole checkpoint: last .config.json"):
        find_checkpoint(tmp_path)
    write_text(config, before)
    cut(tmp_path / "last" / "model.safetensors")
    with pytest.raises(ValueError, match="no whole checkpoint: last .model.safetensors has"):
        find_checkpoint(tmp_path)
