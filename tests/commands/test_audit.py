"""`drmm audit`, from the command line to its files."""

import json
import shutil

import pytest
import torch
from PIL import Image

from conftest import tiny_config
from drmm_cli import main
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.evaluation.planted_errors import plant_errors


def save_model(folder, **overrides):
    torch.manual_seed(0)
    config = tiny_config(id2label={0: "round", 1: "square"}, category_ids=[3, 8], **overrides)
    DrmmForObjectDetection(config).save_pretrained(folder)
    DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    return folder


def images_of(folder):
    return json.loads((folder / "annotations" / "instances_val.json").read_text())["images"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("mixture"))


def test_entries_crops_and_a_page_are_written(model_folder, coco_folder, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["audit", str(model_folder), str(coco_folder), "--split", "val", "--output", str(output)]
    assert main([*command, "--worst", "1"]) == 0
    result = json.loads((output / "audit.json").read_text())
    assert {entry["annotation_id"] for entry in result["annotations"]} == {1, 2}
    plausibilities = [entry["plausibility"] for entry in result["annotations"]]
    assert plausibilities == sorted(plausibilities)
    seen = [entry["suggestion"] for entry in result["annotations"] if entry["suggestion"] is not None]
    assert {suggestion["category_id"] for suggestion in seen} <= {3, 8}
    files = {record["id"]: record["file_name"] for record in images_of(coco_folder)}
    for entry in (*result["annotations"], *result["missing"]):
        assert entry["file_name"] == files[entry["image_id"]]
    scores = [entry["score"] for entry in result["missing"]]
    assert scores == sorted(scores, reverse=True) and scores
    page = (output / "audit.html").read_text()
    assert page.count("<figure>") == 2  # the worst of each kind
    worst = result["annotations"][0]
    assert f"#{worst['annotation_id']}: {worst['reason']}" in page
    assert Image.open(output / "annotations.png").height > 250 and Image.open(output / "missing.png").height > 250
    printed = capsys.readouterr().out
    assert "3 images; 2 annotations" in printed and "0 crowds left out" in printed
    assert f"{result['missing'][0]['score']:.2f}" in printed
    for term in ("plausibility", "box", "class", "nothing there"):  # said once, above the crops
        assert f"<dt>{term}</dt><dd>" in page[: page.index("<figure>")]
    # Random weights know nothing.
    weak = [entry["name"] for entry in result["classes"] if not entry["known"]]
    assert weak and result["classes"][0]["AP"] < 0.2
    for text in (printed, page):
        assert "warning: the model hardly knows " in text and all(f"{name} (AP " in text for name in weak)


def test_what_lies_far_away_is_neither_said_nor_drawn(coco_folder, tmp_path):
    from drmm_hf.commands.audit import draw_sheets, summary, warnings
    from drmm_hf.evaluation.report import load_split

    dataset, annotations = load_split(str(coco_folder), "val")
    record = annotations["annotations"][0]
    entry = {"annotation_id": record["id"], "file_name": "one.png", "plausibility": 0.0, "reason": "nothing there"}
    entry |= {key: record[key] for key in ("image_id", "category_id", "bbox")} | {"suggestion": None}
    result = {"annotations": [entry], "missing": [], "classes": [], "num_images": 1, "num_crowds": 0}
    assert "model: nothing that overlaps it" in summary(result, annotations)
    assert warnings(result) == []
    draw_sheets(result, dataset, annotations, tmp_path, 1)
    colours = {
        colour for _, colour in Image.open(tmp_path / "annotations.png").crop((10, 45, 250, 275)).getcolors(1 << 24)
    }
    assert (230, 159, 0) in colours and (86, 180, 233) not in colours


def test_crowds_are_left_out_and_names_are_text(model_folder, coco_folder, tmp_path, capsys):
    folder, output = tmp_path / "coco", tmp_path / "out"
    shutil.copytree(coco_folder, folder)
    path = folder / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["iscrowd"] = 1
    name = "<b>&amp;.png"
    (folder / "val" / content["images"][2]["file_name"]).rename(folder / "val" / name)
    content["images"][2]["file_name"] = name
    path.write_text(json.dumps(content))
    assert main(["audit", str(model_folder), str(folder), "--split", "val", "--output", str(output)]) == 0
    assert json.loads((output / "audit.json").read_text())["num_crowds"] == 1
    assert "1 crowds left out" in capsys.readouterr().out
    page = (output / "audit.html").read_text()
    assert name not in page and "&lt;b&gt;&amp;amp;.png" in page


def test_an_audit_is_measured_against_what_was_planted(model_folder, coco_folder, tmp_path, capsys):
    folder, output = tmp_path / "coco", tmp_path / "out"
    shutil.copytree(coco_folder, folder)
    path = folder / "annotations" / "instances_val.json"
    content, planted = plant_errors(json.loads(path.read_text()), share=1, seed=0)
    path.write_text(json.dumps(content))
    record = tmp_path / "planted_errors.json"
    record.write_text(json.dumps(planted))
    command = ["audit", str(model_folder), str(folder), "--split", "val", "--output", str(output)]
    assert main([*command, "--planted", str(record)]) == 0
    scored = json.loads((output / "planted.json").read_text())
    assert list(scored) == ["density", "confidence"]
    for one in scored.values():  # every annotation is spoilt: any order finds nothing else
        assert one["annotations"]["average_precision"] == pytest.approx(1) and one["removed"] is None
    assert Image.open(output / "planted.png").width > 500
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["annotations", "2", "100.0", "100.0", "100.0", "100.0"] in lines


def test_a_model_without_a_density_is_refused(coco_folder, tmp_path, capsys):
    model_folder = save_model(tmp_path / "box", head_type="box", criterion="focal_l1_giou")
    assert main(["audit", str(model_folder), str(coco_folder), "--split", "val", "--output", str(tmp_path)]) == 2
    assert "head_type 'box', which predicts boxes and scores but no density" in capsys.readouterr().err


ENTRY = {"kind": "moved", "annotation_id": 1, "image_id": 10, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 4.0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "are no json"),
        ("[]", "are an empty list; the rule is a list of errors with kind"),
        ('{"a": 1}', "are a dict; the rule is"),
        (json.dumps([ENTRY, {"image_id": 10}]), "hold {'image_id': 10}; the rule is"),
        (json.dumps([ENTRY | {"kind": "lost"}]), "'kind': 'lost'"),
        (json.dumps([ENTRY | {"image_id": 7}]), "are of other pictures: no picture has the id 7"),
    ],
)
def test_what_is_no_record_of_planted_errors_is_refused(model_folder, coco_folder, tmp_path, capsys, content, message):
    record = tmp_path / "planted.json"
    record.write_text(content)
    command = ["audit", str(model_folder), str(coco_folder), "--split", "val", "--output", str(tmp_path / "out")]
    assert main([*command, "--planted", str(record)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_negative_number_of_crops_is_refused(coco_folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["audit", str(tmp_path), str(coco_folder), "--worst", "-3"])
    assert "--worst: '-3' is given; the rule is a whole number of at least 0" in capsys.readouterr().err


def test_a_saved_calibration_is_not_used(model_folder, coco_folder, tmp_path, capsys):
    """A map in steps would tie the ranks, and say something else than the suggestions."""
    calibrated = tmp_path / "model"
    shutil.copytree(model_folder, calibrated)
    processor = DrmmImageProcessor.from_pretrained(calibrated)
    processor.calibration = {"scores": {"method": "temperature", "temperature": 3.0}}
    processor.save_pretrained(calibrated)
    for folder in (model_folder, calibrated):
        command = ["audit", str(folder), str(coco_folder), "--split", "val", "--output", str(tmp_path / folder.name)]
        assert main(command) == 0
    assert "the calibration that is saved with the model is not used" in capsys.readouterr().out
    plain, other = (tmp_path / folder.name / "audit.json" for folder in (model_folder, calibrated))
    assert plain.read_text() == other.read_text()


def test_data_and_model_may_stand_in_either_order(model_folder, coco_folder, tmp_path, capsys):
    for places in ((model_folder, coco_folder), (coco_folder, model_folder)):
        words = ["audit", *map(str, places), "--split", "val", "--output", str(tmp_path / places[0].name)]
        assert main(words) == 0
    one, other = (tmp_path / folder.name / "audit.json" for folder in (model_folder, coco_folder))
    assert one.read_text() == other.read_text()
    assert main(["audit", str(coco_folder), str(coco_folder), "--output", str(tmp_path / "out")]) == 2
    assert f"model {str(coco_folder)!r} holds no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
