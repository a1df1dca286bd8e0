"""`drmm evaluate`, from the command line to its files."""

import errno
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drmm_cli import main
from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation.coco_metrics import METRIC_NAMES, coco_metrics
from drmm_hf.evaluation.deduplication import deduplicate
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.tables import comparison_table, metrics_table


def test_figures_pictures_and_a_table_in_per_cent(model_folder, coco_folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["evaluate", str(model_folder), str(coco_folder), "--split", "val", "--output", str(output)]) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    entries = json.loads((output / "detections.json").read_text())
    assert set(METRIC_NAMES) | {"ECE", "ECE_0.1", "reliability", "AP_per_class"} < set(metrics)
    assert metrics["num_images"] == 3 and metrics["num_detections"] == len(entries) > 0
    assert {entry["category_id"] for entry in entries} <= {3, 8}
    again = coco_metrics(coco_folder / "annotations" / "instances_val.json", entries)
    assert {name: metrics[name] for name in METRIC_NAMES} == {name: again[name] for name in METRIC_NAMES}
    assert ("query" in entries[0]) == ("drmm" in model_folder.name)
    assert Image.open(output / "detections.jpg").width > 1000
    assert Image.open(output / "reliability.png").width > 500
    printed = capsys.readouterr().out
    assert "square" in printed and f"{100 * metrics['ECE']:.2f}" in printed and "3 images, 2 objects" in printed


