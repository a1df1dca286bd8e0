"""Plain torchrun without a GPU: its processes train together, where Accelerate by itself would let each run alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from drmm_hf.training.checkpoint import save_model


TINY = Path(__file__).with_name("tiny.yaml")


def test_two_processes_of_torchrun_are_one_run(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "drmm_hf"]
    command += ["train", str(TINY), "--output", str(tmp_path / "run"), "--max-steps", "1", "--epochs", "null"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = json.loads((tmp_path / "run" / "manifest.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (record["processes"], summary["images"]) == (2, 8)  # 2 pictures, 2 accumulation steps, 2 processes
    assert done.stdout.count("best checkpoint") == 1
    for name in ("best", "last"):
        assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "run" / name).iterdir()}


class Silent(nn.Module):
    """A model or processor that writes nothing, as transformers' in a process that takes itself for a second one."""

    def save_pretrained(self, folder):
        """Write nothing."""


def test_a_checkpoint_without_a_model_is_an_error(tmp_path):
    with pytest.raises(OSError, match="has got no model"):
        save_model(tmp_path / "best", Silent(), Silent())
    assert not (tmp_path / "best").exists()
