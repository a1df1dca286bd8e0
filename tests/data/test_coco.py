import json
import logging
import os

import datasets
import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.data.coco import (
    FEATURES,
    canonical_dataset,
    categories,
    coco_paths,
    load_coco,
    load_detection_dataset,
    save_coco,
)


def rows_of(dataset):
    return list(dataset.remove_columns("image"))


# COCO files ----------------------------------------------------------------------------------------------------------


def test_ids_crowds_areas_and_order_are_untouched(coco_folder, content):
    folder, _ = coco_folder
    dataset = load_detection_dataset(folder, "val")
    assert dataset.features == FEATURES
    assert categories(dataset) == content["categories"]
    rows = rows_of(dataset)
    assert [(row["image_id"], row["file_name"], row["width"], row["height"]) for row in rows] == [
        (7, "b.png", 40, 30),
        (3, "sub/a.jpg", 20, 50),
        (11, "empty.png", 8, 8),
    ]
    assert rows[0]["objects"] == [
        {"id": 5, "category_id": 90, "bbox": [0.0, 0.0, 40.0, 30.0], "area": 600.0, "iscrowd": 1},
        {"id": 8, "category_id": 4, "bbox": [5.0, 6.0, 7.0, 8.0], "area": 56.0, "iscrowd": 0},
    ]
    assert rows[1]["objects"] == [
        {"id": 21, "category_id": 4, "bbox": [1.0, 2.0, 10.5, 20.0], "area": 99.5, "iscrowd": 0}
    ]
    assert rows[2]["objects"] == []
    assert dataset[0]["image"].size == (40, 30)


def test_pictures_are_decoded_on_access_only(coco_folder):
    folder, _ = coco_folder
    (folder / "val" / "b.png").write_bytes(b"not a picture")
    dataset = load_coco(folder / "annotations" / "instances_val.json", folder / "val")
    assert dataset[1]["image"].size == (20, 50)
    with pytest.raises(OSError, match="cannot identify"):
        dataset[0]


def test_categories_survive_what_datasets_does(coco_folder, tmp_path, content):
    folder, _ = coco_folder
    dataset = load_detection_dataset(folder, "val")
    dataset.save_to_disk(tmp_path / "saved")
    derived = [
        dataset.select([1]),
        dataset.shuffle(seed=0),
        dataset.filter(lambda objects: len(objects) > 0, input_columns="objects"),
        dataset.map(lambda width: {"width": width + 1}, input_columns="width"),
        dataset.cast_column("image", datasets.Image(decode=False)),
        datasets.concatenate_datasets([dataset, dataset]),
        load_from_disk(tmp_path / "saved"),
    ]
    for other in derived:
        assert categories(other) == content["categories"]
    with pytest.raises(ValueError, match="carries no categories"):
        categories(Dataset.from_dict({"a": [1]}))


@pytest.mark.parametrize("place", ["val", "images/val", "images", ""])
def test_every_usual_place_of_the_pictures(tmp_path, coco_folder, place):
    folder, _ = coco_folder
    pictures = folder / "val"
    if place == "":
        for path in pictures.iterdir():
            path.rename(folder / path.name)
        pictures.rmdir()
    elif place != "val":
        (folder / "images").mkdir()
        if place == "images":
            (folder / "images").rmdir()
        pictures.rename(folder / place)
    annotation_file, image_dir = coco_paths(folder, "val")
    assert image_dir == folder / place
    assert len(load_detection_dataset(str(folder), "val")) == 3


def test_json_and_folder_pair(coco_folder, tmp_path):
    folder, _ = coco_folder
    elsewhere = tmp_path / "elsewhere" / "my.json"
    elsewhere.parent.mkdir()
    os.rename(folder / "annotations" / "instances_val.json", elsewhere)
    dataset = load_detection_dataset(folder, "whatever", annotations=elsewhere, images=folder / "val")
    assert len(dataset) == 3
    with pytest.raises(ValueError, match="give annotations as well"):
        load_detection_dataset(folder, "val", images=folder / "val")
    with pytest.raises(FileNotFoundError, match=r"my\.json: picture 'b\.png' is in none of .*train"):
        load_detection_dataset(folder, "train", annotations=elsewhere)


def test_unknown_split_lists_the_known_ones(coco_folder):
    folder, _ = coco_folder
    with pytest.raises(ValueError, match=r"split 'test' is not in .*: it has \['val'\]"):
        load_detection_dataset(folder, "test")