def test_the_folder_of_a_training_run_keeps_its_own_figures(model_folder, coco_folder, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("training: {epochs: 1}")
    assert main(["evaluate", str(model_folder), str(coco_folder), "--output", str(tmp_path)]) == 2
    assert f"such as '{tmp_path / 'val'}'" in capsys.readouterr().err and not (tmp_path / "metrics.json").exists()
    (tmp_path / "found.json").write_text("[]")
    words = ["evaluate", str(coco_folder), "--detections", str(tmp_path / "found.json"), "--output", str(tmp_path)]
    assert main(words) == 2 and not (tmp_path / "metrics.json").exists()


def test_batch_size_changes_no_figure(model_folder, coco_folder, tmp_path):
    written = []
    for batch_size in ("1", "3"):
        output = tmp_path / batch_size
        arguments = [str(model_folder), str(coco_folder), "--output", str(output), "--batch-size", batch_size]
        assert main(["evaluate", *arguments, "--device", "cpu"]) == 0
        written.append(json.loads((output / "metrics.json").read_text()))
    assert written[0]["ECE"] == pytest.approx(written[1]["ECE"], abs=1e-5)
    assert written[0]["AP"] == pytest.approx(written[1]["AP"], abs=1e-5)


def test_weights_may_be_of_another_type(drmm_folder, coco_folder, tmp_path):
    figures = {}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        assert main(["evaluate", str(drmm_folder), str(coco_folder), "--dtype", dtype, "--output", str(output)]) == 0
        assert json.loads((output / "evaluation.json").read_text())["dtype"] == dtype
        figures[dtype] = json.loads((output / "detections.json").read_text())
    scores = {dtype: np.array([entry["score"] for entry in entries]) for dtype, entries in figures.items()}
    assert 0 < np.abs(scores["float32"] - scores["bfloat16"]).max() < 0.05


@pytest.mark.parametrize("form", ["json as data", "options"])
def test_a_json_and_an_image_folder_from_two_places(form, model_folder, coco_folder, tmp_path):
    annotations, images = tmp_path / "a" / "truth.json", tmp_path / "b"
    annotations.parent.mkdir()
    shutil.copy(coco_folder / "annotations" / "instances_val.json", annotations)
    shutil.copytree(coco_folder / "val", images)
    data = [str(annotations)] if form == "json as data" else [str(tmp_path), "--annotations", str(annotations)]
    output = tmp_path / "out"
    arguments = [str(model_folder), *data, "--images", str(images), "--top-k", "2", "--output", str(output)]
    assert main(["evaluate", *arguments]) == 0
    assert json.loads((output / "metrics.json").read_text())["num_detections"] <= 6


def test_duplicates_are_removed_when_asked_and_the_figures_say_so(model_folder, coco_folder, tmp_path, capsys):
    label_map = LabelMap((3, 8), ("round", "square"))
    found, kept, won = tmp_path / "found", tmp_path / "kept", tmp_path / "won"
    for output, options in ((found, []), (kept, ["--nms", "0.1"]), (won, ["--wta", "0.1"])):
        assert main(["evaluate", str(model_folder), str(coco_folder), "--output", str(output), *options]) == 0
    before = Detections.load(found / "detections.json", label_map)
    assert json.loads((found / "metrics.json").read_text())["deduplication"] is None
    for output, method in ((kept, "nms"), (won, "wta")):
        after, capped = deduplicate(before, method, 0.1)
        removed = before.num_boxes - after.num_boxes
        applied = {"method": method, "iou_threshold": 0.1, "num_removed": removed, "num_capped": capped}
        assert removed > 0 and json.loads((output / "metrics.json").read_text())["deduplication"] == applied
        assert json.loads((output / "detections.json").read_text()) == after.to_coco(label_map)
    assert f"{removed} detections were removed by WTA at IoU 0.1" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        main(["evaluate", str(model_folder), str(coco_folder), "--nms", "0.5", "--wta", "0.5"])
    assert "--wta: not allowed with argument --nms" in capsys.readouterr().err
    assert main(["evaluate", str(model_folder), str(coco_folder), "--nms", "1.5"]) == 2
    assert "nms is 1.5; the rule is an IoU in [0, 1]" in capsys.readouterr().err


def test_a_sweep_is_written_drawn_and_printed(coco_folder, tmp_path, capsys):
    """One object found three times, at IoU 0.64 and 1."""
    boxes = [[5.0, 8.0, 30.0, 25.0], [5.0, 8.0, 30.0, 16.0], [5.0, 8.0, 30.0, 25.0]]
    entries = [
        {"image_id": 10, "category_id": 3, "bbox": box, "score": score}
        for box, score in zip(boxes, (0.75, 0.5, 0.375), strict=True)
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(entries))
    output = tmp_path / "out"
    command = ["evaluate", str(coco_folder), "--detections", str(results), "--sweep", "--output", str(output)]
    assert main(command) == 0
    swept = json.loads((output / "duplicates.json").read_text())
    removed = {entry["iou_threshold"]: entry["num_removed"] for entry in swept["nms"]}
    assert removed == {0.5: 2, 0.6: 2, 0.7: 1, 0.8: 1, 0.9: 1, 1.0: 0}
    assert swept["none"]["duplicate_rate"] == pytest.approx(2 / 3)
    assert [entry["num_capped"] for entry in swept["wta"]] == [1, 1, 1, 1, 1, 0]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["WTA", "0.50", "50.00", "50.00", "0.00", "0.00", "0.00", "2", "1"] in lines
    for name in ("duplicates.png", "duplicates_reliability.png", "duplicates_boxes.png"):
        assert Image.open(output / name).width > 1000
        assert name in lines[-1] or f"{name}," in lines[-1]


def test_thresholds_are_measured_drawn_and_printed(coco_folder, tmp_path, capsys):
    entries = [
        {"image_id": 10, "category_id": 3, "bbox": [5.0, 8.0, 30.0, 25.0], "score": 0.75},
        {"image_id": 20, "category_id": 8, "bbox": [50.0, 60.0, 5.0, 5.0], "score": 0.5},
    ]
    results, output = tmp_path / "results.json", tmp_path / "out"
    results.write_text(json.dumps(entries))
    command = ["evaluate", str(coco_folder), "--detections", str(results), "--thresholds", "--output", str(output)]
    assert main(command) == 0
    content = json.loads((output / "thresholds.json").read_text())
    assert content["all"]["best_threshold"] == 0.75 and content["all"]["best_f1"] == pytest.approx(2 / 3)
    assert content["confusion"]["matrix"] == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert ["round", "0.750", "100.00"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    for name in ("thresholds.png", "confusion.png"):
        assert Image.open(output / name).width > 500


def test_reliability_is_reported_and_calibrators_go_to_another_split(model_folder, coco_folder, tmp_path, capsys):
    """The drmm has an objectness; any detector has a confidence."""
    found = tmp_path / "found"
    assert main(["evaluate", str(model_folder), str(coco_folder), "--output", str(found)]) == 0
    results = json.loads((found / "detections.json").read_text())
    kinds = ["confidence"] + ["class_probability", "objectness"] * ("objectness" in results[0])
    results[0] |= {"image_id": 10, "category_id": 3, "bbox": [5.0, 8.0, 30.0, 25.0]}  # one is right
    (found / "detections.json").write_text(json.dumps(results))
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--detections", str(found / "detections.json")]
    assert main(["evaluate", str(coco_folder), *options, "--calibration", "--output", str(first)]) == 0
    report = json.loads((first / "calibration.json").read_text())
    assert list(report["kinds"]) == kinds and "calibrated" not in report
    metrics = json.loads((first / "metrics.json").read_text())
    assert report["kinds"]["confidence"]["ECE"] == metrics["ECE"]
    assert Image.open(first / "calibration.png").width > 500
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any(line[:2] == ["confidence", f"{100 * metrics['ECE']:.2f}"] for line in lines)

    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)
    path = other / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace("0.png", "00.png"))
    (other / "val" / "0.png").rename(other / "val" / "00.png")
    options += ["--calibrators", str(first / "calibrators.json")]
    assert main(["evaluate", str(other), *options, "--output", str(second)]) == 0
    calibrated = json.loads((second / "calibration.json").read_text())["calibrated"]
    assert calibrated["isotonic"]["ECE"] == pytest.approx(0, abs=1e-6) and calibrated["none"]["ECE"] == metrics["ECE"]
    assert Image.open(second / "calibrated.png").width > 1000 and not (second / "calibrators.json").exists()
    before = contents(second)
    assert main(["evaluate", str(coco_folder), *options, "--top-k", "1", "--output", str(second)]) == 2
    assert "fitted on these very pictures" in capsys.readouterr().err and contents(second) == before


