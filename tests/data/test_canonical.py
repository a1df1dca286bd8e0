import copy
import json
import logging
import multiprocessing
import os
import pickle

import datasets
import numpy as np
import pytest
from datasets.table import MemoryMappedTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.data import canonical, coco
from drmm_hf.data.canonical import Records, categories, check_records, leaves_folder, left_out
from drmm_hf.data.coco import load_detection_dataset
from drmm_hf.data.problems import KINDS, Problems


# The policy ----------------------------------------------------------------------------------------------------------


def change(section, position, **fields):
    return lambda content, folder: content[section][position].update(fields)


def add(section, **record):
    return lambda content, folder: content[section].append(record)


def unlink(content, folder):
    (folder / "val" / "b.png").unlink()


def cut(content, folder):
    path = folder / "val" / "sub" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def garble(content, folder):
    (folder / "val" / "b.png").write_bytes(b"not a picture")


def deepen(content, folder):
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(folder / "val" / "b.png")


BOX = {"id": 99, "image_id": 3, "category_id": 4, "bbox": [1, 1, 2, 2]}
# what is done -> (kind, annotations that remain); of 21 in image 3, and 5 and 8 in image 7
CASES = {
    "record": (change("annotations", 0, area="x"), "bad_record", [5, 8]),
    "record of a picture": (change("images", 0, width=None), "bad_record", [21]),
    "folder left": (change("images", 0, file_name="../b.png"), "outside_folder", [21]),
    "picture missing": (unlink, "missing_picture", [21]),
    "picture empty": (lambda c, f: (f / "val" / "b.png").write_bytes(b""), "unreadable_picture", [21]),
    "no picture": (garble, "unreadable_picture", [21]),
    "picture cut": (cut, "unreadable_picture", [5, 8]),
    "16 bits": (deepen, "unsupported_picture", [21]),
    "size": (change("images", 0, width=41), "wrong_size", [21]),
    "image listed twice": (
        add("images", id=7, file_name="b.png", width=40, height=30),
        "duplicate_image_id",
        [5, 8, 21],
    ),
    "image id taken": (add("images", id=7, file_name="empty.png", width=8, height=8), "duplicate_image_id", [21]),
    "annotation id": (add("annotations", **BOX | {"id": 5}), "duplicate_annotation_id", [5, 8, 21]),
    "unknown image": (add("annotations", **BOX | {"image_id": 12}), "unknown_image", [5, 8, 21]),
    "unknown category": (add("annotations", **BOX | {"category_id": 0}), "unknown_category", [5, 8, 21]),
    "infinite in float32": (add("annotations", **BOX | {"bbox": [1, 1, 1e200, 2]}), "box_not_finite", [5, 8, 21]),
    "nan": (add("annotations", **BOX | {"bbox": [1, 1, float("nan"), 2]}), "box_not_finite", [5, 8, 21]),
    "empty box": (add("annotations", **BOX | {"bbox": [1, 1, 0, 2]}), "box_without_area", [5, 8, 21]),
    "inverted box": (add("annotations", **BOX | {"bbox": [9, 9, -3, 2]}), "box_without_area", [5, 8, 21]),
    "box outside": (add("annotations", **BOX | {"bbox": [20, 0, 5, 5]}), "box_without_area", [5, 8, 21]),
}
PIXELS = ("no picture", "picture cut", "16 bits", "size")  # noticed when pictures are opened