def test_arguments_of_other_sources_are_refused(coco_folder):
    folder, _ = coco_folder
    with pytest.raises(ValueError, match="bbox_format does not apply"):
        load_detection_dataset(folder, "val", bbox_format="xyxy")
    with pytest.raises(ValueError, match="categories does not apply"):
        load_detection_dataset(folder, "val", categories=[])


@pytest.mark.parametrize(("name", "asked"), [("val2017", "val"), ("valid", "validation"), ("val", "val2017")])
def test_usual_names_of_a_split_are_the_same(coco_folder, name, asked):
    folder, _ = coco_folder
    (folder / "annotations" / "instances_val.json").rename(folder / "annotations" / f"instances_{name}.json")
    assert len(load_detection_dataset(folder, asked)) == 3  # the pictures are in val still
    assert coco_paths(folder, asked) == (folder / "annotations" / f"instances_{name}.json", folder / "val")
    for unknown in ("test", "test-dev2017", "train2017", "va"):
        with pytest.raises(ValueError, match=rf"split {unknown!r} is not in .*: it has \['{name}'\]"):
            load_detection_dataset(folder, unknown)


def test_two_splits_of_one_usual_name_must_be_told_apart(coco_folder, content):
    folder, _ = coco_folder
    for name in ("val2014", "val2017"):
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    assert len(load_detection_dataset(folder, "val2014")) == 3
    with pytest.raises(ValueError, match=r"it has \['val', 'val2014', 'val2017'\]"):
        load_detection_dataset(folder, "validation")


def roboflow(folder, content, names, supercategory="project"):
    """Turn the COCO folder into an export of Roboflow with the given categories."""
    (folder / "val").rename(folder / "valid")
    records = [{"id": 0, "name": "project", "supercategory": "none"}]
    records += [{"id": number, "name": name, "supercategory": supercategory} for number, name in names.items()]
    text = json.dumps(content | {"categories": records})
    (folder / "valid" / "_annotations.coco.json").write_text(text)
    (folder / "annotations" / "instances_val.json").unlink()


def test_roboflow_folders_lose_the_category_that_names_the_project(coco_folder, content, caplog):
    folder, _ = coco_folder
    roboflow(folder, content, {90: "crab", 4: "newt"})
    with caplog.at_level(logging.WARNING, logger="drmm_hf"):
        dataset = load_detection_dataset(folder, "val")
    assert categories(dataset) == content["categories"]
    assert "category 0 ('project') is the name of the project" in caplog.text
    assert [row["image_id"] for row in rows_of(dataset)] == [7, 3, 11]
    assert dataset[0]["image"].size == (40, 30)
    assert coco_paths(folder, "val") is None  # figures are measured against the classes that there are
    with pytest.raises(ValueError, match=r"it has \['valid'\]"):
        load_detection_dataset(folder, "test")


@pytest.mark.parametrize("case", ["used", "other supercategory", "alone"])
def test_a_category_of_roboflow_that_is_a_class_stays(coco_folder, content, case):
    names = {} if case == "alone" else {90: "crab", 4: "newt"}
    if case == "used":
        content["annotations"][0]["category_id"] = 0
    if case == "alone":
        content["annotations"] = []
    folder, _ = coco_folder
    roboflow(folder, content, names, "animal" if case == "other supercategory" else "project")
    assert [record["id"] for record in categories(load_detection_dataset(folder, "valid"))] == [0, *names]