def test_what_is_wrong_is_said_in_words(model_folder, coco_folder, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "nothing"), str(coco_folder)]) == 2
    assert "nothing' does not exist" in capsys.readouterr().err
    assert main(["evaluate", str(model_folder), str(coco_folder), "--split", "test"]) == 2
    assert "split 'test'" in capsys.readouterr().err

    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)
    path = other / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace("square", "star"))
    assert main(["evaluate", str(model_folder), str(other)]) == 2
    assert "star" in capsys.readouterr().err
    path.write_text(path.read_text().replace("star", "square"))
    (other / "val" / "1.png").unlink()
    assert main(["evaluate", str(model_folder), str(other)]) == 2
    assert "1.png" in capsys.readouterr().err


def test_the_table_shows_what_is_not_defined_and_what_was_left_out():
    metrics = dict.fromkeys(METRIC_NAMES, 0.5) | {"APs": None, "ECE": 0.012, "ECE_0.1": None}
    metrics |= {"AP_per_class": {"a long name": 0.123456, "b": None}, "num_images": 1, "num_ground_truths": 2}
    metrics |= {"num_crowds": 0, "num_detections": 3, "num_boxes_without_size": 4, "num_other_labels": 0}
    metrics |= {"deduplication": None}
    lines = metrics_table(metrics).splitlines()
    assert lines[0].split() == list(METRIC_NAMES[:6])
    assert lines[1].split() == ["50.00", "50.00", "50.00", "-", "50.00", "50.00"]
    assert lines[5].split() == ["1.20", "-"]
    assert "a long name   12.35" in lines and "b                 -" in lines
    assert lines[-1] == "4 boxes without width or height were left out"
    metrics |= {"deduplication": {"method": "wta", "iou_threshold": 0.7, "num_removed": 5, "num_capped": 2}}
    assert metrics_table(metrics).splitlines()[-2:] == [
        "5 detections were removed by WTA at IoU 0.7",
        "2 sums of confidences were stopped at 1",
    ]


@pytest.mark.parametrize("displayed", [True, False], ids=["displayed", "stored"])
def test_pictures_are_turned_as_their_annotations_see_them(model_folder, tmp_path, displayed):
    """A camera's picture with an EXIF orientation, annotated in either frame, gives the boxes of the plain picture."""
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6
    seen = stored.transpose(Image.Transpose.ROTATE_270) if displayed else stored
    results = []
    for name, picture, options in (("plain", seen, {}), ("exif", stored, {"exif": exif})):
        folder = tmp_path / name
        (folder / "annotations").mkdir(parents=True)
        picture.save(folder / "0.png", **options)
        content = {
            "images": [{"id": 4, "file_name": "0.png", "width": seen.width, "height": seen.height}],
            "annotations": [{"id": 1, "image_id": 4, "category_id": 3, "bbox": [5, 8, 30, 25], "area": 700}],
            "categories": [{"id": 3, "name": "round"}, {"id": 8, "name": "square"}],
        }
        (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
        assert main(["evaluate", str(model_folder), str(folder), "--output", str(folder / "out")]) == 0
        results.append(json.loads((folder / "out" / "detections.json").read_text()))
    assert results[0] == results[1]


def test_pictures_of_another_size_than_annotated_are_named(model_folder, coco_folder, tmp_path, capsys, caplog):
    content = json.loads((coco_folder / "annotations" / "instances_val.json").read_text())
    content["images"][1]["width"] = 160
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(content))
    options = ["--images", str(coco_folder / "val"), "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(model_folder), str(path), *options]) == 2
    said = capsys.readouterr().err + caplog.text
    assert "1.png" in said and "80 x 60, its annotations say 160 x 60" in said


def test_likelihoods_are_written_printed_and_set_beside_another_models(model_folder, coco_folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["evaluate", str(model_folder), str(coco_folder), "--output", str(output), "--batch-size", "2"]
    if "drmm" not in model_folder.name:
        assert main([*arguments, "--losses"]) == 2
        assert "model is a 'detr', which predicts boxes and scores but no density" in capsys.readouterr().err
        assert not (output / "metrics.json").exists()  # said before the work
        return
    assert main([*arguments, "--losses"]) == 0
    losses = json.loads((output / "likelihood.json").read_text())
    assert losses["num_ground_truths"] == 2 and len(losses["all"]["nll"]) == 2
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for stage in (0, 1):
        columns = [losses["all"][name][stage] for name in ("nll", "share", "effective_positives")]
        assert any(line[:4] == [str(stage + 1), *(f"{value:.3f}" for value in columns)] for line in lines)
    assert any(line[:3] == ["square", "1", f"{losses['classes']['square']['nll'][1]:.3f}"] for line in lines)

    other = tmp_path / "other.json"
    other.write_text(json.dumps(losses | {"all": {"nll": [10.0, 20.0], "share": [0.5, 0.25]}}))
    assert main([*arguments, "--against", str(other)]) == 0
    nll, share = losses["all"]["nll"][1], losses["all"]["share"][1]
    values = [nll, 20.0, 20 / nll, share, 0.25, 0.25 / share]
    assert ["2", *(f"{value:.3f}" for value in values)] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]
    for content in ({}, []):
        other.write_text(json.dumps(content))
        assert main([*arguments, "--against", str(other)]) == 2
        assert "the file to compare with is no likelihood.json" in capsys.readouterr().err


def test_likelihoods_of_other_objects_or_another_input_size_are_not_compared():
    losses = {"num_images": 3, "num_ground_truths": 2, "mean_log_scale": 0.5, "all": {"nll": [1.0], "share": [1.0]}}
    assert comparison_table(losses, losses).splitlines()[-1].split() == ["1", *["1.000"] * 6]
    for name, value in (("num_images", 4), ("num_ground_truths", 3), ("mean_log_scale", 0.6)):
        with pytest.raises(ValueError, match=f"{name} is {losses[name]} here and {value} there"):
            comparison_table(losses, losses | {name: value})
    for wrong in ([], {"num_images": 3}):
        with pytest.raises(ValueError, match=r"is no likelihood.json"):
            comparison_table(losses, wrong)


def test_results_of_any_detector_are_measured_without_a_model(coco_folder, tmp_path, capsys):
    """Right about one of two objects; with pictures, and with the annotation file alone."""
    results = tmp_path / "results.json"
    entries = [
        {"image_id": 10, "category_id": 3, "bbox": [5.0, 8.0, 30.0, 25.0], "score": 0.75},
        {"image_id": 20, "category_id": 8, "bbox": [50.0, 60.0, 5.0, 5.0], "score": 0.5},
    ]
    results.write_text(json.dumps(entries))
    annotations = coco_folder / "annotations" / "instances_val.json"
    for name, data, pictures in (("folder", coco_folder, True), ("file", annotations, False)):
        output = tmp_path / name
        assert main(["evaluate", str(data), "--detections", str(results), "--output", str(output)]) == 0
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["AP_per_class"] == {"round": pytest.approx(1.0), "square": 0.0}
        assert metrics["num_images"] == 3 and metrics["ECE"] == pytest.approx((0.25 + 0.5) / 2)
        assert json.loads((output / "detections.json").read_text()) == entries
        assert (output / "detections.jpg").exists() == pictures
    capsys.readouterr()

    entries[0]["image_id"] = 11
    results.write_text(json.dumps(entries))
    for arguments, message in (
        ([str(coco_folder)], "DATA is missing"),
        (
            ["model", str(coco_folder), "--detections", str(results)],
            "both the model 'model' and --detections are given",
        ),
        ([str(coco_folder), "--detections", str(results), "--losses"], "--losses needs a model"),
        ([str(coco_folder), "--detections", str(results)], "1 pictures have no entry in the annotations: image_id 11"),
    ):
        assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_a_submission_is_the_zip_that_the_server_takes(model_folder, coco_folder, tmp_path, capsys):
    content = json.loads((coco_folder / "annotations" / "instances_val.json").read_text())
    del content["annotations"]
    info = tmp_path / "image_info_test-dev2017.json"
    info.write_text(json.dumps(content))
    output = tmp_path / "out"
    command = ["evaluate", str(model_folder), str(info), "--submission", "my method_1", "--output", str(output)]
    assert main(command) == 2 and "--submission needs a model, and --images" in capsys.readouterr().err
    assert main([*command, "--images", str(coco_folder / "val")]) == 0
    (path,) = output.glob("*.zip")
    assert {file.name for file in output.iterdir()} == {path.name, "run.lock"}
    assert path.name == "detections_test-dev2017_my-method-1_results.zip" and path.name in capsys.readouterr().out
    with zipfile.ZipFile(path) as archive:
        entries = json.loads(archive.read("detections_test-dev2017_my-method-1_results.json"))
    assert all(list(entry) == ["image_id", "category_id", "bbox", "score"] for entry in entries)
    found = tmp_path / "found"
    assert main(["evaluate", str(model_folder), str(coco_folder), "--output", str(found)]) == 0
    expected = json.loads((found / "detections.json").read_text())
    assert entries == [{key: entry[key] for key in entries[0]} for entry in expected]


def test_one_file_of_detections_feeds_every_analysis(coco_folder, tmp_path, capsys):
    """All at once, without a model, and with the annotation file alone."""
    results, output = tmp_path / "results.json", tmp_path / "out"
    entries = [
        {"image_id": 10, "category_id": 3, "bbox": [5.0, 8.0, 30.0, 25.0], "score": 0.75},
        {"image_id": 20, "category_id": 8, "bbox": [50.0, 60.0, 5.0, 5.0], "score": 0.5},
    ]
    results.write_text(json.dumps(entries))
    analyses = ["--thresholds", "--calibration", "--sweep", "--breakdown"]
    data = str(coco_folder / "annotations" / "instances_val.json")
    assert main(["evaluate", data, "--detections", str(results), *analyses, "--output", str(output)]) == 0
    written = {path.name for path in output.iterdir()} - {"run.lock"}
    reports = {
        "evaluation",
        "metrics",
        "detections",
        "thresholds",
        "calibration",
        "calibrators",
        "duplicates",
        "breakdown",
    }
    pictures = {"reliability", "thresholds", "confusion", "calibration", "duplicates", "duplicates_reliability"}
    assert written == {f"{name}.json" for name in reports} | {f"{name}.png" for name in {*pictures, "breakdown"}}
    said = capsys.readouterr().out
    assert all(name in said.splitlines()[-1] for name in written - {"calibrators.json"})
    lines = [line.split() for line in said.splitlines()]
    assert ["16", "to", "32", "2", "50.00", "50.00", "50.00", "25.00", "25.00"] in lines
    assert Image.open(output / "breakdown.png").width > 1000


RIGHT = {"image_id": 10, "category_id": 3, "bbox": [5.0, 8.0, 30.0, 25.0], "score": 0.75}
WRONG = {"image_id": 20, "category_id": 8, "bbox": [50.0, 60.0, 5.0, 5.0], "score": 0.5}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([RIGHT, WRONG]))
    return path


@pytest.mark.parametrize(
    ("option", "least"), [("--top-k=0", 1), ("--top-k=-1", 1), ("--batch-size=-1", 1), ("--assignments=0", 1)]
)
def test_counts_are_refused_before_anything_is_touched(coco_folder, results, tmp_path, capsys, option, least):
    output = tmp_path / "out"
    with pytest.raises(SystemExit):
        main(["evaluate", str(coco_folder), "--detections", str(results), "--output", str(output), option])
    name, _, value = option.partition("=")
    assert f"{name}: '{value}' is given; the rule is a whole number of at least {least}" in capsys.readouterr().err
    assert not output.exists()


def test_a_submission_takes_no_option_that_it_does_not_heed(coco_folder, tmp_path, capsys):
    command = ["evaluate", "model", "info.json", "--images", str(coco_folder / "val"), "--submission", "mine"]
    command += ["--output", str(tmp_path / "out")]
    for options in (
        ["--nms", "0"],
        ["--top-k-ratio", "0.5"],
        ["--losses"],
        ["--split", "test"],
        ["--assignments", "1"],
    ):
        assert main([*command, *options]) == 2
        assert f"the rule is to leave out {options[0]}." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_submission_names_what_is_wrong_before_the_work(drmm_folder, coco_folder, tmp_path, capsys):
    content = json.loads((coco_folder / "annotations" / "instances_val.json").read_text())
    info, output = tmp_path / "image_info_test.json", tmp_path / "out"
    del content["images"][1]["width"]
    info.write_text(json.dumps(content))
    command = ["evaluate", str(drmm_folder), str(info), "--images", str(coco_folder / "val"), "--output", str(output)]
    assert main([*command, "--submission", "mine"]) == 2
    assert f"width of image 1 of {info} is None; the rule is a whole number" in capsys.readouterr().err
    assert main([*command, "--submission", "m" * 300]) == 2
    assert "the rule is one that leaves the file's name within 240 bytes" in capsys.readouterr().err
    info.write_text("[{")
    assert main([*command, "--submission", "mine"]) == 2
    assert f"{info} is not valid json" in capsys.readouterr().err
    assert not output.exists()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "run.lock"}


