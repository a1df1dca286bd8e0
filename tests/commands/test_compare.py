"""`drmm compare`, from the command line to its files."""

import json
import shutil

import pytest
from PIL import Image

from drmm_cli import main
from drmm_hf.commands.compare import named_sources


def test_a_model_and_a_file_side_by_side(model_folder, coco_folder, tmp_path, capsys):
    results, output = tmp_path / "results.json", tmp_path / "out"
    entries = [{"image_id": 10, "category_id": 3, "bbox": [5.0, 8.0, 30.0, 25.0], "score": 0.75}]
    results.write_text(json.dumps(entries))
    command = ["compare", f"mine={model_folder}", f"file={results}", str(coco_folder), "--output", str(output)]
    assert main([*command, "--timed", "2", "--drawn", "2"]) == 0
    result = json.loads((output / "compare.json").read_text())
    mine, file = result["models"]["mine"], result["models"]["file"]
    assert file["AP"] == pytest.approx(0.5) and file["seconds"] is None  # one of two classes
    assert mine["seconds"] > 0 and (mine["NLL"] is not None) == ("drmm" in model_folder.name)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["file", "50.00", "50.00", "25.00", "25.00", "-", "-", "-", "-", "-"] in lines
    timed = ["64/96", f"{1000 * mine['seconds']:.0f}", "1.00"]
    assert any(line[:1] == ["mine"] and line[7:10] == timed for line in lines)
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["1_mine", "2_file"]
    # A row a picture, a column for the annotations and one for each model.
    sheet = Image.open(output / "differences.jpg")
    assert sheet.width > 3 * 900 and result["pictures"]
    named = result["pictures"][0]
    assert any(line[:1] == [f"{named['file_name']}:"] for line in lines)


def test_models_that_agree_are_not_drawn(coco_folder, tmp_path, capsys):
    results, output = tmp_path / "results.json", tmp_path / "out"
    results.write_text(json.dumps([{"image_id": 10, "category_id": 3, "bbox": [5.0, 8.0, 30.0, 25.0], "score": 0.75}]))
    command = ["compare", f"a={results}", f"b={results}", str(coco_folder), "--output", str(output)]
    assert main(command) == 0
    assert json.loads((output / "compare.json").read_text())["pictures"] == []
    assert not (output / "differences.jpg").exists()
    said = capsys.readouterr().out
    assert "differences.jpg" not in said and "there is no picture in which their errors (LRP) differ" in said


def test_a_model_of_other_classes_is_named_before_the_work(drmm_folder, coco_folder, tmp_path, capsys):
    other, output = shutil.copytree(drmm_folder, tmp_path / "other"), tmp_path / "out"
    config = json.loads((other / "config.json").read_text())
    config |= {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}, "category_ids": None}
    (other / "config.json").write_text(json.dumps(config))
    command = ["compare", f"mine={drmm_folder}", f"theirs={other}", str(coco_folder), "--output", str(output)]
    assert main(command) == 2
    assert "theirs: the model has no class for 2 of the 2 categories" in capsys.readouterr().err
    assert list(output.iterdir()) == []


def test_weights_may_be_of_another_type(drmm_folder, coco_folder, tmp_path, capsys):
    models, scores = {}, {}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        command = ["compare", f"a={drmm_folder}", f"b={drmm_folder}", str(coco_folder), "--output", str(output)]
        assert main([*command, "--dtype", dtype, "--timed", "1"]) == 0
        models[dtype] = json.loads((output / "compare.json").read_text())["models"]
        assert [model["dtype"] for model in models[dtype].values()] == [dtype, dtype]
        scores[dtype] = [entry["score"] for entry in json.loads((output / "1_a" / "detections.json").read_text())]
    assert scores["float32"] != scores["bfloat16"]
    assert models["float32"]["a"]["NLL"] == pytest.approx(models["bfloat16"]["a"]["NLL"], rel=0.05)
    results = tmp_path / "float32" / "1_a" / "detections.json"
    command = ["compare", f"a={results}", f"b={results}", str(coco_folder), "--output", str(tmp_path / "out")]
    assert main([*command, "--dtype", "bfloat16"]) == 2
    assert "dtype is 'bfloat16', and no model is given" in capsys.readouterr().err


def test_models_need_names_of_their_own():
    assert named_sources(["a=x/best", "y/best"]) == {"a": "x/best", "y/best": "y/best"}
    with pytest.raises(ValueError, match="two models are called 'a'"):
        named_sources(["a=x", "a=y"])
    with pytest.raises(ValueError, match="at least two"):
        named_sources(["a=x"])


@pytest.mark.parametrize(("option", "least"), [("--timed", 0), ("--drawn", 0), ("--top-k", 1), ("--batch-size", 1)])
def test_counts_are_refused_before_anything_is_touched(tmp_path, capsys, option, least):
    with pytest.raises(SystemExit):
        main(["compare", "a", "b", "data", "--output", str(tmp_path / "out"), f"{option}={least - 1}"])
    assert (
        f"{option}: '{least - 1}' is given; the rule is a whole number of at least {least}" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
