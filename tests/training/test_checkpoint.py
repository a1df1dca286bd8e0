import json

import pytest
import torch
from accelerate import Accelerator
from torch import nn

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
    step()
    drawn = torch.rand(5)
    load_checkpoint(accelerator, tmp_path / "last")
    assert torch.equal(torch.rand(5), drawn)


def test_the_one_before_is_found_when_the_newest_is_missing(run, tmp_path):
    assert find_checkpoint(tmp_path) is None
    for _ in range(3):
        run[-1](3)
    (tmp_path / "last").rename(tmp_path / "last.partial")  # a kill between the two renames
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000002"
