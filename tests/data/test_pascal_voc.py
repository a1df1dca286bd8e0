import pytest
from PIL import Image

from drmm_hf.data.canonical import FEATURES, categories, left_out
from drmm_hf.data.coco import load_detection_dataset


OBJECT = """<object><name>{name}</name><truncated>1</truncated><difficult>{difficult}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""
SIZE = "<size><width>40</width><height>20</height><depth>3</depth></size>"


@pytest.fixture
def folder(tmp_path):
    """Two lists, a class list that is none, and three pictures."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path, "a", voc("newt", 1, 1, 40, 20), voc("crab", 3, 4, 3, 4, difficult=1))
    write(tmp_path, "b")
    write(tmp_path, "c", voc("asp", 2, 2, 5, 9))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("c\n")
    (tmp_path / "ImageSets" / "Main" / "newt_train.txt").write_text("a  1\nb -1\n")
    return tmp_path


def voc(name, *corners, difficult=0):
    return OBJECT.format(*corners, name=name, difficult=difficult)


def write(folder, name, *objects, size=SIZE):
    Image.new("RGB", (40, 20)).save(folder / "JPEGImages" / f"{name}.jpg")
    filename = "<filename>/home/labeller/wrong.png</filename>"
    text = f"<annotation>{filename}{size}{''.join(objects)}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text)


def rows_of(dataset):
    return list(dataset.remove_columns("image"))


def test_corners_are_pixels_counted_from_one_and_inclusive(folder):
    """A box from 1 to the width covers the picture, and one of equal corners is one pixel."""
    dataset = load_detection_dataset(folder, "train")
    assert dataset.features == FEATURES
    rows = rows_of(dataset)
    assert [row["file_name"] for row in rows] == ["a.jpg", "b.jpg"]
    whole, pixel = rows[0]["objects"]
    assert whole["bbox"] == [0.0, 0.0, 40.0, 20.0] and whole["area"] == 800
    assert pixel["bbox"] == [2.0, 3.0, 1.0, 1.0]
    assert rows[1]["objects"] == []
    assert dataset[0]["image"].size == (40, 20)


def test_difficult_objects_are_ignored_as_crowds_and_truncated_ones_count(folder):
    items = rows_of(load_detection_dataset(folder, "train"))[0]["objects"]
    assert [item["iscrowd"] for item in items] == [0, 1]


def test_categories_are_those_of_all_splits_and_no_parts(folder):
    for split, found in (("train", [2, 1]), ("val", [0])):
        dataset = load_detection_dataset(folder, split)
        assert [record["name"] for record in categories(dataset)] == ["asp", "crab", "newt"]
        assert [item["category_id"] for row in rows_of(dataset) for item in row["objects"]] == found
    given = [{"id": 5, "name": "newt"}, {"id": 3, "name": "crab"}]
    dataset = load_detection_dataset(folder, "train", categories=given)
    assert categories(dataset) == given
    assert [item["category_id"] for item in rows_of(dataset)[0]["objects"]] == [5, 3]
    with pytest.raises(ValueError, match=r"c\.xml, object 1: name 'asp' is not among"):
        load_detection_dataset(folder, "val", categories=given)


def test_only_lists_of_pictures_are_splits(folder):
    with pytest.raises(ValueError, match=r"it has \['train', 'val'\]"):
        load_detection_dataset(folder, "newt_train")
    for path in (folder / "ImageSets" / "Main").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="has no list of pictures, such as train.txt"):
        load_detection_dataset(folder, "train")


def test_a_missing_size_is_that_of_the_picture(folder):
    write(folder, "a", voc("newt", 1, 1, 2, 2), size="<size><width>0</width><height>0</height></size>")
    assert rows_of(load_detection_dataset(folder, "train"))[0]["width"] == 40


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda f: (f / "Annotations" / "a.xml").write_text("<annotation>"), "bad_record", "a.xml: is not valid xml"),
        (lambda f: (f / "Annotations" / "a.xml").unlink(), "missing_annotation", "a.xml: does not exist"),
        (lambda f: (f / "JPEGImages" / "a.jpg").unlink(), "missing_picture", "'a.jpg'.* is not in"),
        (lambda f: write(f, "a", size="<size><width>x</width></size>"), "bad_record", "a.xml: size: "),
        (lambda f: write(f, "a", voc("newt", 1, 1, "x", 2)), "bad_record", r"object 1: bndbox is .*must be 4 numbers"),
        (lambda f: write(f, "a", voc("newt", 5, 5, 4, 9)), "box_without_area", r"object 1: \[4.0, 4.0, 0.0, 5.0\]"),
        (lambda f: write(f, "a", voc("newt", 1, 1, "nan", 9)), "box_not_finite", "object 1: bbox is"),
        (lambda f: (f / "ImageSets/Main/train.txt").write_text("../../a\nb\n"), "outside_folder", "leaves the image"),
    ],
)
def test_what_is_wrong_is_named_or_left_out(folder, change, kind, message):
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_detection_dataset(folder, "train")
    dataset = load_detection_dataset(folder, "train", invalid="skip")
    assert {name: entry["count"] for name, entry in left_out(dataset).items()} == {kind: 1}
    assert sum(len(row["objects"]) for row in rows_of(dataset)) == 0
    assert "b.jpg" in [row["file_name"] for row in rows_of(dataset)]