@pytest.mark.parametrize("case", CASES)
def test_each_kind_is_an_error_or_left_out_and_counted(coco_folder, content, case, caplog):
    do, kind, remain = CASES[case]
    folder, write = coco_folder
    do(content, folder)
    write(content)
    if case in PIXELS:
        assert len(load_detection_dataset(folder, "val")) == 3
    else:
        with pytest.raises((ValueError, FileNotFoundError), match=rf"{KINDS[kind][0]}: 1\n"):
            load_detection_dataset(folder, "val")
    with caplog.at_level(logging.WARNING, logger="drmm_hf"):
        dataset = load_detection_dataset(folder, "val", invalid="skip")
    assert sorted(item["id"] for row in dataset.remove_columns("image") for item in row["objects"]) == sorted(remain)
    (found,) = left_out(dataset).items()
    assert found[0] == kind and found[1]["count"] == len(found[1]["first"]) == 1
    assert f"{KINDS[kind][0]}: 1" in caplog.text and found[1]["first"][0] in caplog.text
    assert left_out(dataset.select([0])) == left_out(dataset)  # travels
    for row in dataset:  # what remains can be trained on
        assert row["image"].size == (row["width"], row["height"])


def test_good_data_leave_nothing_out(coco_folder):
    for policy in ("error", "skip"):
        dataset = load_detection_dataset(coco_folder[0], "val", invalid=policy)
        assert left_out(dataset) == {} and len(dataset) == 3


def test_all_kinds_are_counted_at_once(coco_folder, content):
    folder, write = coco_folder
    (folder / "val" / "empty.png").unlink()
    content["annotations"] += [BOX | {"id": 100 + i, "bbox": [1, 1, 0, 0]} for i in range(9)]
    content["annotations"].append(BOX | {"category_id": 77})
    write(content)
    with pytest.raises(ValueError, match="problems found: 11; correct them") as error:
        load_detection_dataset(folder, "val")
    text = str(error.value)
    assert "pictures that do not exist: 1" in text and "annotations of unknown categories: 1" in text
    assert "inside their picture: 9" in text and "and 4 more" in text
    assert text.count("[1.0, 1.0, 0.0, 0.0]") == 5


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_skipping_leaves_what_errors_nowhere(coco_folder, content, data):
    """Whatever stands in the records: after `skip` has dropped rows, the rest loads strictly, box by box the same."""
    folder, write = coco_folder
    content = copy.deepcopy(content)
    odd = st.sampled_from([None, True, "7", -1, 0, 4, 7, 3.0, 2.5, float("nan"), 1e308, 2**70, [], {}, [1, 2, 3, 4]])
    for _ in range(data.draw(st.integers(1, 4))):
        record = data.draw(st.sampled_from(content["images"] + content["annotations"]))
        key = data.draw(st.sampled_from(sorted(record)))
        record[key] = data.draw(odd)
    write(content)
    dataset = load_detection_dataset(folder, "val", invalid="skip")
    root = folder / "again"
    coco.save_coco(dataset, root, "val")
    again = load_detection_dataset(root, "val")
    assert list(again.remove_columns("image")) == list(dataset.remove_columns("image"))
    for row in dataset.remove_columns("image"):
        for x, y, w, h in (item["bbox"] for item in row["objects"]):
            assert w > 0 and h > 0 and x < row["width"] and y < row["height"] and x + w > 0 and y + h > 0


@pytest.mark.parametrize(
    ("name", "leaves"),
    [("a.png", False), ("a/b.png", False), ("..a/b..png", False), ("./a.png", False), ("/a.png", True),
     ("../a.png", True), ("a/../../b.png", True), ("a/../b.png", True)],
)  # fmt: skip
def test_names_that_leave_the_folder(name, leaves):
    assert leaves_folder(name) == leaves


# The cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """Map tables of any size, in a cache of their own; returns its folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(canonical, "_MAPPED_ABOVE", 0)
    return folder / "drmm"


def is_mapped(dataset):
    return any(isinstance(block, MemoryMappedTable) for row in dataset.data.blocks for block in row)


