from pathlib import Path

import pytest
import torch

from drmm_hf.training.arguments import load_recipe


@pytest.fixture
def tiny_recipe(tmp_path):
    """Return a function from overrides to the tiny recipe, whose output folder is `tmp_path / "run"`."""

    def load(**overrides):
        return load_recipe(Path(__file__).parent / "tiny.yaml", {"output_dir": str(tmp_path / "run"), **overrides})

    return load


@pytest.fixture(autouse=True)
def same_threads():
    """Give the threads back that a test changes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
