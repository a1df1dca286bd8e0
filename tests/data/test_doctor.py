import json
import shutil
from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.data.coco import load_detection_dataset, save_coco
from drmm_hf.data.doctor import examine
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.loading import load_image
from drmm_hf.data.pictures import inspect_picture
from drmm_hf.data.problems import KINDS


@pytest.fixture
def shapes(tmp_path):
    """A COCO folder of generated pictures, 5 to train and 2 to validate."""
    for seed, (split, count) in enumerate({"train": 5, "val": 2}.items()):
        save_coco(generate_shapes(count, seed, image_size=(48, 64)), tmp_path, split)
    return tmp_path


def rewrite(folder, split, do):
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    do(content)
    path.write_text(json.dumps(content))


def kinds(report, split):
    return {kind: entry["count"] for kind, entry in report["splits"][split]["problems"].items()}


def test_figures_are_those_of_the_annotations(shapes):
    """The oracle reads the json itself."""
    rewrite(shapes, "train", lambda c: c["annotations"][0].update(iscrowd=1))
    rewrite(shapes, "train", lambda c: c["annotations"].append(c["annotations"][1] | {"id": 10**6}))
    rewrite(shapes, "train", lambda c: c["images"].append({"id": 99, "file_name": "e.png", "width": 9, "height": 7}))
    Image.new("L", (9, 7)).save(shapes / "train" / "e.png")
    report = examine(shapes, num_queries=4)
    assert report["num_problems"] == 0 and report["layout"] == "COCO" and list(report["splits"]) == ["train", "val"]
    assert json.loads(json.dumps(report)) == report
    part = report["splits"]["train"]
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    real = [record for record in content["annotations"] if not record["iscrowd"]]
    per_picture = Counter(record["image_id"] for record in real)
    names = {record["id"]: record["name"] for record in content["categories"]}
    assert part["classes"] == {n: sum(names[r["category_id"]] == n for r in real) for n in names.values()}
    assert (part["pictures"], part["boxes"], part["crowds"], part["empty_pictures"]) == (6, len(real), 1, 1)
    assert part["small_boxes"] == sum(record["area"] < 1024 for record in real)
    assert part["small_boxes"] + part["medium_boxes"] + part["large_boxes"] == len(real)
    assert part["boxes_per_picture"]["max"] == max(per_picture.values())
    assert part["boxes_per_picture"]["median"] == np.median([*per_picture.values(), 0])
    assert part["identical_boxes"] == 1
    beyond = [image_id for image_id, count in per_picture.items() if count > 4]
    files = {record["id"]: record["file_name"] for record in content["images"]}
    assert sorted(part["beyond_queries"]["pictures"]) == sorted(files[image_id] for image_id in beyond)
    assert part["beyond_queries"]["boxes"] == sum(per_picture[image_id] - 4 for image_id in beyond)
    assert part["modes"] == {"L": 1, "RGB": 5} and part["heights"]["min"] == 7 and part["widths"]["max"] == 64
    notes = "\n".join(report["notes"])
    assert f"train: {len(beyond)} pictures have more than 4 boxes" in notes
    assert "1 boxes repeat another" in notes and "not RGB, and are converted: 1 L" in notes


def test_problems_of_records_files_and_pixels_come_in_one_pass(shapes):
    pictures = sorted((shapes / "train").iterdir())
    pictures[0].write_bytes(b"no picture")
    pictures[1].write_bytes(pictures[1].read_bytes()[:300])
    pictures[2].unlink()

    def spoil(content):
        content["images"][3]["width"] += 1
        content["annotations"][-1]["bbox"] = [0, 0, 0, 5]
        content["annotations"][-2]["category_id"] = 1

    rewrite(shapes, "train", spoil)
    report = examine(shapes)
    assert kinds(report, "train") == {
        "unreadable_picture": 2, "missing_picture": 1, "wrong_size": 1, "box_without_area": 1, "unknown_category": 1
    }  # fmt: skip
    assert kinds(report, "val") == {} and report["num_problems"] == 6
    assert set(kinds(report, "train")) <= set(KINDS)


def test_what_the_loader_leaves_out_is_what_the_doctor_counts(shapes):
    """Except for pictures that only decoding finds out about, of which there is none here."""

    def spoil(content):
        content["annotations"][-1]["bbox"] = [0, 0, 0, 5]
        content["annotations"][-2]["image_id"] = 77
        content["images"].append(content["images"][0] | {"file_name": "other.png"})

    rewrite(shapes, "train", spoil)
    from drmm_hf.data.canonical import left_out

    dataset = load_detection_dataset(shapes, "train", invalid="skip")
    counts = {kind: entry["count"] for kind, entry in left_out(dataset).items()}
    assert counts == kinds(examine(shapes), "train") and len(counts) == 3
    assert examine(shapes)["splits"]["train"]["pictures"] == len(dataset) == 4