def test_small_tables_stay_in_memory(coco_folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    assert not is_mapped(load_detection_dataset(coco_folder[0], "val"))
    assert not any(datasets.config.HF_DATASETS_CACHE.iterdir())


def test_large_tables_are_read_once_and_mapped(coco_folder, content, cache, monkeypatch):
    folder, write = coco_folder
    first = load_detection_dataset(folder, "val")
    assert is_mapped(first) and len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(coco, "_read_annotations", lambda path: pytest.fail("was read again"))
        second = load_detection_dataset(folder, "val")
    assert is_mapped(second) and list(second.remove_columns("image")) == list(first.remove_columns("image"))
    assert categories(second) == content["categories"]
    assert second[0]["image"].size == (40, 30)
    copied = pickle.loads(pickle.dumps(second))  # what a spawned worker gets
    assert is_mapped(copied) and copied[1]["file_name"] == "sub/a.jpg"

    content["annotations"][0]["bbox"] = [0, 0, 3, 3]
    write(content)
    third = load_detection_dataset(folder, "val")
    assert third[1]["objects"][0]["bbox"] == [0, 0, 3, 3] and len(list(cache.iterdir())) == 2


def test_problems_are_remembered_and_files_looked_for_again(coco_folder, content, cache):
    folder, write = coco_folder
    content["annotations"][0]["bbox"] = [0, 0, 0, 0]
    write(content)
    for _ in range(2):
        assert left_out(load_detection_dataset(folder, "val", invalid="skip"))["box_without_area"]["count"] == 1
        with pytest.raises(ValueError, match="inside their picture: 1"):
            load_detection_dataset(folder, "val")
    (folder / "val" / "empty.png").unlink()
    assert set(left_out(load_detection_dataset(folder, "val", invalid="skip"))) == {
        "box_without_area",
        "missing_picture",
    }


def test_a_cache_that_cannot_be_written_is_done_without(coco_folder, cache, caplog):
    cache.write_text("a file, no folder")
    with caplog.at_level(logging.WARNING, logger="drmm_hf"):
        dataset = load_detection_dataset(coco_folder[0], "val")
    assert not is_mapped(dataset) and len(dataset) == 3
    assert "cannot be written" in caplog.text


def _load_in_a_process(folder):
    canonical._MAPPED_ABOVE = 0
    dataset = load_detection_dataset(folder, "val")
    return os.getpid(), is_mapped(dataset), dataset["image_id"][:]


def test_processes_that_start_together_share_one_file(coco_folder, cache):
    """What the ranks of a training do; `fork` so that they inherit the cache of the test."""
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map(_load_in_a_process, [str(coco_folder[0])] * 6)
    assert all(mapped and ids == [7, 3, 11] for _, mapped, ids in results)
    assert [path.suffix for path in cache.iterdir()] == [".arrow"]


def test_description_is_json_that_a_reader_understands(coco_folder, content):
    folder, write = coco_folder
    content["annotations"][0]["category_id"] = 1
    write(content)
    dataset = load_detection_dataset(folder, "val", invalid="skip")
    assert json.loads(dataset.info.description) == {
        "categories": content["categories"],
        "left_out": {
            "unknown_category": {
                "count": 1,
                "first": [
                    f"{folder}/annotations/instances_val.json: annotations[0] (id 21): category_id 1 is not among the "
                    "categories [4, 90]"
                ],
            }
        },
    }


def corners_or_sizes(count, as_corners):
    """Make a split of one picture and boxes inside it, written as corners or as sizes."""
    random = np.random.default_rng(0)
    low = random.uniform(0, 50, (count, 2))
    extent = random.uniform(40, 50, (count, 2))
    boxes = np.hstack([low, low + extent if as_corners else extent])
    image = {"id": 1, "file_name": "a.png", "width": 100, "height": 100}
    records = [
        {"id": index, "image_id": 1, "category_id": 1, "bbox": box, "area": 1.0, "iscrowd": 0}
        for index, box in enumerate(boxes.tolist())
    ]
    return Records("cells", [image], records, [{"id": 1, "name": "cell"}])


@pytest.mark.parametrize(("count", "as_corners", "found"), [(40, True, 1), (40, False, 0), (9, True, 0)])
def test_corners_in_the_place_of_sizes_are_a_problem(count, as_corners, found):
    """Nine boxes prove nothing."""
    problems = Problems()
    check_records(corners_or_sizes(count, as_corners), problems)
    assert problems.found.get("corners", {"count": 0})["count"] == found
