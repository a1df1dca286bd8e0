import json

import pytest
from PIL import Image


@pytest.fixture
def content():
    """A COCO file with the things that go wrong elsewhere: ids with gaps, a crowd, a mask area, an empty picture."""
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "sub/a.jpg", "width": 20, "height": 50},
            {"id": 11, "file_name": "empty.png", "width": 8, "height": 8},
        ],
        "annotations": [
            {"id": 21, "image_id": 3, "category_id": 4, "bbox": [1, 2, 10.5, 20], "area": 99.5, "iscrowd": 0},
            {"id": 5, "image_id": 7, "category_id": 90, "bbox": [0, 0, 40, 30], "area": 600, "iscrowd": 1},
            {"id": 8, "image_id": 7, "category_id": 4, "bbox": [5, 6, 7, 8]},
        ],
        "categories": [{"id": 90, "name": "crab"}, {"id": 4, "name": "newt"}],
    }


@pytest.fixture
def coco_folder(tmp_path, content):
    """That file as the split `val` of a COCO folder; returns the folder and a function that rewrites the json."""
    for record in content["images"]:
        path = tmp_path / "val" / record["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (record["width"], record["height"]), (record["id"], 100, 200)).save(path)
    (tmp_path / "annotations").mkdir()

    def write(new_content):
        (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(new_content))
        return tmp_path

    write(content)
    return tmp_path, write