def test_a_folder_never_holds_reports_of_two_evaluations(drmm_folder, coco_folder, tmp_path, capsys):
    """Reports add up while the detections are the same, with and without the model; then all of them go."""
    output = tmp_path / "out"
    command = ["evaluate", str(drmm_folder), str(coco_folder), "--output", str(output)]
    rest = ["--thresholds", "--breakdown", "--coverage", "--calibration"]
    assert main([*command, "--losses", "--sweep"]) == 0
    first = contents(output)
    again = ["evaluate", str(coco_folder), "--detections", str(output / "detections.json"), "--output", str(output)]
    assert main([*again, *rest]) == 0
    second = contents(output)
    assert first.items() <= second.items() and {"thresholds.json", "coverage.json"} < second.keys() - first.keys()
    assert "held another evaluation" not in capsys.readouterr().out

    assert main([*command, "--top-k", "3"]) == 0
    kept = {"metrics.json", "detections.json", "evaluation.json", "detections.jpg", "reliability.png"}
    assert contents(output).keys() == kept
    said = capsys.readouterr().out
    assert all(name in said for name in second.keys() - kept) and f"{output} held another evaluation" in said


def test_an_evaluation_that_fails_leaves_the_earlier_one(drmm_folder, coco_folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    assert main(["evaluate", str(drmm_folder), str(coco_folder), "--output", str(output), "--thresholds"]) == 0
    before = contents(output)
    other = tmp_path / "other"
    shutil.copytree(coco_folder, other)
    (other / "val" / "2.png").write_bytes((other / "val" / "2.png").read_bytes()[:2000])
    assert main(["evaluate", str(drmm_folder), str(other), "--output", str(output)]) == 2
    assert "2.png" in capsys.readouterr().err and contents(output) == before
    assert json.loads(before["evaluation.json"])["data"] == str(coco_folder)


def test_what_is_read_is_not_written_over(coco_folder, results, tmp_path, capsys):
    output = tmp_path / "out"
    first = ["evaluate", str(coco_folder), "--output", str(output), "--detections"]
    assert main([*first, str(results), "--calibration"]) == 0
    before = contents(output)
    saved = str(output / "detections.json")
    assert main([*first, saved, "--top-k", "1"]) == 0  # one of each picture: all there are
    for arguments in (
        [saved, "--wta", "0.5"],
        [str(results), "--calibrators", str(output / "calibrators.json")],
    ):
        main([*first, *arguments])
    assert contents(output) == before
    results.write_text(json.dumps([RIGHT, RIGHT | {"score": 0.25}]))
    assert main([*first, str(results)]) == 0
    before = contents(output)
    assert main([*first, saved, "--nms", "0.5"]) == 2
    assert f"{saved} would be replaced by what remains of it; name another --output" in capsys.readouterr().err
    model = ["evaluate", "model", str(coco_folder), "--output", str(output), "--against"]
    assert main([*model, str(output / "likelihood.json")]) == 2
    assert "a report of the folder that is written; name another --output" in capsys.readouterr().err
    assert contents(output) == before


@pytest.mark.parametrize("entries", [[], [WRONG | {"box_scales": [1.0] * 4}]], ids=["nothing", "nothing right"])
def test_where_nothing_is_found_the_rest_is_written_and_the_reports_say_so(entries, coco_folder, tmp_path, capsys):
    results, output = tmp_path / "results.json", tmp_path / "out"
    results.write_text(json.dumps(entries))
    command = ["evaluate", str(coco_folder), "--detections", str(results), "--output", str(output)]
    asked = ["--calibration", "--coverage", "--thresholds", "--sweep", "--breakdown"]
    assert main([*command, *asked]) == 0
    said = capsys.readouterr().out
    count = len(entries)
    reports = {name: json.loads((output / f"{name}.json").read_text()) for name in ("calibration", "coverage")}
    assert reports["coverage"] == {
        "not_measured": f"none of {count} detections is correct; there is nothing to compare with."
    }
    assert f"0 of {count} predictions are correct" in reports["calibration"]["not_fitted"]
    assert "coverage was not measured: none of" in said and "calibrators were not fitted: 0 of" in said
    names = ("metrics", "thresholds", "duplicates", "breakdown", "evaluation")
    assert all((output / f"{name}.json").is_file() for name in names) and not (output / "calibrators.json").exists()


def test_coverage_of_detections_without_scales_is_refused_before_the_figures(coco_folder, results, tmp_path, capsys):
    command = ["evaluate", str(coco_folder), "--detections", str(results), "--output", str(tmp_path / "out")]
    assert main([*command, "--coverage"]) == 2
    assert f"--coverage needs box_scales; {results} does not have them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_evaluation_at_a_time_writes_a_folder(coco_folder, results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("drmm_hf.evaluation.files._lock", lambda file: False)
    command = ["evaluate", str(coco_folder), "--detections", str(results), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "is in use by another run: name another folder" in capsys.readouterr().err


def without_size(record):
    del record["width"], record["height"]


def turned(record):
    record["width"], record["height"] = record["height"], record["width"]


WRONG_PICTURES = {
    "text": (lambda record: record.update(id=str(record["id"])), "images[0] (id '0'): id is '0', must be an integer"),
    "no size": (without_size, "records that break their format: 3, such as {file}: images[0] (id 0): width is None"),
    "turned": (turned, "pictures of another size than their annotations say: 3, such as 0.png (image 0): 60 x 80"),
    "one id": (lambda record: record.update(id=0), "image ids that two pictures claim: 2, such as {file}: images[1]"),
    "outside": (
        lambda record: record.update(file_name=f"../val/{record['file_name']}"),
        "file names that leave the data folder: 3, such as {file}: images[0] (id 0): file_name '../val/0.png' leaves",
    ),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("kind", WRONG_PICTURES)
def test_why_pictures_are_left_out_is_said_before_the_work(
    kind, streaming, drmm_folder, coco_folder, tmp_path, capsys, monkeypatch
):
    data = shutil.copytree(coco_folder, tmp_path / "data")
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    change, said = WRONG_PICTURES[kind]
    for record in content["images"]:
        change(record)
    file.write_text(json.dumps(content))
    monkeypatch.setattr("drmm_hf.evaluation.evaluate.predict_parts", None)
    command = ["evaluate", str(drmm_folder), str(data), "--output", str(tmp_path / "out")]
    assert main(command + ["--streaming"] * streaming) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("drmm evaluate: ") and said.format(file=file) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["a model", "results with pictures", "results alone"])
def test_boxes_written_as_corners_are_refused_before_the_work(
    kind, drmm_folder, coco_folder, results, tmp_path, capsys, monkeypatch
):
    """Every figure would be of other objects; COCO's boxes without area, in contrast, count as they always did."""
    data = shutil.copytree(coco_folder, tmp_path / "data")
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    first = content["images"][0]
    box = [first["width"] * 0.4, first["height"] * 0.4, first["width"] * 0.9, first["height"] * 0.9]
    template = content["annotations"][0] | {"image_id": first["id"], "bbox": box}
    content["annotations"] = [template | {"id": index} for index in range(10)]
    file.write_text(json.dumps(content))
    monkeypatch.setattr("drmm_hf.evaluation.evaluate.predict_parts", None)
    monkeypatch.setattr("drmm_hf.evaluation.evaluate.figures", None)
    words = {
        "a model": [str(drmm_folder), str(data)],
        "results with pictures": [str(data), "--detections", str(results)],
        "results alone": [str(file), "--detections", str(results)],
    }
    assert main(["evaluate", *words[kind], "--output", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "10 of 10 boxes end beyond their picture" in line and "write [left, top, width, height]" in line
    assert not (tmp_path / "out").exists()


NO_ROOM = {
    "a part": ("numpy.savez", "parts/[0-9a-f]{16}/000000.npz"),
    "detections.json": ("drmm_hf.evaluation.output_folder.write_json", ""),
    "a report": ("pathlib.Path.write_text", "breakdown.json"),
    "a picture": ("PIL.Image.Image.save", ""),
    "a figure": ("matplotlib.figure.Figure.savefig", ""),
}


@pytest.mark.parametrize("kind", NO_ROOM)
def test_a_full_disk_is_named(kind, drmm_folder, coco_folder, tmp_path, capsys, monkeypatch):
    """The system names no file. What is there is whole, and a repeated call goes on."""

    write = Path.write_text

    def refuse(*arguments, **options):
        if kind == "a report" and "breakdown" not in str(arguments[0]):
            return write(*arguments, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    output = tmp_path / "out"
    command = ["evaluate", str(drmm_folder), str(coco_folder), "--breakdown", "--output", str(output)]
    function, place = NO_ROOM[kind]
    with monkeypatch.context() as patch:
        patch.setattr(function, refuse)
        assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    rule = "cannot be written: No space left on device; make room there or write elsewhere, and repeat the call"
    assert re.match(f"drmm evaluate: '{output}/?{place}' {rule}", said)
    assert not [path for path in output.rglob("*") if path.suffix == ".partial" or path.name.startswith("tmp")]
    assert main(command) == 0 and (output / "breakdown.json").is_file()


@pytest.mark.parametrize(("place", "said"), [("file", "a file"), ("link", "a link to nothing")])
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_an_output_that_is_no_folder_is_named(command, place, said, coco_folder, results, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    arguments = {
        "evaluate": ["evaluate", str(coco_folder), "--detections", str(results)],
        "train": ["train", "scripts/recipes/quickstart_generated.yaml"],
    }[command]
    assert main([*arguments, "--output", str(tmp_path / place)]) == 2
    message = (
        f"drmm {command}: output_dir is '{tmp_path / place}', which is {said}; the rule is a folder, or a name that"
    )
    assert message in capsys.readouterr().err


def test_the_model_of_a_run_that_goes_on_is_measured_with_a_warning(
    drmm_folder, coco_folder, tmp_path, capsys, goes_on
):
    best = shutil.copytree(drmm_folder, tmp_path / "run" / "best")
    command = ["evaluate", str(best), str(coco_folder), "--output", str(tmp_path / "out")]
    with goes_on(tmp_path / "run"):
        assert main(command) == 0
    said = capsys.readouterr().err
    warning = f"drmm evaluate: warning: model is '{best}', of a run that goes on (process 7)"
    assert [line for line in said.splitlines() if "warning" in line and "drmm" in line][0].startswith(warning)
    assert main(command) == 0
    assert "goes on" not in capsys.readouterr().err