BROKEN = {
    "unknown image": (("annotations", 1, "image_id", 99), r"annotations\[1\] \(id 5\): image_id 99 is not among"),
    "image id missing": (("annotations", 1, "image_id", None), r"annotations\[1\].*image_id is None"),
    "unknown category": (
        ("annotations", 0, "category_id", 1),
        r"annotations\[0\] \(id 21\): category_id 1 .*\[4, 90\]",
    ),
    "three numbers": (("annotations", 2, "bbox", [1, 2, 3]), r"annotations\[2\] \(id 8\): bbox is \[1, 2, 3\]"),
    "nan": (
        ("annotations", 2, "bbox", [1, 2, 3, float("nan")]),
        r"annotations\[2\] \(id 8\): bbox .* 4 finite numbers",
    ),
    "infinite": (
        ("annotations", 2, "bbox", [1, 2, 3, float("inf")]),
        r"annotations\[2\] \(id 8\): bbox .* 4 finite numbers",
    ),
    "text": (("annotations", 2, "bbox", [1, 2, 3, "4"]), r"annotations\[2\] \(id 8\): bbox .* 4 finite numbers"),
    "no box": (("annotations", 2, "bbox", None), r"annotations\[2\] \(id 8\): bbox is None"),
    "area": (("annotations", 2, "area", "big"), r"annotations\[2\] \(id 8\): area is 'big'"),
    "crowd flag": (("annotations", 2, "iscrowd", 2), r"annotations\[2\] \(id 8\): iscrowd is 2, must be 0 or 1"),
    "annotation id twice": (("annotations", 2, "id", 5), r"annotations\[2\] \(id 5\): the id is taken by .*\[1\]"),
    "annotation id missing": (("annotations", 2, "id", None), r"annotations\[2\] \(id None\): id is None"),
    "image id twice": (("images", 1, "id", 7), r"images\[1\] \(id 7\): the id is taken by 'b.png'"),
    "image id text": (("images", 1, "id", "a"), r"images\[1\] \(id 'a'\): id is 'a', must be an integer"),
    "no width": (("images", 1, "width", None), r"images\[1\] \(id 3\): width is None"),
    "no height": (("images", 1, "height", 0), r"images\[1\] \(id 3\): height is 0, must be at least 1"),
    "no name": (("images", 1, "file_name", None), r"images\[1\] \(id 3\): file_name is None"),
    "category id twice": (("categories", 1, "id", 90), r"categories\[1\]: id 90 is taken by 'crab'"),
    "category name": (("categories", 1, "name", 3), r"categories\[1\]: name is 3"),
    "not a record": (("annotations", 1, None, 5), r"annotations\[1\]: 5 must be an object"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_the_file_and_the_annotation(coco_folder, content, case):
    (section, position, key, value), message = BROKEN[case]
    if key is None:
        content[section][position] = value
    else:
        content[section][position][key] = value
    folder = coco_folder[1](content)
    with pytest.raises(ValueError, match=r"instances_val\.json: " + message):
        load_detection_dataset(folder, "val")


def test_bad_files(coco_folder, content):
    folder, write = coco_folder
    path = folder / "annotations" / "instances_val.json"
    for text, message in [("{", "not valid json"), ("[]", "no list 'images'"), ('{"images": []}', "no list 'annot")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"instances_val\.json.*{message}"):
            load_detection_dataset(folder, "val")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not valid json"):
        load_detection_dataset(folder, "val")
    path.write_text(json.dumps(content), encoding="utf-8-sig")  # as Windows' editors save it
    assert len(load_detection_dataset(folder, "val")) == len(content["images"])
    write(content | {"categories": []})
    with pytest.raises(ValueError, match="categories is empty"):
        load_detection_dataset(folder, "val")
    with pytest.raises(FileNotFoundError, match=r"nothing\.json does not exist"):
        load_coco(folder / "nothing.json", folder)


def test_missing_pictures_are_counted_and_named(coco_folder):
    folder, _ = coco_folder
    (folder / "val" / "sub" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"pictures that do not exist: 1\n.*'sub/a\.jpg' \(image 3\)"):
        load_detection_dataset(folder, "val")


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/hostname"])
def test_file_names_cannot_leave_the_folder(coco_folder, content, name):
    content["images"][1]["file_name"] = name
    folder = coco_folder[1](content)
    Image.new("RGB", (20, 50)).save(folder / "secret.png")
    with pytest.raises(ValueError, match=r"images\[1\] \(id 3\): file_name .* leaves the image folder"):
        load_detection_dataset(folder, "val")
    dataset = one_picture_named(name)
    with pytest.raises(ValueError, match="leaves the image folder"):
        save_coco(dataset, folder / "out", "val")


def one_picture_named(name):
    row = {"image_id": 1, "file_name": name, "image": Image.new("RGB", (4, 4)), "width": 4, "height": 4, "objects": []}
    return canonical_dataset([row], [{"id": 1, "name": "a"}])


@pytest.mark.parametrize("bbox", [[5, 6, 0, 8], [5, 6, 7, -1], [40, 0, 5, 5], [-9, 0, 9, 9]])
def test_boxes_without_area_are_an_error_or_counted(coco_folder, content, caplog, bbox):
    content["annotations"][2]["bbox"] = bbox
    folder = coco_folder[1](content)
    with pytest.raises(ValueError, match=r"inside their picture: 1\n.*annotations\[2\] \(id 8\)"):
        load_detection_dataset(folder, "val")
    with caplog.at_level(logging.WARNING, logger="drmm_hf"):
        dataset = load_detection_dataset(folder, "val", invalid="skip")
    assert [item["id"] for row in rows_of(dataset) for item in row["objects"]] == [5, 21]
    assert "inside their picture: 1" in caplog.text
    with pytest.raises(ValueError, match="invalid is 'drop'"):
        load_detection_dataset(folder, "val", invalid="drop")


def test_boxes_that_overshoot_a_little_are_kept_as_they_are(coco_folder, content):
    content["annotations"][2]["bbox"] = [-0.5, -1, 41, 32]
    folder = coco_folder[1](content)
    assert rows_of(load_detection_dataset(folder, "val"))[0]["objects"][1]["bbox"] == [-0.5, -1.0, 41.0, 32.0]


finite = st.floats(-1000, 1000, allow_nan=False)
areas = st.floats(0, 1000)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(
            st.tuples(finite, finite, st.floats(1e-3, 900), st.floats(1e-3, 900), st.integers(0, 1), areas),
            max_size=4,
        ),
        max_size=3,
    ),
    st.randoms(use_true_random=False),
)
def test_saved_folder_reads_back_bit_equal(tmp_path, pictures, random):
    ids = iter(random.sample(range(1, 10**12), 50))
    rows = [
        {
            "image_id": next(ids),
            "file_name": f"deep/{position}.png",
            "image": Image.new("RGB", (9, 7), (position, 0, 0)),
            "width": 9,
            "height": 7,
            "objects": [
                {
                    "id": next(ids),
                    "category_id": random.choice([90, 4]),
                    "bbox": [min(x, 8.0), min(y, 6.0), w + max(0, -x), h + max(0, -y)],
                    "area": area,
                    "iscrowd": crowd,
                }
                for x, y, w, h, crowd, area in items
            ],
        }
        for position, items in enumerate(pictures)
    ]
    names = [{"id": 90, "name": "crab"}, {"id": 4, "name": "newt"}]
    dataset = canonical_dataset(rows, names)
    save_coco(dataset, tmp_path, "part")
    again = load_detection_dataset(tmp_path, "part")
    assert rows_of(again) == rows_of(dataset)
    assert categories(again) == names
    for first, second in zip(dataset, again, strict=True):
        assert np.array_equal(np.asarray(first["image"]), np.asarray(second["image"]))


