import json
import logging

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.data.canonical import FEATURES, categories, left_out
from drmm_hf.data.coco import load_detection_dataset


WIDTH, HEIGHT = 40, 20


@pytest.fixture
def folder(tmp_path):
    """A split of three pictures: two boxes, an empty label file, no label file."""
    root = tmp_path / "data"
    write(root, "train", "a.png", "1 0.5 0.5 0.5 0.25\n0 0.1 0.2 0.1 0.2\n")
    write(root, "train", "b.png", "")
    write(root, "train", "deep/c.png", None)
    describe(root, train="images/train", names=["newt", "crab"])
    return root


def write(root, split, name, text):
    picture = root / "images" / split / name
    label = (root / "labels" / split / name).with_suffix(".txt")
    for path in (picture, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(picture)
    if text is not None:
        label.write_text(text)


def describe(root, **content):
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def rows_of(dataset):
    return list(dataset.remove_columns("image"))


def test_boxes_are_fractions_around_their_centre(folder):
    dataset = load_detection_dataset(folder, "train")
    assert dataset.features == FEATURES
    assert categories(dataset) == [{"id": 0, "name": "newt"}, {"id": 1, "name": "crab"}]
    rows = rows_of(dataset)
    assert [row["file_name"] for row in rows] == [f"images/train/{name}" for name in ("a.png", "b.png", "deep/c.png")]
    assert {(row["width"], row["height"]) for row in rows} == {(WIDTH, HEIGHT)}
    first, second = rows[0]["objects"]
    assert first == {"id": 1, "category_id": 1, "bbox": [10.0, 7.5, 20.0, 5.0], "area": 100.0, "iscrowd": 0}
    assert second["bbox"] == pytest.approx([2, 2, 4, 4]) and second["category_id"] == 0
    assert rows[1]["objects"] == rows[2]["objects"] == []
    assert dataset[0]["image"].size == (WIDTH, HEIGHT)


def test_names_may_be_a_mapping_and_the_file_may_be_the_source(folder):
    describe(folder, train="images/train", names={7: "crab", 1: "newt", 0: "asp"})
    (folder / "data.yaml").rename(folder / "mine.yaml")
    dataset = load_detection_dataset(folder / "mine.yaml", "train")
    assert categories(dataset) == [{"id": 0, "name": "asp"}, {"id": 1, "name": "newt"}, {"id": 7, "name": "crab"}]


@pytest.mark.parametrize(
    "place",
    [
        "images/train",
        "./images/train",
        "../images/train",  # as Roboflow writes it
        ["images/train/deep", "images/train"],
        "list.txt",
        ["list.txt", "images/train/deep"],
    ],
    ids=str,
)
def test_a_split_is_a_folder_a_list_of_them_or_a_file(folder, place):
    (folder / "list.txt").write_text(
        "./images/train/a.png\nimages/train/b.png\n\n" + str(folder / "images/train/deep/c.png")
    )
    describe(folder, train=place, names=["newt", "crab"])
    rows = rows_of(load_detection_dataset(folder, "train"))
    assert sorted(row["file_name"][-5:] for row in rows) == ["a.png", "b.png", "c.png"]
    assert sum(len(row["objects"]) for row in rows) == 2


@pytest.mark.parametrize("place", ["inside", "elsewhere", "missing"])
def test_path_is_the_root_where_it_lies_in_the_folder(folder, tmp_path, place, caplog):
    (tmp_path / "elsewhere").mkdir()
    if place == "inside":
        (folder / "images").rename(folder / "moved")
        (folder / "set").mkdir()
        (folder / "moved").rename(folder / "set" / "images")
        (folder / "labels").rename(folder / "set" / "labels")
    path = {"inside": "set", "elsewhere": str(tmp_path / "elsewhere"), "missing": "/content/datasets/mine"}[place]
    describe(folder, path=path, train="images/train", names=["newt", "crab"])
    with caplog.at_level(logging.WARNING, logger="drmm_hf"):
        assert len(load_detection_dataset(folder, "train")) == 3
    assert ("is no folder within" in caplog.text) == (place != "inside")
    describe(folder, path=path, train="images/other", names=["newt", "crab"])
    with pytest.raises((ValueError, FileNotFoundError), match="images/other|move the file to the data"):
        load_detection_dataset(folder, "train")


def test_polygons_become_their_bounds_with_the_area_inside(folder):
    (folder / "labels" / "train" / "a.txt").write_text("1 0.25 0.5 0.75 0.5 0.25 1\n")
    (item,) = rows_of(load_detection_dataset(folder, "train"))[0]["objects"]
    assert item["bbox"] == [10.0, 10.0, 20.0, 10.0]
    assert item["area"] == 100.0  # half of it: a triangle


BROKEN = {
    "text": ("1 0.5 left 0.5 0.5", "bad_record", "must be numbers"),
    "five numbers": ("1 0.5 0.5 0.5 0.5 0.9", "bad_record", "has 5 numbers after the class"),
    "half a class": ("1.5 0.5 0.5 0.5 0.5", "bad_record", "category_id is 1.5"),
    "unknown class": ("2 0.5 0.5 0.5 0.5", "unknown_category", r"category_id 2 is not among the categories \[0, 1\]"),
    "nan": ("1 nan 0.5 0.5 0.5", "box_not_finite", "must be 4 finite numbers"),
    "empty": ("1 0.5 0.5 0 0.5", "box_without_area", "in a picture of 40 x 20"),
    "pixels": ("1 200 100 20 30", "box_without_area", "in a picture of 40 x 20"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_lines_are_named_or_left_out(folder, case):
    line, kind, message = BROKEN[case]
    (folder / "labels" / "train" / "a.txt").write_text(f"0 0.1 0.2 0.1 0.2\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"labels/train/a\.txt, line 3: .*{message}"):
        load_detection_dataset(folder, "train")
    dataset = load_detection_dataset(folder, "train", invalid="skip")
    assert [len(row["objects"]) for row in rows_of(dataset)] == [1, 0, 0]
    assert {name: entry["count"] for name, entry in left_out(dataset).items()} == {kind: 1}


def test_bad_pictures_and_labels_are_left_out(folder):
    (folder / "images" / "train" / "b.png").write_bytes(b"")
    (folder / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe")
    (folder / "list.txt").write_text(
        "images/train/a.png\nimages/train/b.png\nimages/gone.png\n../x.png\n/etc/hostname\n"
    )
    describe(folder, train=["list.txt", "images/train"], names=["newt", "crab"])
    dataset = load_detection_dataset(folder, "train", invalid="skip")
    assert [row["file_name"] for row in rows_of(dataset)] == ["images/train/deep/c.png"]
    counts = {name: entry["count"] for name, entry in left_out(dataset).items()}
    assert counts == {
        "unreadable_annotations": 1, "unreadable_picture": 1, "missing_picture": 1, "outside_folder": 2
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"file names that leave the data folder: 2"):
        load_detection_dataset(folder, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"names": ["a"]}, "names no split"),
        ({"train": "images/train"}, "names is None"),
        ({"train": "images/train", "names": ["a"], "nc": 2}, "nc is 2, but names has 1"),
        ({"train": "images/train", "names": {"a": 1}}, "must be integers"),
        ({"train": "../../etc", "names": ["a"]}, "leaves the data folder"),
        ({"train": "/etc", "names": ["a"]}, "leaves the data folder"),
        ({"path": "/etc", "train": "ssl", "names": ["a"]}, "move the file to the data"),
    ],
)
def test_what_a_data_yaml_must_say(folder, content, message):
    describe(folder, **content)
    with pytest.raises(ValueError, match=message):
        load_detection_dataset(folder, "train")


def test_labels_in_the_wrong_place_are_no_set_of_empty_pictures(folder):
    (folder / "labels").rename(folder / "annotations")
    with pytest.raises(ValueError, match=r"none of the 3 pictures has labels, such as .*labels/train/a\.txt"):
        load_detection_dataset(folder, "train")


def test_links_are_followed(folder, tmp_path):
    for name in ("images", "labels"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert len(load_detection_dataset(folder, "train")) == 3


fraction = st.integers(1, 999).map(lambda number: number / 1000)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1), fraction, fraction, fraction, fraction), min_size=1, max_size=5))
def test_yolo_and_coco_of_the_same_boxes_agree(tmp_path, boxes):
    """The oracle is the definition: corners of a box as fractions, written to both formats."""
    objects, lines = [], []
    for number, left, top, width, height in boxes:
        right, bottom = min(1, left + width), min(1, top + height)
        lines.append(f"{number} {(left + right) / 2!r} {(top + bottom) / 2!r} {right - left!r} {bottom - top!r}")
        bbox = [left * WIDTH, top * HEIGHT, (right - left) * WIDTH, (bottom - top) * HEIGHT]
        objects.append({"id": len(objects), "image_id": 1, "category_id": number, "bbox": bbox})
    root = tmp_path / "data"
    write(root, "train", "a.png", "\n".join(lines))
    describe(root, train="images/train", names=["newt", "crab"])
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": objects,
        "categories": [{"id": 0, "name": "newt"}, {"id": 1, "name": "crab"}],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    truth = load_detection_dataset(tmp_path, "x", annotations=path, images=root / "images" / "train")
    found = load_detection_dataset(root, "train")
    assert categories(found) == categories(truth)
    (found,), (truth,) = rows_of(found), rows_of(truth)
    assert [item["category_id"] for item in found["objects"]] == [item["category_id"] for item in truth["objects"]]
    for key in ("bbox", "area"):
        values = [np.array([item[key] for item in row["objects"]]) for row in (found, truth)]
        assert np.allclose(*values, atol=1e-9)
