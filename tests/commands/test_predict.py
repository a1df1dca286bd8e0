"""`drmm predict`, from the command line to its files."""

import json
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from drmm_cli import main
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.films import Film, film_writer


def test_boxes_as_json_and_drawn_pictures(model_folder, coco_folder, tmp_path, capsys):
    output = tmp_path / "out"
    pictures = [str(coco_folder / "val" / "2.png"), str(coco_folder / "val")]
    arguments = ["predict", str(model_folder), *pictures, "--output", str(output), "--threshold", "0", "--json"]
    assert main(arguments) == 0
    records = json.loads(capsys.readouterr().out)
    assert records == json.loads((output / "predictions.json").read_text())
    assert [record["file"] for record in records] == [str(coco_folder / "val" / f"{i}.png") for i in (2, 0, 1)]
    for record in records:
        assert (record["width"], record["height"]) == Image.open(record["file"]).size
        assert len(record["boxes"]) >= 6
        scores = [entry["score"] for entry in record["boxes"]]
        assert scores == sorted(scores, reverse=True)
        assert {entry["label"] for entry in record["boxes"]} <= {"round", "square"}
        assert ("box_scales" in record["boxes"][0]) == ("drmm" in model_folder.name)
        drawn = Image.open(record["drawn"])
        assert max(drawn.size) == 1280
        plain = np.asarray(Image.open(record["file"]).resize(drawn.size, Image.Resampling.LANCZOS), dtype=int)
        assert (abs(np.asarray(drawn, dtype=int) - plain).max(axis=-1) > 60).mean() > 0.001


def test_the_threshold_hides(model_folder, coco_folder, tmp_path, capsys):
    arguments = [str(model_folder), str(coco_folder / "val" / "0.png"), "--output", str(tmp_path), "--threshold", "1"]
    assert main(["predict", *arguments]) == 0
    assert json.loads((tmp_path / "predictions.json").read_text())[0]["boxes"] == []
    assert "0.png (60x80): 0 objects" in capsys.readouterr().out


def test_pictures_of_one_name_are_drawn_apart(model_folder, coco_folder, tmp_path):
    shutil.copytree(coco_folder / "val", tmp_path / "again")
    output = tmp_path / "out"
    pictures = [str(coco_folder / "val" / "0.png"), str(tmp_path / "again" / "0.png")]
    assert main(["predict", str(model_folder), *pictures, "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["0.jpg", "0_2.jpg", "predictions.json"]


def test_no_picture_is_drawn_over(model_folder, coco_folder, tmp_path):
    Image.open(coco_folder / "val" / "0.png").save(tmp_path / "0.jpg")
    before = (tmp_path / "0.jpg").read_bytes()
    assert main(["predict", str(model_folder), str(tmp_path), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "0.jpg").read_bytes() == before
    assert (tmp_path / "0_2.jpg").exists()


def test_files_of_an_earlier_run_are_replaced_and_it_is_said(drmm_folder, coco_folder, tmp_path, capsys):
    output = tmp_path / "out"
    pictures = [coco_folder / "val" / f"{i}.png" for i in range(3)]

    def predict(*chosen):
        assert main(["predict", str(drmm_folder), *map(str, chosen), "--output", str(output)]) == 0
        return capsys.readouterr().err

    assert "earlier run" not in predict(*pictures)
    (output / "mine.txt").write_text("kept")
    assert f"files of an earlier run in {output} that are replaced: 4\n" in predict(pictures[1])
    assert sorted(path.name for path in output.iterdir()) == ["1.jpg", "mine.txt", "predictions.json"]
    assert "replaced: 2\n" in predict(pictures[0])
    assert "replaced: 1\n" in predict(output / "0.jpg")  # what is read stays
    assert sorted(path.name for path in output.iterdir()) == ["0.jpg", "0_2.jpg", "mine.txt", "predictions.json"]


@pytest.mark.parametrize("content", ["[", "3", "[3]", "[]", '[{"drawn": 3}]'])
def test_files_that_no_earlier_run_wrote_are_not_replaced(drmm_folder, coco_folder, tmp_path, capsys, content):
    """Neither a picture, nor a predictions.json of something else."""
    command = ["predict", str(drmm_folder), str(coco_folder / "val" / "0.png"), "--output", str(tmp_path)]
    (tmp_path / "0.jpg").write_text("mine")
    assert main(command) == 2
    assert "0.jpg was not written by an earlier drmm predict" in capsys.readouterr().err
    (tmp_path / "predictions.json").write_text(content)
    assert main(command) == 2
    (tmp_path / "0.jpg").unlink()
    assert main(command) == (0 if content == "[]" else 2)


@pytest.mark.parametrize("broken", ["cut", "16 bits"])
def test_pictures_that_cannot_be_read_are_named(model_folder, coco_folder, tmp_path, capsys, broken):
    picture = tmp_path / "picture.png"
    if broken == "cut":
        picture.write_bytes((coco_folder / "val" / "0.png").read_bytes()[:3000])
    else:
        Image.fromarray(np.full((60, 80), 3000, dtype=np.uint16)).save(picture)
    assert main(["predict", str(model_folder), str(picture), "--output", str(tmp_path / "out")]) == 2
    assert str(picture) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda weights: weights.popitem(), "missing or of another shape"),
        (
            lambda weights: weights.update({name: value[:-1] for name, value in weights.items() if value.dim()}),
            "of another shape",
        ),
        (
            lambda weights: [value.fill_(torch.nan) for value in weights.values() if value.is_floating_point()],
            "finite",
        ),
        (None, "no detector"),
    ],
    ids=["incomplete", "other shapes", "nan", "cut"],
)
def test_damaged_weights_are_refused(model_folder, coco_folder, tmp_path, capsys, damage, words):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    path = folder / "model.safetensors"
    if damage is None:
        path.write_bytes(path.read_bytes()[:-100])
    else:
        weights = load_file(path)
        damage(weights)
        save_file(weights, path, metadata={"format": "pt"})
    arguments = [str(folder), str(coco_folder / "val" / "0.png"), "--output", str(tmp_path / "out")]
    assert main(["predict", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_an_unknown_device_is_named(model_folder, coco_folder, tmp_path, capsys):
    arguments = [str(model_folder), str(coco_folder / "val" / "0.png"), "--output", str(tmp_path)]
    assert main(["predict", *arguments, "--device", "banana"]) == 2
    assert "device is 'banana'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere/quickstrat/best", "./nowhere", "~/nowhere", "nowhere.safetensors"])
