"""What the page shows is what the detector finds, and a Space runs without the package being installed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor


pytest.importorskip("gradio")

from drmm_hf.demo.app import Detector, make_app  # noqa: E402
from drmm_hf.demo.space import write_space  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "mine" / "best"
    DrmmForObjectDetection(tiny_config()).save_pretrained(folder)
    processor = DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, score_threshold=0.2)
    processor.save_pretrained(folder)
    (folder / "training_state").mkdir()
    (folder / "training_state" / "optimizer.bin").write_bytes(b"large")
    return folder


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))


def test_the_slider_hides_and_soft_sides_show(folder, picture):
    detector = Detector(str(folder), "cpu")
    result = detector.detect(picture)
    assert detector.threshold == 0.2 and (np.diff(result["scores"]) <= 0).all()
    rows = detector.table(result, 0.0)
    assert len(rows) == min(100, len(result["scores"])) and detector.table(result, 1.1) == []
    middle = rows[len(rows) // 2][1]
    assert all(score >= middle - 1e-3 for _, score, *_ in detector.table(result, middle))
    plain, soft = (np.asarray(detector.draw(picture, result, 0.0, soft)) for soft in (False, True))
    none = np.asarray(detector.draw(picture, result, 1.1, True))
    assert plain.shape == soft.shape == none.shape
    assert (plain != soft).any() and (plain != none).any()
    assert detector.density(picture, result).width > 1000


def test_the_page_has_a_panel_a_detector(folder):
    app = make_app([str(folder), str(folder)], "cpu")
    labels = [block.label for block in app.blocks.values() if getattr(block, "label", None)]
    assert labels.count("mine/best") == 2 and "Soft sides" in labels


def test_a_space_has_all_it_needs(folder, tmp_path):
    write_space([str(folder), "owner/name"], tmp_path / "space")
    space = tmp_path / "space"
    names = json.loads((space / "models.json").read_text())
    assert names == ["models/1_mine_best", "owner/name"]
    expected = {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert {path.name for path in (space / names[0]).iterdir()} == expected
    head = (space / "README.md").read_text()
    assert "sdk: gradio" in head and "\nmodels:\n  - owner/name\n---" in head
    needed = (space / "requirements.txt").read_text()
    assert "transformers" in needed and "gradio==" in needed and "pytest" not in needed
    with pytest.raises(FileExistsError, match="give a new folder"):
        write_space([str(folder)], space)
    (space / "models.json").write_text(json.dumps(names[:1]))
    program = (
        "import gradio\n"
        "gradio.Blocks.launch = lambda app, **options: print(len(app.blocks), list(options))\n"
        "import runpy; runpy.run_path('app.py', run_name='__main__')\n"
        "import drmm_hf; print(drmm_hf.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=space, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(str(space)) and "theme" in done.stdout
