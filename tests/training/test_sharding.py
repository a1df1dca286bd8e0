"""FSDP2 on two gloo processes: the run of DDP, whole models in its checkpoints, exact resume; and what is refused."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from training.test_resume import TIMES, Server, use_accelerate_config

from drmm_hf import DrmmForObjectDetection
from drmm_hf.training import loop
from drmm_hf.training.loop import accumulate_gradients, train
from drmm_hf.training.sharding import check_sharding


# What `accelerate launch` sets for `fsdp_version: 2` and the state dict type that `accelerate config` proposes.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
WAYS = {
    "whole model": FSDP | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "layer by layer": FSDP | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},  # by `_no_split_modules`
}
# As in `test_resume`: 4 optimiser steps an epoch for one process, so 2 here, of 2 batches in each process.
OPTIONS = {"num_train_images": 16, "save_every_steps": 1, "evaluate_every": 2, "epochs": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("runs"))
    yield server
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture(scope="module")
def plain(server):
    assert server.train("plain", processes=2, **OPTIONS) == [0, 0], server.output()
    return lines(server.folder / "plain")


def lines(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def models(folder):
    files = [f"{name}/{file}" for name in ("last", "best") for file in ("model.safetensors", "model.raw.safetensors")]
    return {file: load_file(folder / file) for file in files}


@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_run_is_the_run_of_ddp_and_resumes_bit_by_bit(server, plain, way):
    options = {"processes": 2, "environment": WAYS[way], **OPTIONS}
    assert server.train(way, **options) == [0, 0], server.output()
    found = lines(server.folder / way)
    assert len(found) == len(plain) == 5
    for row, expected in zip(found, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-3)
    for file, weights in models(server.folder / "plain").items():
        for name, tensor in models(server.folder / way)[file].items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-4, msg=f"{file}: {name}")
    _, loading = DrmmForObjectDetection.from_pretrained(server.folder / way / "best", output_loading_info=True)
    assert not any(loading.values())

    killed = f"{way}, killed"
    codes = server.train(killed, inside="step-00000001", at_event=1, **options)  # in its second save
    assert codes[0] == -signal.SIGKILL, server.output()
    assert server.train(killed, **options) == [0, 0], server.output()
    assert "at step 1" in server.output()
    assert lines(server.folder / killed) == found
    for file, weights in models(server.folder / way).items():
        for name, tensor in models(server.folder / killed)[file].items():
            assert torch.equal(tensor, weights[name]), f"{file}: {name}"
