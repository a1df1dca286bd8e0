import json

import pytest

from drmm_hf.conversion.class_names import class_fields, coco_categories


def test_cocos_ids_have_gaps():
    categories = coco_categories()
    assert len(categories) == 80
    assert {1: "person", 13: "stop sign", 44: "bottle", 90: "toothbrush"}.items() <= categories.items()
    gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert set(categories) == set(range(1, 91)) - gaps


@pytest.mark.parametrize("given", ["coco", list(coco_categories().values())], ids=["by name", "from the checkpoint"])
def test_coco_brings_its_category_ids(given):
    fields = class_fields(given, 80)
    assert fields["id2label"][0] == "person" and fields["id2label"][79] == "toothbrush"
    assert fields["category_ids"][11:13] == [13, 14]


def test_eighty_other_classes_have_no_category_ids():
    assert class_fields([f"class {index}" for index in range(80)], 80).keys() == {"id2label"}


def test_files_of_names(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\n hot dog \n")
    assert class_fields(tmp_path / "names.txt", 2) == {"id2label": {0: "cat", 1: "hot dog"}}
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    (tmp_path / "train.json").write_text(json.dumps({"categories": categories}))
    assert class_fields(str(tmp_path / "train.json"), 2) == {
        "id2label": {0: "dog", 1: "cat"},
        "category_ids": [7, 3],
    }


def test_without_names_there_are_numbers():
    assert class_fields(None, 5) == {"num_labels": 5}


def test_names_that_do_not_fit_are_errors(tmp_path):
    with pytest.raises(ValueError, match="know 3 classes, but there are 2 names"):
        class_fields(["cat", "dog"], 3)
    with pytest.raises(ValueError, match="2 names, 1 of them different"):
        class_fields(["cat", "cat"], 2)
    with pytest.raises(FileNotFoundError, match="'cocoa' is neither a file nor"):
        class_fields("cocoa", 80)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="has no categories"):
        class_fields(tmp_path / "x.json", 2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", b"{", "has no categories with id and name"),
        ("x.json", b'{"categories": {"cat": 1}}', "has no categories with id and name"),
        ("x.json", b'{"categories": [{"id": 1}, {"id": 2}]}', "has no categories with id and name"),
        ("x.json", b'{"categories": [{"id": "1", "name": "cat"}]}', "whose name is no text or whose id is no integer"),
        ("x.txt", b"\xff\xfe\x00", "is no text in UTF-8"),
    ],
)
def test_files_of_another_form_are_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}' {words}|{name}' has categories {words}"):
        class_fields(tmp_path / name, 2)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    assert class_fields(tmp_path / "names.txt", 2)["id2label"][0] == "cat"
