"""What is assembled, what is refused, and that nothing of it tells where it was made."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from drmm_hf import DrmmConfig, DrmmForObjectDetection
from drmm_hf.conversion.model_card import model_card
from drmm_hf.hub.card import is_untouched
from drmm_hf.hub.check import check_folder
from drmm_hf.hub.publication import prepare
from drmm_hf.training.arguments import load_yaml
from trained_run import HOST, NAMES, make_evaluation, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("somewhere") / "cells"
    make_run(run)
    make_evaluation(run / "test", run / "best")
    return run


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    return prepare(run / "best", "me/cells", tmp_path_factory.mktemp("out") / "cells", license="mit")


@pytest.fixture
def folder(published, tmp_path):
    """Return a copy to spoil."""
    return shutil.copytree(published.folder, tmp_path / "copy")


def test_the_folder_holds_what_is_needed_and_no_more(published, run):
    code = {name for name in published.files if name.endswith(".py")}
    assert {"modeling_drmm.py", "image_processing_drmm.py", "configuration_drmm.py"} <= code
    assert published.files.keys() - code == {
        *("README.md", "config.json", "preprocessor_config.json", "model.safetensors", "requirements.txt"),
        *(f"training/{name}" for name in ("recipe.yaml", "manifest.json", "summary.json")),
        *(f"results/cells_test/{name}" for name in ("metrics.json", "evaluation.json")),
        *(f"results/cells_test/{name}" for name in ("reliability.png", "detections.jpg")),
    }
    assert len(published.checks) == 5 and len(published.notes) == 1
    assert "detections.jpg shows pictures of cells" in published.notes[0]
    assert is_untouched((published.folder / "README.md").read_text())
    assert not list(published.folder.parent.glob("*.partial"))


def test_no_place_no_user_and_no_host_is_in_any_file(published, run):
    for name in published.files:
        content = (published.folder / name).read_bytes()
        for private in ("jane", HOST, "server7", str(run.parent), "optimizer.bin"):
            assert private.encode() not in content, (name, private)


def test_the_recipe_is_the_run_s_own(published, run):
    recipe = load_yaml((published.folder / "training" / "recipe.yaml").read_text(), "recipe.yaml")
    assert recipe["training"]["mixed_precision"] == "no"  # which yaml 1.1 reads as false


def test_names_of_classes_stay_whatever_they_look_like(published):
    config = json.loads((published.folder / "config.json").read_text())
    metrics = json.loads((published.folder / "results/cells_test/metrics.json").read_text())
    assert [*config["id2label"].values()] == [*metrics["AP_per_class"]] == [*NAMES.values()]


def test_links_and_pictures_of_the_card_are_in_the_folder(published):
    text = (published.folder / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)", text) for link in link if link]
    assert len(links) >= 5 and all((published.folder / link).is_file() for link in links)


def test_the_path_of_a_backbone_s_origin_is_a_name(run, tmp_path):
    copy = shutil.copytree(run / "best", tmp_path / "best")
    config = json.loads((copy / "config.json").read_text())
    config["backbone_config"]["_name_or_path"] = "/home/jane/resnet"
    (copy / "config.json").write_text(json.dumps(config))
    folder = prepare(copy, "me/cells", tmp_path / "out").folder
    assert json.loads((folder / "config.json").read_text())["backbone_config"]["_name_or_path"] == "resnet"


def test_an_edited_card_is_kept_and_a_second_one_is_asked_about(run, tmp_path, monkeypatch):
    monkeypatch.setattr("drmm_hf.hub.check._check_remote_code", lambda *_: 0.0)  # which takes a second each time
    best, output = shutil.copytree(run / "best", tmp_path / "best"), tmp_path / "out"
    card = prepare(best, "me/cells", output).folder / "README.md"
    first = card.read_text()
    assert "no result file" in " ".join(prepare(best, "me/cells", output).notes) and card.read_text() == first
    mine = first.replace("# cells", "# My cells")
    card.write_text(mine)
    notes = prepare(best, "me/cells", output).notes
    assert card.read_text() == mine and any("was edited and is the card" in note for note in notes)
    (best / "README.md").write_text(mine)
    prepare(best, "me/cells", output)
    (best / "README.md").write_text("# another\n")
    with pytest.raises(ValueError, match="were edited; delete"):
        prepare(best, "me/cells", output)
    assert card.read_text() == mine
    card.unlink()
    notes = prepare(best, "me/cells", output).notes
    assert card.read_text() == "# another\n" and any("pipeline_tag" in note for note in notes)


def test_the_card_of_a_conversion_gives_way_unless_it_was_edited(run, tmp_path, monkeypatch):
    monkeypatch.setattr("drmm_hf.hub.check._check_remote_code", lambda *_: 0.0)
    best = shutil.copytree(run / "best", tmp_path / "best")
    about = {"source": "r50.pth", "sha256": "a1b2", "family": "mmdetection"}
    (best / "conversion.json").write_text(json.dumps(about))
    card = model_card(DrmmConfig.from_pretrained(best), about["source"], about["family"], about["sha256"])
    (best / "README.md").write_text(card)
    published = prepare(best, "me/cells", tmp_path / "out")
    text = (published.folder / "README.md").read_text()
    assert is_untouched(text) and "`r50.pth` (sha256 `a1b2`)" in text and "conversion.json" in published.files
    (best / "README.md").write_text(card + "Mine.\n")
    assert (prepare(best, "me/cells", tmp_path / "out").folder / "README.md").read_text() == card + "Mine.\n"


def test_a_kept_card_with_older_figures_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr("drmm_hf.hub.check._check_remote_code", lambda *_: 0.0)
    output = tmp_path / "out"
    card = prepare(run / "best", "me/cells", output).folder / "README.md"
    text = re.sub(r"value: 0\.\d+", "value: 0.9876", card.read_text(), count=1)
    card.write_text(text)
    assert any("model-index" in note for note in prepare(run / "best", "me/cells", output).notes)
    assert card.read_text() == text


@pytest.mark.parametrize("name", ["notes.txt", "results/mine.csv", "deep/er/model.safetensors"])
def test_a_folder_with_other_files_is_left_alone(run, published, folder, name):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("mine")
    with pytest.raises(FileExistsError, match="which drmm push has not written"):
        prepare(run / "best", "me/cells", folder)
    assert (folder / name).read_text() == "mine"


def test_a_model_is_not_written_over(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for output in (run / "best", run):
        with pytest.raises(ValueError, match="holds the model"):
            prepare(run / "best", "me/cells", output)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_failed_call_leaves_the_earlier_folder(run, published, monkeypatch):
    before = published.files
    monkeypatch.setattr("drmm_hf.hub.publication.check_folder", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(run / "best", "me/other", published.folder)
    assert published.files == before and not list(published.folder.parent.glob("*.partial"))


def test_a_model_without_weights_is_refused(run, tmp_path):
    best = shutil.copytree(run / "best", tmp_path / "best")
    (best / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights to publish"):
        prepare(best, "me/cells", tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    best = shutil.copytree(run / "best", tmp_path / "best")
    weights = load_file(best / "model.safetensors")
    name = next(name for name in weights if weights[name].is_floating_point())
    weights[name].view(-1)[0] = torch.nan
    save_file(weights, best / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"1 tensors are not finite, such as {name}"):
        prepare(best, "me/cells", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_parts_of_split_weights_are_all_checked(run, published, folder):
    DrmmForObjectDetection.from_pretrained(run / "best").save_pretrained(folder, max_shard_size="30KB")
    from drmm_hf.modeling.remote_code import add_code

    add_code(folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert check_folder(folder)[0][0] == published.checks[0]
    parts[0].unlink()
    with pytest.raises(ValueError, match="tensors are missing"):
        check_folder(folder)


def spoil_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["stranger"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def spoil_shape(folder):
    weights = load_file(folder / "model.safetensors")
    name = min(name for name in weights if weights[name].ndim == 2)
    weights[name] = weights[name][:1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def replace_text(name, old, new):
    def spoil(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weights, "1 tensors are not of the model, such as stranger"),
        (spoil_shape, "1 tensors are of another shape"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 9), "cannot be read"),
        (replace_text("config.json", '"num_queries": 12', '"num_queries": -1'), "settings that cannot be read"),
        *(
            (lambda folder, name=name: (folder / name).write_text("[]"), f"cannot be read: {name} is no json object")
            for name in ("config.json", "preprocessor_config.json")
        ),
        (replace_text("config.json", "modeling_drmm.DrmmModel", "elsewhere.DrmmModel"), "auto_map"),
        (
            replace_text("preprocessor_config.json", '"do_pad": true', '"do_pad": true, "score_threshold": [0.5]'),
            "1 ent",
        ),
        (lambda folder: (folder / "boxes.py").unlink(), "imports .boxes, which is not beside it"),
        (replace_text("boxes.py", "import torch\n", "import torch\nimport drmm_hf\n"), "imports drmm_hf"),
        (
            replace_text("boxes.py", "import torch\n", "import torch\nimport secrets_of_mine\n"),
            "imports secrets_of_mine",
        ),
        (replace_text("requirements.txt", ">=", "=="), "requirements.txt"),
        (
            replace_text("mixture.py", "import torch\n", "import torch\nfrom math import no_such\n"),
            "cannot be imported",
        ),
        (replace_text("modeling_drmm.py", "log_odds(", "1 + log_odds("), "gives other outputs"),
        (replace_text("README.md", "model-index:\n", "model-index:\n- 3\n"), "header of README.md"),
        (lambda folder: (folder / "training" / "optimizer.bin").write_bytes(b"1"), "optimizer.bin"),
        (lambda folder: (folder / "link.json").symlink_to("/etc/hostname"), "link.json"),
        (replace_text("training/recipe.yaml", "cells", "/home/jane/cells"), "holds '/home/jane'"),
    ],
)
def test_a_spoilt_folder_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_folder(folder, private=["/home/jane"])


def test_checking_leaves_no_trace(folder):
    import sys

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    check_folder(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in sys.modules if name.startswith("_drmm_bundle")]