def test_a_mistyped_folder_of_a_model_fails_without_the_hub(coco_folder, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("drmm_hf.evaluation.predict.load_detector", lambda *args: pytest.fail("the Hub is asked"))
    arguments = [name, str(coco_folder / "val" / "0.png"), "--output", str(tmp_path / "out")]
    assert main(["predict", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"drmm predict: model {name!r} does not exist, ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("threshold", ["50", "-1", "nan"])
def test_a_threshold_is_a_score(coco_folder, capsys, threshold):
    assert main(["predict", "model", str(coco_folder / "val" / "0.png"), f"--threshold={threshold}"]) == 2
    assert "threshold is" in capsys.readouterr().err


def test_intervals_and_density(model_folder, coco_folder, tmp_path, capsys):
    arguments = ["predict", str(model_folder), str(coco_folder / "val" / "0.png"), "--output", str(tmp_path / "out")]
    if "drmm" not in model_folder.name:
        for option in (["--interval", "0.9"], ["--density"]):
            assert main([*arguments, *option]) == 2
            assert "no density over boxes" in capsys.readouterr().err
        return
    assert main([*arguments, "--threshold", "0", "--interval", "0.9", "--density"]) == 0
    (record,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert Image.open(record["density"]).width > 1000
    processor = DrmmImageProcessor.from_pretrained(model_folder)
    model = DrmmForObjectDetection.from_pretrained(model_folder).eval()
    image = Image.open(coco_folder / "val" / "0.png")
    with torch.no_grad():
        outputs = model(**processor(images=[image], return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, 0.0, [image.size[::-1]], interval=0.9)
    assert len(record["boxes"]) == len(expected["scores"]) == 12
    for entry, limits in zip(record["boxes"], expected["box_intervals"].tolist(), strict=True):
        np.testing.assert_allclose(entry["box_intervals"], limits, atol=2e-3)


@pytest.mark.parametrize("interval", ["0", "1", "90", "nan"])
def test_an_interval_is_a_share(coco_folder, capsys, interval):
    assert main(["predict", "model", str(coco_folder / "val" / "0.png"), f"--interval={interval}"]) == 2
    assert "interval is" in capsys.readouterr().err


def test_the_threshold_of_the_folder_is_the_default(model_folder, coco_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "drmm")
    path = tmp_path / "drmm" / "preprocessor_config.json"
    saved = [0.0, 1.0]  # every round one, no square one
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score_threshold": saved}))
    assert main(["predict", str(tmp_path / "drmm"), str(coco_folder / "val"), "--output", str(tmp_path / "out")]) == 0
    records = json.loads((tmp_path / "out" / "predictions.json").read_text())
    labels = {entry["label"] for record in records for entry in record["boxes"]}
    assert labels == ({"round"} if "drmm" in model_folder.name else labels)


def test_saved_thresholds_are_one_for_each_class(drmm_folder, coco_folder, tmp_path, capsys):
    shutil.copytree(drmm_folder, tmp_path / "drmm")
    path = tmp_path / "drmm" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score_threshold": [0.5, 0.5, 0.5]}))
    assert main(["predict", str(tmp_path / "drmm"), str(coco_folder / "val"), "--output", str(tmp_path / "out")]) == 2
    assert "preprocessor_config.json has a score_threshold of 3 entries" in capsys.readouterr().err


def test_boxes_are_kept_as_post_processing_keeps_them(drmm_folder, coco_folder, tmp_path, capsys):
    """At a threshold that one of the scores has to the bit, of one class and of each."""
    picture = coco_folder / "val" / "0.png"
    processor = DrmmImageProcessor.from_pretrained(drmm_folder)
    model = DrmmForObjectDetection.from_pretrained(drmm_folder).eval()
    with torch.no_grad():
        outputs = model(**processor(images=[Image.open(picture)], return_tensors="pt"))
    (everything,) = processor.post_process_object_detection(outputs, 0.0, [(80, 60)])
    exact = everything["scores"][3].item()
    folder = tmp_path / "drmm"
    shutil.copytree(drmm_folder, folder)
    path = folder / "preprocessor_config.json"
    for saved in (exact, [exact, exact]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"score_threshold": saved}))
        processor.score_threshold = saved
        (expected,) = processor.post_process_object_detection(outputs, None, [(80, 60)])
        assert main(["predict", str(folder), str(picture), "--output", str(tmp_path / "out"), "--json"]) == 0
        (record,) = json.loads(capsys.readouterr().out)
        assert len(record["boxes"]) == len(expected["scores"]) == 3


def test_tiles_find_at_least_as_much(drmm_folder, coco_folder, tmp_path, capsys):
    arguments = ["predict", str(drmm_folder), str(coco_folder / "val"), "--threshold", "0", "--json"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--tile", "48", "--batch-size", "3"]) == 0
    tiled = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    plain = json.loads(capsys.readouterr().out)
    for with_tiles, without in zip(tiled, plain, strict=True):
        best = max(entry["score"] for entry in with_tiles["boxes"])
        assert best >= max(entry["score"] for entry in without["boxes"]) - 1e-6
        assert {"box_scales", "objectness"} < with_tiles["boxes"][0].keys() and "query" not in with_tiles["boxes"][0]
    assert main([*arguments, "--tile", "48", "--density"]) == 2
    assert "--density is of one pass" in capsys.readouterr().err
    assert main([*arguments, "--tile", "48", "--tile-overlap", "1"]) == 2
    assert "tile_overlap is 1.0; the rule is at least 0 and below 1" in capsys.readouterr().err


def test_boxes_as_a_coco_file(model_folder, coco_folder, tmp_path):
    arguments = ["predict", str(model_folder), str(coco_folder / "val"), "--threshold", "0"]
    assert main([*arguments, "--output", str(tmp_path), "--coco", str(tmp_path / "mine.json")]) == 0
    records, content = (json.loads((tmp_path / name).read_text()) for name in ("predictions.json", "mine.json"))
    ids = [3, 8] if "drmm" in model_folder.name else [0, 1]
    assert content["categories"] == [{"id": ids[0], "name": "round"}, {"id": ids[1], "name": "square"}]
    assert [image["file_name"] for image in content["images"]] == [record["file"] for record in records]
    boxes = [(image_id, box) for image_id, record in enumerate(records, 1) for box in record["boxes"]]
    assert len({entry["id"] for entry in content["annotations"]}) == len(boxes) > 0
    for (image_id, box), entry in zip(boxes, content["annotations"], strict=True):
        left, top, width, height = entry["bbox"]
        assert [left, top, left + width, top + height] == pytest.approx(box["box"], abs=2e-3)
        assert (entry["image_id"], entry["score"]) == (image_id, box["score"])
        assert entry["category_id"] == ids[["round", "square"].index(box["label"])]


def test_a_film_is_written_with_its_boxes(drmm_folder, tmp_path, capsys):
    """A picture between two films keeps its place; frames are those that are asked for."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    for name in ("a.mp4", "b.mp4"):
        with film_writer(tmp_path / name, Fraction(10)) as add:
            for index in range(5):
                add(Image.fromarray(np.roll(pixels, 8 * index, axis=1)))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    places = [str(tmp_path / name) for name in ("a.mp4", "a.png", "b.mp4")]
    output = tmp_path / "out"
    arguments = ["predict", str(drmm_folder), *places, "--output", str(output), "--every", "2", "--batch-size", "2"]
    assert main([*arguments, "--threshold", "0", "--interval", "0.9"]) == 0
    said = capsys.readouterr().out
    first, picture, second = json.loads((output / "predictions.json").read_text())
    assert [record["file"] for record in (first, picture, second)] == places and "frames" not in picture
    assert [(frame["frame"], frame["seconds"]) for frame in first["frames"]] == [(0, 0), (2, 0.2), (4, 0.4)]
    assert all(frame["boxes"] and "box_intervals" in frame["boxes"][0] for frame in first["frames"])
    drawn = Film(first["drawn"])
    assert drawn.rate == 5 == first["frames_per_second"] and len(list(drawn)) == 3
    count = sum(len(frame["boxes"]) for frame in first["frames"])
    assert f"a.mp4 (80x60): {count} boxes in 3 frames" in said
    assert sorted(path.name for path in output.iterdir()) == ["a.jpg", "a.mp4", "b.mp4", "predictions.json"]
    for option in (["--density"], ["--coco", str(tmp_path / "mine.json")]):
        assert main([*arguments, *option]) == 2
        assert "leave out films" in capsys.readouterr().err
    (tmp_path / "b.mp4").write_bytes(b"no film")
    before = (output / "predictions.json").read_bytes()
    assert main(arguments) == 2
    assert "b.mp4 is no film that FFmpeg can read" in capsys.readouterr().err
    assert (output / "predictions.json").read_bytes() == before


def test_what_is_done_stays_when_a_film_is_damaged_later(drmm_folder, tmp_path, capsys, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        with film_writer(tmp_path / name, Fraction(10)) as add:
            add(Image.new("RGB", (80, 60)))

    def damaged(film):
        yield from frames(film)
        if "b.mp4" in film.name:
            raise ValueError(f"{film.name} is damaged after frame 0")

    frames = Film.__iter__
    monkeypatch.setattr(Film, "__iter__", damaged)
    output = tmp_path / "out"
    places = [str(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    assert main(["predict", str(drmm_folder), *places, "--output", str(output)]) == 2
    assert "b.mp4 is damaged after frame 0" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == ["a.mp4", "predictions.json"]
    (record,) = json.loads((output / "predictions.json").read_text())
    assert record["file"] == places[0]


def test_bad_pictures_among_good_ones_are_left_out_when_asked(drmm_folder, coco_folder, tmp_path, capsys):
    folder = tmp_path / "shots"
    shutil.copytree(coco_folder / "val", folder)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:3000])
    (folder / "3.png").write_bytes(b"")
    Image.fromarray(np.full((60, 80), 3000, dtype=np.uint16)).save(folder / "4.png")
    arguments = ["predict", str(drmm_folder), str(folder), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "3 of 5 pictures cannot be used" in said and "--invalid-data skip leaves them out" in said
    assert all(f"{folder / name}: " in said for name in ("1.png", "3.png", "4.png"))
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--invalid-data", "skip", "--json"]) == 0
    said = capsys.readouterr()
    records = json.loads(said.out)
    assert [record["file"] for record in records] == [str(folder / name) for name in ("0.png", "2.png")]
    assert said.err.startswith("left out, 3 of 5 pictures:\n") and "pixels of mode 'I;16'" in said.err
    assert main(["predict", str(drmm_folder), str(folder / "4.png"), "--invalid-data", "skip"]) == 2
    assert "1 of 1 pictures cannot be used" in capsys.readouterr().err
