"""What the documents say is run: the README's lines, the recipes, the links."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import tiny_config
from drmm_hf import DrmmConfig, DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.training.arguments import load_recipe


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))


def test_the_lines_of_inference_in_the_readme_run(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DrmmForObjectDetection(tiny_config()).save_pretrained("runs/quickstart/best")
    DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained("runs/quickstart/best")
    Image.new("RGB", (120, 80), "white").save("picture.jpg")
    scope = {}
    exec(code, scope)
    result = scope["result"]
    assert {"scores", "labels", "boxes", "box_scales"} <= result.keys()
    assert len(result["scores"]) == len(result["boxes"]) and (result["scores"] > 0.5).all()


def test_the_decoder_of_ones_own_learns():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_decoder.md").read_text(), re.DOTALL)
    scope = {}
    exec("\n".join(blocks), scope)
    assert scope["losses"][-1] < 0.5 * scope["losses"][0]
    assert (scope["scores"] > 0.5).all()
    boxes, best = scope["mixture"].boxes, scope["best"]
    expected = scope["targets"].boxes
    distance = (boxes[range(2), best][:, None] - expected).abs().amax(-1)
    distance[0, 1] = torch.inf  # padding
    assert (distance.min(-1).values < 4).all()

    # The criterion of one's own: D-RMM's terms as they are, and its own for every stage.
    names = {f"{name}.stage{stage}" for name in ("nll", "mcm", "l1") for stage in range(2)}
    outputs = scope["outputs"]
    assert scope["parts"].keys() == outputs.loss_dict.keys() == names
    assert 0 < scope["parts"]["l1.stage1"] < 0.5 < outputs.loss_dict["l1.stage1"]
    weights = {"nll": 1, "mcm": 0.5, "l1": 1}
    total = sum(weights[name.split(".")[0]] * value for name, value in outputs.loss_dict.items())
    torch.testing.assert_close(outputs.loss, total)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_builds_its_model(path):
    recipe = load_recipe(path)
    with torch.device("meta"):
        model = DrmmForObjectDetection(DrmmConfig(**recipe.model))
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    header = path.read_text().split("model:")[0]
    assert all(line.startswith("#") for line in header.strip().splitlines())
    assert all(f"# {word}: " in header for word in ("Expected", "Hardware", "Command"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path):
    text = path.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"(?:scripts|tests|docs|src)/[\w/.-]+\.(?:py|md|yaml)", text)
    missing = [link for link in links if not (path.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing
