"""`drmm calibrate`, from the command line to what the folder then predicts."""

import json
import shutil

import numpy as np
import pytest

from drmm_cli import main
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.commands.calibrate import certainty
from drmm_hf.data.coco import load_detection_dataset
from drmm_hf.evaluation.predict import predict
from drmm_hf.evaluation.recalibration import Calibrator


@pytest.fixture
def folder(drmm_folder, tmp_path):
    """Return a D-RMM folder that may be changed."""
    return shutil.copytree(drmm_folder, tmp_path / "model")


@pytest.fixture
def coco(folder, coco_folder, tmp_path):
    """Return a COCO folder in which the best prediction of each picture is annotated, a little off."""
    shutil.copytree(coco_folder, tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    model, processor = DrmmForObjectDetection.from_pretrained(folder), DrmmImageProcessor.from_pretrained(folder)
    found = predict(model, processor, load_detection_dataset(str(coco_folder), "val", invalid="skip"))
    content["annotations"] = []
    for image_id in found:
        result = found[image_id]
        for index in (0, 5):
            left, top, right, bottom = result["boxes"][index] + [0.5, 0, -0.5, 0.25]
            if right > left and bottom > top:
                box = [left, top, right - left, bottom - top]
                record = {"id": len(content["annotations"]) + 1, "image_id": image_id, "bbox": box, "iscrowd": 0}
                label = int(result["labels"][index])
                content["annotations"].append(record | {"category_id": (3, 8)[label], "area": box[2] * box[3]})
    assert len(content["annotations"]) > 2
    path.write_text(json.dumps(content))
    return tmp_path / "coco"


def everything(folder, coco):
    dataset = load_detection_dataset(str(coco), "val", invalid="skip")
    model, processor = DrmmForObjectDetection.from_pretrained(folder), DrmmImageProcessor.from_pretrained(folder)
    return predict(model, processor, dataset)


@pytest.mark.parametrize("scores", ["temperature", "isotonic"])
def test_the_folder_predicts_what_was_fitted_and_a_second_time_replaces_the_first(folder, coco, capsys, scores):
    raw, before = everything(folder, coco), json.loads((folder / "preprocessor_config.json").read_text())
    arguments = ["calibrate", str(folder), str(coco), "--scores", scores, "--threshold", "class"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    once = json.loads((folder / "preprocessor_config.json").read_text())
    assert {name: once[name] for name in before} == before
    assert once.keys() - before.keys() == {"calibration", "score_threshold"}
    calibration = once["calibration"]
    assert calibration["fitted_on"]["num_images"] == 3 and calibration["scores"]["method"] == scores
    assert len(once["score_threshold"]) == 2 and f"times {calibration['scale_factor']:.3f}" in said
    calibrated, calibrate = everything(folder, coco), Calibrator.from_dict(calibration["scores"])
    for image_id in raw:
        np.testing.assert_allclose(calibrated[image_id]["scores"], calibrate(raw[image_id]["scores"]), atol=1e-5)
        np.testing.assert_allclose(
            calibrated[image_id]["box_scales"], calibration["scale_factor"] * raw[image_id]["box_scales"], rtol=1e-5
        )
    assert main(arguments) == 0  # fitted to predictions as they are, not on top
    assert json.loads((folder / "preprocessor_config.json").read_text()) == once
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found | {name: once[name] for name in ("calibration", "score_threshold")} == found
    assert (found["scores"], found["num_pictures"]) == (scores, 3) and "fitted on 3 pictures" in shown.err
    assert main(["calibrate", str(folder), str(coco), "--scores", "none", "--no-scales"]) == 0
    assert json.loads((folder / "preprocessor_config.json").read_text()) == before


def test_few_objects_are_warned_about_and_nothing_is_held_out_of_three_pictures(folder, coco, capsys):
    assert main(["calibrate", str(folder), str(coco)]) == 0
    said = capsys.readouterr()
    count = len(json.loads((coco / "annotations" / "instances_val.json").read_text())["annotations"])
    assert f"warning: fitted on {count} objects; fewer than 100 say little" in said.err
    assert "too few pictures or right predictions to hold some out: temperature" in said.out


@pytest.mark.parametrize("best", ["none", "temperature", "isotonic"])
def test_the_default_is_what_is_best_on_held_out_pictures(folder, coco, capsys, monkeypatch, best):
    errors = {name: {"ECE": 0.01, "squared_error": 0.04} for name in ("none", "temperature", "isotonic")}
    errors[best] = {"ECE": 0.02, "squared_error": 0.03}
    monkeypatch.setattr("drmm_hf.evaluation.recalibration.held_out_errors", lambda *_: errors)
    assert main(["calibrate", str(folder), str(coco)]) == 0
    fitted = json.loads((folder / "preprocessor_config.json").read_text())["calibration"].get("scores")
    assert best == ("none" if fitted is None else fitted["method"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [*({"none": ["as", "predicted"]}.get(best, [best])), "2.00", "0.0300", "chosen"] in lines
    assert sum("chosen" in line for line in lines) == 1


def test_a_confidence_of_one_says_how_many_predictions_it_is_of():
    fitted = {"method": "isotonic", "scores": [0.1, 0.2, 0.7, 0.9], "calibrated": [0.0, 0.5, 1.0, 1.0]}
    said = certainty({"calibration": {"scores": fitted}}, [0.05, 0.69, 0.7, 0.8, 0.9])
    assert "of 0.700 and more become 1.000, since the 3 such predictions" in said
    for other in (fitted | {"calibrated": [0.0, 0.5, 0.9, 0.9]}, {"method": "temperature", "temperature": 2.0}, None):
        assert certainty({"calibration": {"scores": other}}, [0.9]) is None
    assert certainty({"calibration": None}, [0.9]) is None


def test_evaluate_says_what_it_measures(folder, coco, tmp_path, capsys):
    arguments = ["evaluate", str(folder), str(coco), "--output", str(tmp_path / "out"), "--calibration", "--coverage"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "measured as the processor" not in said and "calibrators.json" in said.splitlines()[-1]
    fitted = json.loads((tmp_path / "out" / "calibrators.json").read_text())
    report = json.loads((tmp_path / "out" / "coverage.json").read_text())
    assert fitted["scale_factor"] == report["best_scale_factor"] and report["saved_scale_factor"] is None
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["calibration"] is None

    assert main(["calibrate", str(folder), str(coco)]) == 0
    arguments[4] = str(tmp_path / "again")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"scores are calibrated (temperature {fitted['temperature']['temperature']:.3f})" in said
    assert f"box scales are multiplied by {fitted['scale_factor']:.3f}" in said and "these very pictures" in said
    assert "calibrators.json" not in said
    assert not (tmp_path / "again" / "calibrators.json").exists()
    again = json.loads((tmp_path / "again" / "coverage.json").read_text())
    assert again["best_scale_factor"] == pytest.approx(1, rel=1e-4)
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert metrics["calibration"]["scale_factor"] == fitted["scale_factor"]

    assert again["saved_scale_factor"] == fitted["scale_factor"]
    assert json.loads((tmp_path / "again" / "calibration.json").read_text())["saved_scores"] == "temperature"
    # What is measured again from its detections is still of calibrated ones.
    saved = ["evaluate", str(coco), "--detections", str(tmp_path / "again" / "detections.json"), *arguments[3:]]
    assert main(saved) == 0 and "scores are calibrated" in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "coverage.json").read_text()) == again
    assert not (tmp_path / "again" / "calibrators.json").exists()

    files = ["--calibrators", str(tmp_path / "out" / "calibrators.json")]
    assert main(["evaluate", str(folder), str(coco), *files]) == 2
    assert "the model's processor calibrates already" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [None, 0.05, [0.1, 0.2]])
def test_the_picture_of_an_evaluation_takes_the_saved_thresholds(saved, folder, coco, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "drmm_hf.visualization.evaluation_pictures.draw_detections",
        lambda entries, annotations, pictures, path, thresholds: given.append(thresholds) or path.touch() or path,
    )
    settings = DrmmImageProcessor.from_pretrained(folder, score_threshold=saved)
    settings.save_pretrained(folder)
    assert main(["evaluate", str(folder), str(coco), "--output", str(tmp_path / "out")]) == 0
    each = saved if isinstance(saved, list) else [saved] * 2
    assert given == [None if saved is None else dict(zip((3, 8), each, strict=True))]


def test_coverage_of_saved_detections(folder, coco, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["evaluate", str(folder), str(coco), "--output", out, "--coverage"]) == 0
    saved = ["evaluate", str(coco), "--detections", f"{out}/detections.json", "--output", str(tmp_path / "saved")]
    assert main([*saved, "--coverage"]) == 0
    reports = [json.loads((tmp_path / name / "coverage.json").read_text()) for name in ("out", "saved")]
    assert reports[0] == reports[1]
    assert main([*saved, "--coverage", "--freedom", "inf"]) == 0
    gaussian = json.loads((tmp_path / "saved" / "coverage.json").read_text())
    assert gaussian["freedom"] is None and gaussian["best_scale_factor"] > reports[0]["best_scale_factor"]
    capsys.readouterr()
    assert main([*saved, "--freedom", "0"]) == 2 and "freedom is 0.0" in capsys.readouterr().err
    assert main(["evaluate", str(folder), str(coco), "--freedom", "3"]) == 2
    assert "--freedom is for --detections" in capsys.readouterr().err


def test_other_detectors_and_other_places_are_refused(model_folder, coco_folder, tmp_path, capsys):
    assert main(["calibrate", str(tmp_path / "nowhere"), str(coco_folder)]) == 2
    assert "has no preprocessor_config.json" in capsys.readouterr().err
    if "detr" in model_folder.name:
        assert main(["calibrate", str(model_folder), str(coco_folder)]) == 2
        assert "model is a 'detr', whose processor takes no calibration" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [{"score_threshold": [0.5]}, {"calibration": []}, {"image_std": [0, 1, 1]}])
def test_a_spoilt_processor_is_refused_when_it_is_loaded(folder, coco_folder, tmp_path, capsys, entry):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    picture = str(coco_folder / "val" / "0.png")
    assert main(["predict", str(folder), picture, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert next(iter(entry)) in said and said.startswith("drmm predict: ") and said.count("\n") == 1


@pytest.mark.parametrize("kind", ["none", "crowds"])
def test_data_without_objects_are_refused_before_the_work(kind, folder, coco, capsys, monkeypatch):
    path = coco / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = [record | {"iscrowd": 1} for record in content["annotations"] if kind == "crowds"]
    path.write_text(json.dumps(content))
    before = (folder / "preprocessor_config.json").read_bytes()
    monkeypatch.setattr("drmm_hf.evaluation.predict.predict", None)
    assert main(["calibrate", str(folder), str(coco), "--split", "val"]) == 2
    said = f"data is {str(coco)!r}, whose split val has no annotated object, crowds aside; the rule is some that"
    assert said in capsys.readouterr().err
    assert (folder / "preprocessor_config.json").read_bytes() == before


def test_the_model_of_a_run_that_goes_on_is_left_alone(folder, coco, tmp_path, capsys, goes_on):
    """Its next best checkpoint would replace what is saved."""
    best = folder.rename(tmp_path / "best")
    before = (best / "preprocessor_config.json").read_bytes()
    with goes_on(tmp_path):
        assert main(["calibrate", str(best), str(coco)]) == 2
    said = capsys.readouterr().err
    assert f"model is '{best}', of a run that goes on (process 7)" in said and said.count("\n") == 1
    assert (best / "preprocessor_config.json").read_bytes() == before
    assert main(["calibrate", str(best), str(coco)]) == 0  # its file of the lock stays