def test_saved_folder_is_what_pycocotools_reads(coco_folder, tmp_path, content):
    from pycocotools.coco import COCO

    dataset = load_detection_dataset(coco_folder[0], "val")
    path = save_coco(dataset, tmp_path / "copy", "test")
    assert path == tmp_path / "copy" / "annotations" / "instances_test.json"
    truth = COCO(str(path))
    assert {image["id"] for image in truth.loadImgs(truth.getImgIds())} == {7, 3, 11}
    assert truth.loadAnns(21)[0] == {"image_id": 3} | rows_of(dataset)[1]["objects"][0]
    assert truth.getCatIds() == [90, 4]
    original, copied = (root / "sub" / "a.jpg" for root in (coco_folder[0] / "val", tmp_path / "copy" / "test"))
    assert original.read_bytes() == copied.read_bytes()


def test_equal_file_names_are_not_overwritten(tmp_path):
    dataset = one_picture_named("a.png")
    with pytest.raises(ValueError, match=r"'a.png' \(image 1\) occurs twice"):
        save_coco(datasets.concatenate_datasets([dataset, dataset]), tmp_path, "val")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("bbox", [0, 0, 10**400, 5], "4 finite numbers"),
        ("area", -3.0, "at least 0"),
        ("id", 2**63, "64 bits"),
    ],
)
def test_numbers_that_no_column_holds_are_named(coco_folder, content, key, value, words):
    folder, write = coco_folder
    content["annotations"][0][key] = value
    write(content)
    with pytest.raises(ValueError, match=rf"annotations\[0\].*{words}"):
        load_coco(folder / "annotations" / "instances_val.json", folder / "val")
