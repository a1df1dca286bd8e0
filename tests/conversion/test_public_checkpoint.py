import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from drmm_hf.conversion.public_checkpoint import read_checkpoint, stated_settings


WEIGHTS = OrderedDict({"backbone.conv1.weight": torch.ones(2), "neck.bias": torch.zeros(3)})


def written(content, folder, name="model.pth"):
    path = folder / name
    if name.endswith(".safetensors"):
        save_file(dict(content), path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"state_dict": WEIGHTS, "meta": {"epoch": 36}}, "model.pth"),
        ({"model": WEIGHTS, "iteration": 3, "optimizer": {"state": {0: torch.ones(1)}}}, "model.pth"),
        (WEIGHTS, "model.pth"),
        ({f"module.{name}": value for name, value in WEIGHTS.items()}, "model.pth"),
        (WEIGHTS, "model.safetensors"),
    ],
    ids=["mmdetection", "detectron2", "bare", "wrapped", "safetensors"],
)
def test_weights_are_found(content, name, tmp_path):
    found = read_checkpoint(written(content, tmp_path, name))
    assert found.weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in WEIGHTS.items())


def test_entries_that_are_no_weights_are_dropped_with_a_reason(tmp_path):
    content = {
        "state_dict": WEIGHTS,
        "meta": {},
        "optimizer": [torch.ones(1)],
        "iteration": 7,
        "ema_state_dict": {"module.neck.bias": torch.ones(3), "steps": torch.tensor(5)},
    }
    dropped = read_checkpoint(written(content, tmp_path)).dropped
    assert dropped["optimizer"] == "state of the training run" and dropped["iteration"] == "holds no tensor"
    assert "not averaged" in dropped["ema_state_dict"] and len(dropped) == 3
    content["teacher"] = {"neck": [torch.ones(1)]}
    with pytest.raises(ValueError, match="nothing explains the entry 'teacher', which holds tensors"):
        read_checkpoint(written(content, tmp_path))


def test_plain_names_are_the_moving_average(tmp_path):
    """mmcv's hook swaps the averages into the plain names before the file is saved."""
    raw = {f"ema_{name.replace('.', '_')}": value + 1 for name, value in WEIGHTS.items()}
    found = read_checkpoint(written({"state_dict": {**WEIGHTS, **raw}}, tmp_path))
    assert all(torch.equal(found.weights[name], value) for name, value in WEIGHTS.items())
    assert found.weights.keys() == WEIGHTS.keys() and found.dropped.keys() == raw.keys()
    stray = {"ema_other_bias": torch.ones(1)}
    assert read_checkpoint(written({"state_dict": {**WEIGHTS, **stray}}, tmp_path)).weights.keys() >= stray.keys()


@pytest.mark.parametrize(
    ("meta", "names"),
    [
        ({"CLASSES": ("cat", "dog")}, ["cat", "dog"]),
        ({"dataset_meta": {"classes": ["cat", "dog"]}}, ["cat", "dog"]),
        ({"dataset_meta": {"CLASSES": ("cat",)}}, ["cat"]),
        ({"CLASSES": "cat"}, ["cat"]),
        ({"CLASSES": [1, 2]}, ["1", "2"]),
        ({"CLASSES": None, "epoch": 3}, None),
        ({"CLASSES": 80}, None),
    ],
)
def test_class_names_of_every_version(meta, names, tmp_path):
    assert read_checkpoint(written({"state_dict": WEIGHTS, "meta": meta}, tmp_path)).class_names == names


def test_settings_are_read_from_the_training_configuration(tmp_path):
    text = """
model = dict(backbone=dict(style='pytorch', depths=[2, 2], num_heads=[3, 6]),
             head=[dict(num_heads=4, top_k_ratio=None, loss=dict(weight=2.0)) for _ in range(6)],
             other=dict(weight=3.0, fn=open('x')))
"""
    assert stated_settings(text) == {
        "style": ["pytorch"],
        "depths": [[2, 2]],
        "num_heads": [[3, 6], 4],
        "top_k_ratio": [None],
        "weight": [3.0, 2.0],
    }
    for key in ("config", "cfg"):
        path = written({"state_dict": WEIGHTS, "meta": {key: "head = dict(num_heads=4)"}}, tmp_path)
        assert read_checkpoint(path).settings == {"num_heads": [4]}
    assert stated_settings("not python {") == {}


class Payload:
    """Make a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_runs_only_when_told(tmp_path):
    mark = tmp_path / "mark"
    path = written({"state_dict": WEIGHTS, "meta": {"hook": Payload(str(mark))}}, tmp_path)
    with pytest.raises(ValueError, match=r"model.pth holds more than tensors.*mkdir.*--trust-pickle"):
        read_checkpoint(path)
    assert not mark.exists()
    assert read_checkpoint(path, trust_pickle=True).weights.keys() == WEIGHTS.keys()
    assert mark.exists()


CYCLE = []
CYCLE.append(CYCLE)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1], "holds a list; it must hold a state dict"),
        (torch.ones(3), "holds a Tensor; it must hold a state dict"),
        ({}, "holds no tensor, nothing at all"),
        ({"epoch": 3, "meta": {"lr": [0.1]}}, "holds no tensor, only 'epoch', 'meta'"),
        ({"state_dict": {}, "meta": CYCLE}, "holds no tensor, only 'state_dict', 'meta'"),
        ({**WEIGHTS, "epoch": 3}, "'epoch' is a int; a state dict holds tensors by name"),
        ({0: torch.ones(1)}, "0 is a Tensor; a state dict holds tensors by name"),
        ({"weight": torch.eye(2).to_sparse()}, "'weight' is sparse"),
    ],
    ids=["list", "tensor", "nothing", "no tensor", "cycle", "a number", "no names", "sparse"],
)
def test_a_file_without_a_state_dict_is_named(content, words, tmp_path):
    with pytest.raises(ValueError, match=rf"model.pth:? {words}"):
        read_checkpoint(written(content, tmp_path))