@pytest.mark.parametrize("way", ["copied", "saved again"])
def test_leaks_are_problems_and_repetitions_notes(shapes, way):
    first, second = sorted((shapes / "train").iterdir())[:2]
    for source, target in ((first, shapes / "val" / "000002.png"), (second, shapes / "train" / "000005.png")):
        if way == "copied":
            shutil.copyfile(source, target)
        else:  # other bytes, the same pixels
            Image.open(source).save(target, compress_level=9)
            assert source.read_bytes() != target.read_bytes()
    report = examine(shapes)
    assert kinds(report, "val") == {"leaked_picture": 1} and kinds(report, "train") == {}
    (message,) = report["splits"]["val"]["problems"]["leaked_picture"]["first"]
    assert message == "val: '000002.png' (image 2): has the pixels of '000001.png' in train"
    assert report["splits"]["train"]["duplicates"] == [["000002.png", "000005.png"]]
    assert "train: 1 pictures repeat the pixels of another: 000002.png = 000005.png" in report["notes"]


def test_a_split_that_cannot_be_read_does_not_hide_the_others(shapes):
    (shapes / "annotations" / "instances_test.json").write_text("{")
    rewrite(shapes, "val", lambda c: c["categories"].append({"id": 50, "name": "circle"}))
    report = examine(shapes)
    assert kinds(report, "test") == {"unreadable_annotations": 1} and kinds(report, "train") == {}
    assert kinds(report, "val") == {"other_categories": 1}
    assert "pictures" not in report["splits"]["test"] and report["splits"]["val"]["pictures"] == 2
    assert list(examine(shapes, ["validation"])["splits"]) == ["val"]
    with pytest.raises(ValueError, match="split 'extra' is not in"):
        examine(shapes, ["extra"])


def test_classes_without_boxes_or_in_one_split_are_named(shapes):
    def keep(*ids):
        def do(content):
            content["annotations"] = [r for r in content["annotations"] if r["category_id"] in ids]

        return do

    rewrite(shapes, "train", keep(2, 3))
    rewrite(shapes, "val", keep(3, 7))
    notes = examine(shapes)["notes"]
    assert "train: no boxes of triangle, which cannot be learnt" in notes
    assert "val: no boxes of ellipse, whose AP is not defined here" in notes
    assert "train: the only split with boxes of ellipse" in notes
    assert "val: the only split with boxes of triangle" in notes


def test_turned_pictures_fit_either_way(shapes):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = shapes / "val" / "000001.png"
    Image.open(path).save(path, exif=exif)
    report = examine(shapes, ["val"])
    assert report["num_problems"] == 0 and report["splits"]["val"]["turned"] == 1
    assert any("EXIF turns or mirrors 1 pictures" in note for note in report["notes"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["RGB", "L", "CMYK", "P", "RGBA", "1", "I;16", "F"]),
    st.sampled_from(["jpeg", "png", "tiff", "webp", "gif"]),
    st.sampled_from([None, 1, 3, 6]),
    st.sampled_from([(24, 16), (16, 24), (24, 17)]),
    st.floats(0, 1),
)
def test_training_reads_what_the_doctor_finds_well(tmp_path, mode, kind, orientation, size, kept):
    """A picture passes exactly when `load_image` takes it, however it is stored, turned or cut."""
    pixels = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode in ("I;16", "F") else mode)
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert("F") if mode == "F" else image
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    try:
        image.save(path, exif=exif)
    except (OSError, ValueError, KeyError):  # this format has no such mode
        return
    content = path.read_bytes()
    path.write_bytes(content if kept > 0.5 else content[: int(2 * kept * len(content))])
    stored = {"bytes": None, "path": str(path)}
    found = inspect_picture(stored, *size, decode=True)
    quick = inspect_picture(stored, *size, decode=False)
    try:
        load_image({"image_id": 1, "file_name": "a", "image": stored, "width": size[0], "height": size[1]})
        good = True
    except (OSError, ValueError, SyntaxError):
        good = False
    assert (found.problem is None) == good
    assert (quick.problem is None) == good and quick.problem == found.problem


def test_tables_of_datasets_are_examined_too(tmp_path):
    shapes = generate_shapes(3, 0, image_size=(48, 64))
    names = datasets.ClassLabel(names=["ellipse", "rectangle", "triangle"])
    labels = {2: 0, 3: 1, 7: 2}
    rows = [
        {
            "image": row["image"],
            "objects": [
                {"bbox": item["bbox"], "category": labels[item["category_id"]], "area": item["area"]}
                for item in row["objects"]
            ],
        }
        for row in shapes
    ]
    fields = {
        "bbox": datasets.List(datasets.Value("float64")),
        "category": names,
        "area": datasets.Value("float64"),
    }
    features = datasets.Features({"image": datasets.Image(), "objects": datasets.List(fields)})
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    report = examine(tmp_path, bbox_format="xywh")
    assert report["layout"] == "datasets" and report["num_problems"] == 0
    assert report["splits"]["train"]["boxes"] == sum(len(row["objects"]) for row in shapes)
