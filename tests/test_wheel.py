"""The wheel holds all it needs: with the repository out of sight, what it installed imports, predicts and helps."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor


ROOT = Path(__file__).parents[1]
SOURCES = ["src", "pyproject.toml", "README.md", "LICENSE"]
# All modules that are ours must be the installed ones, and the data files that are read by path must be there.
IMPORT = """
import sys
from pathlib import Path
from drmm_hf.evaluation.paper_tables import paper_table
import drmm_cli, drmm_onnx
from drmm_hf import commands
from importlib import import_module
from pkgutil import walk_packages
import drmm_hf

for module in walk_packages(drmm_hf.__path__, "drmm_hf."):
    if module.name not in ("drmm_hf.__main__", "drmm_hf.demo.app"):  # which runs, and which needs gradio
        import_module(module.name)
assert paper_table(1) and (Path(drmm_hf.__file__).parent / "py.typed").is_file()
places = {Path(m.__file__).resolve() for n, m in list(sys.modules.items()) if n.startswith("drmm_") and m.__file__}
assert len(places) > 50 and all(Path(sys.argv[1]).resolve() in place.parents for place in places), places
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build from a copy, so that nothing is left in the repository, and install where nothing else is."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "copy").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "copy" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "copy"], check=True)
    (wheel,) = folder.glob("drmm_hf-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(installed, folder, *command):
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_every_module_imports_and_data_files_are_there(installed, tmp_path):
    run(installed, tmp_path, "-c", IMPORT, installed)


def test_the_command_helps_and_predicts(installed, tmp_path):
    drmm = installed / "bin" / "drmm"
    assert "predict" in run(installed, tmp_path, drmm, "--help")
    DrmmForObjectDetection(tiny_config()).save_pretrained(tmp_path / "model")
    DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / "model")
    Image.fromarray(np.full((50, 70, 3), 127, dtype=np.uint8)).save(tmp_path / "picture.png")
    shown = run(installed, tmp_path, drmm, "predict", "model", "picture.png", "--json", "--threshold", "0")
    assert '"score"' in shown or '"scores"' in shown
