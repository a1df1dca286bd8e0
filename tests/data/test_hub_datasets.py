import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Sequence, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.data.canonical import FEATURES, categories, left_out
from drmm_hf.data.coco import load_detection_dataset
from drmm_hf.data.hub_datasets import prove_box_format


SIZE = (64, 48)  # width, height
BOXES = [[[3.0, 20.0, 20.0, 16.0], [40.0, 5.0, 20.0, 30.0]], [], [[10.0, 30.0, 12.0, 14.0], [2.0, 3.0, 60.0, 40.0]]]
NAMES = ["newt", "crab"]
TO = {
    "xywh": lambda x, y, w, h: [x, y, w, h],
    "xyxy": lambda x, y, w, h: [x, y, x + w, y + h],
    "cxcywh": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
}


def hub_like(tmp_path, layout="dict", category="category", kind="ClassLabel", box_format="xywh", **extra):
    """Write a parquet dataset as the Hub holds them; returns its folder."""
    feature = {"ClassLabel": ClassLabel(names=NAMES), "int": Value("int64"), "string": Value("string")}[kind]
    entry = {"ClassLabel": lambda i: i, "int": lambda i: 10 + i, "string": lambda i: NAMES[i]}[kind]
    fields = {"bbox": List(Value("float32"), length=4), category: feature}
    columns = {"bbox": lambda i, box: TO[box_format](*box), category: lambda i, box: entry(i % 2)}
    if extra.get("area", True):
        fields["area"], columns["area"] = Value("float64"), lambda i, box: box[2] * box[3] * extra.get("fill", 1.0)
    if extra.get("iscrowd"):
        fields["iscrowd"], columns["iscrowd"] = Value("int64"), lambda i, box: i % 2
    rows = []
    for boxes in BOXES:
        if layout == "dict":
            rows.append({name: [make(i, box) for i, box in enumerate(boxes)] for name, make in columns.items()})
        else:
            rows.append([{name: make(i, box) for name, make in columns.items()} for i, box in enumerate(boxes)])
    features = {"image": datasets.Image(), "objects": Sequence(fields) if layout == "dict" else List(fields)}
    data = {"image": [Image.new("RGB", SIZE, (i, 0, 0)) for i in range(3)], "objects": rows}
    if extra.get("image_id", True):
        features["image_id"], data["image_id"] = Value("int64"), [100, 50, 75]
    if extra.get("size", True):
        features |= {"width": Value("int32"), "height": Value("int32")}
        data |= {"width": [SIZE[0]] * 3, "height": [SIZE[1]] * 3}
    dataset = Dataset.from_dict(data, features=Features(features))
    (tmp_path / "data").mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    return tmp_path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def load(monkeypatch):
    """Load a split of datasets in memory, as if `datasets.load_dataset` had found them."""

    def load(splits, split="train", **options):
        monkeypatch.setattr(datasets, "load_dataset", lambda source: DatasetDict(splits))
        return load_detection_dataset("somebody/something", split, **options)

    return load


def rows_of(dataset):
    return list(dataset.remove_columns("image"))


@pytest.mark.parametrize("layout", ["dict", "list"])
@pytest.mark.parametrize("category", ["category", "category_id"])
def test_both_layouts_and_both_category_keys(tmp_path, layout, category):
    folder = hub_like(tmp_path, layout, category, iscrowd=True)
    dataset = load_detection_dataset(folder, "train", bbox_format="xywh")
    assert dataset.features == FEATURES
    assert categories(dataset) == [{"id": 0, "name": "newt"}, {"id": 1, "name": "crab"}]
    rows = rows_of(dataset)
    assert [row["image_id"] for row in rows] == [100, 50, 75]
    assert [[item["bbox"] for item in row["objects"]] for row in rows] == BOXES
    assert [item["iscrowd"] for row in rows for item in row["objects"]] == [0, 1, 0, 1]
    assert [item["category_id"] for row in rows for item in row["objects"]] == [0, 1, 0, 1]
    assert [item["id"] for row in rows for item in row["objects"]] == [1, 2, 3, 4]
    assert len({row["file_name"] for row in rows}) == 3
    assert np.asarray(dataset[2]["image"])[0, 0].tolist() == [2, 0, 0]


@pytest.mark.parametrize("box_format", TO)
@pytest.mark.parametrize("fill", [1.0, 0.4])
def test_box_formats_are_proven_or_given(tmp_path, box_format, fill):
    folder = hub_like(tmp_path, box_format=box_format, fill=fill)
    for argument in (None, box_format):
        dataset = load_detection_dataset(folder, "train", bbox_format=argument)
        assert [[item["bbox"] for item in row["objects"]] for row in rows_of(dataset)] == BOXES


def test_missing_columns_are_worked_out(tmp_path):
    folder = hub_like(tmp_path, box_format="xyxy", area=False, image_id=False, size=False)
    rows = rows_of(load_detection_dataset(folder, "train", bbox_format="xyxy"))
    assert [row["image_id"] for row in rows] == [0, 1, 2]
    assert {(row["width"], row["height"]) for row in rows} == {SIZE}
    assert [item["area"] for row in rows for item in row["objects"]] == [320.0, 600.0, 168.0, 2400.0]


@pytest.mark.parametrize("kind", ["int", "string"])
def test_categories_without_class_label(tmp_path, kind, caplog):
    folder = hub_like(tmp_path, kind=kind)
    with caplog.at_level(logging.WARNING, logger="drmm_hf"):
        dataset = load_detection_dataset(folder, "train")
    found = [item["category_id"] for row in rows_of(dataset) for item in row["objects"]]
    if kind == "int":
        assert categories(dataset) == [{"id": 10, "name": "10"}, {"id": 11, "name": "11"}]
        assert found == [10, 11, 10, 11]
    else:  # sorted by name
        assert categories(dataset) == [{"id": 0, "name": "crab"}, {"id": 1, "name": "newt"}]
        assert found == [1, 0, 1, 0]
    assert "names no categories" in caplog.text
    given_ids = (11, 10) if kind == "int" else (5, 3)
    records = [{"id": given_ids[0], "name": "crab"}, {"id": given_ids[1], "name": "newt"}]
    dataset = load_detection_dataset(folder, "train", categories=records)
    assert categories(dataset) == records
    found = [item["category_id"] for row in rows_of(dataset) for item in row["objects"]]
    assert found == ([10, 11, 10, 11] if kind == "int" else [3, 5, 3, 5])
    with pytest.raises(ValueError, match=r"row 0 \(image 100\), objects\[0\]: category_id"):
        load_detection_dataset(folder, "train", categories=[{"id": given_ids[0], "name": "crab"}])


def test_categories_are_those_of_all_splits(load):
    objects = Sequence({"bbox": List(Value("float64"), length=4), "category": Value("string")})
    features = Features({"image": datasets.Image(), "objects": objects})

    def part(names):
        row = {"bbox": [[1.0, 2.0, 3.0, 4.0]] * len(names), "category": names}
        return Dataset.from_dict({"image": [Image.new("RGB", SIZE)], "objects": [row]}, features=features)

    splits = DatasetDict(train=part(["b", "c"]), test=part(["a"]))
    for split in splits:
        dataset = load(splits, split, bbox_format="xywh")
        assert [record["name"] for record in categories(dataset)] == ["a", "b", "c"]


def test_imagefolder_with_metadata(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        lines = []
        for i, boxes in enumerate(BOXES):
            Image.new("RGB", SIZE).save(tmp_path / split / f"{i}.png")
            lines.append({"file_name": f"{i}.png", "objects": {"bbox": boxes, "category": [i] * len(boxes)}})
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = load_detection_dataset(tmp_path, "test", bbox_format="xywh")
    assert [row["file_name"] for row in rows_of(dataset)] == ["0.png", "1.png", "2.png"]
    assert [[item["bbox"] for item in row["objects"]] for row in rows_of(dataset)] == BOXES
    assert [record["id"] for record in categories(dataset)] == [0, 2]
    assert Path(dataset.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"]).is_file()
    with pytest.raises(ValueError, match=r"split 'val' is not in .*\['test', 'train'\]"):
        load_detection_dataset(tmp_path, "val", bbox_format="xywh")


def test_errors_of_datasets_sources(tmp_path, load):
    folder = hub_like(tmp_path)
    with pytest.raises(ValueError, match="bbox_format is 'yxyx'"):
        load_detection_dataset(folder, "train", bbox_format="yxyx")
    splits = DatasetDict(train=Dataset.from_dict({"picture": [1]}))
    with pytest.raises(ValueError, match=r"has no column 'image': it has \['picture'\]"):
        load(splits, "train", bbox_format=None)
    features = Features(
        {
            "image": datasets.Image(),
            "objects": {"bbox": List(List(Value("float64"))), "category": List(Value("int64"))},
        }
    )
    bad = {"image": [Image.new("RGB", SIZE)], "objects": [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": [1, 2]}]}
    splits = DatasetDict(train=Dataset.from_dict(bad, features=features))
    with pytest.raises(ValueError, match=r"something, split train, row 0: the lists of objects differ in length"):
        load(splits, "train", bbox_format="xywh")
    bad["objects"] = [{"bbox": [[1.0, 2.0, 3.0]], "category": [1]}]
    splits = DatasetDict(train=Dataset.from_dict(bad, features=features))
    with pytest.raises(ValueError, match=r"row 0 \(image 0\), objects\[0\]: bbox .* 4 finite numbers"):
        load(splits, "train", bbox_format="xywh")


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.sampled_from(sorted(TO)), st.integers(1, 60), st.sampled_from(["box", "mask", None]))
def test_a_wrong_box_format_is_never_proven(seed, box_format, count, area_kind):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 800, (count, 2))  # height, width
    corners = np.sort(rng.random((count, 2, 2)), axis=1) * sizes[:, None, ::-1]
    x1, y1, x2, y2 = (corners[:, 0, 0], corners[:, 0, 1], corners[:, 1, 0], corners[:, 1, 1])
    width, height = x2 - x1 + 1e-3, y2 - y1 + 1e-3
    boxes = np.array([TO[box_format](*box) for box in np.stack([x1, y1, width, height], axis=1)])
    areas = {"box": width * height, "mask": width * height * rng.uniform(0.1, 0.9, count), None: None}[area_kind]
    try:
        assert prove_box_format(boxes, sizes, areas) == box_format
    except ValueError as error:
        assert "not proven" in str(error)


@pytest.mark.parametrize("box_format", TO)
def test_enough_boxes_do_prove_their_format(box_format):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((300, 2, 2)), axis=1) * (640, 480)
    boxes = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], axis=1)
    given_boxes = np.array([TO[box_format](*box) for box in boxes])
    assert prove_box_format(given_boxes, np.tile((480, 640), (300, 1))) == box_format


def test_boxes_that_fit_two_formats_prove_none():
    boxes = np.tile((30.0, 20.0, 5.0, 4.0), (100, 1))  # xywh or cxcywh
    with pytest.raises(ValueError, match=r"100 boxes \(0 contradict xywh, 100 contradict xyxy, 0 contradict cxcywh\)"):
        prove_box_format(boxes, np.tile((48, 64), (100, 1)), np.full(100, 20.0))


def test_a_few_odd_boxes_prove_nothing():
    boxes = np.tile((30.0, 20.0, 5.0, 4.0), (100, 1))  # xywh or cxcywh
    boxes[:4] = (1.0, 1.0, 40.0, 30.0)  # not cxcywh
    with pytest.raises(ValueError, match="0 contradict xywh, 96 contradict xyxy, 4 contradict cxcywh"):
        prove_box_format(boxes, np.tile((48, 64), (100, 1)))


def test_ids_of_datasets_sources_must_differ(load):
    fields = {"bbox": List(Value("float64")), "category": Value("int64"), "id": Value("int64")}
    features = Features({"image": datasets.Image(), "image_id": Value("int64"), "objects": List(fields)})
    item = {"bbox": [1.0, 2.0, 3.0, 4.0], "category": 1, "id": 9}
    picture = Image.new("RGB", SIZE)
    for image_ids, message in [
        ([1, 2], r"row 1 \(image 2\), objects\[0\]: the id is taken"),
        ([1, 1], r"row 1: the id is taken by"),
    ]:
        data = {"image": [picture] * 2, "image_id": image_ids, "objects": [[item], [item]]}
        splits = DatasetDict(train=Dataset.from_dict(data, features=features))
        with pytest.raises(ValueError, match=message):
            load(splits, "train", bbox_format="xywh")


def test_sizes_of_datasets_sources_are_those_displayed(tmp_path, load):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.new("RGB", SIZE).save(path, exif=exif)
    fields = {"bbox": List(Value("float64")), "category": ClassLabel(names=NAMES)}
    data = {"image": [str(path)], "objects": [[{"bbox": [1.0, 2.0, 40.0, 60.0], "category": 1}]]}
    features = Features({"image": datasets.Image(), "objects": List(fields)})
    splits = DatasetDict(train=Dataset.from_dict(data, features=features))
    dataset = load(splits, "train", bbox_format="xywh")
    assert (dataset[0]["width"], dataset[0]["height"]) == SIZE[::-1] == dataset[0]["image"].size
    assert dataset[0]["file_name"] == "turned.jpg"


# Bad data ------------------------------------------------------------------------------------------------------------


FIELDS = {"bbox": List(Value("float64")), "category": Value("int64")}
OBJECT = {"bbox": [1.0, 2.0, 3.0, 4.0], "category": 1}


def test_bad_rows_are_left_out_with_their_pictures(load):
    """Rows and pictures stay together, though some of either are gone."""
    pictures = [Image.new("RGB", SIZE, (row, 0, 0)) for row in range(5)]
    data = {
        "image": [pictures[0], None, pictures[2], {"bytes": b"no picture", "path": None}, pictures[4]],
        "image_id": [10, 11, 12, 13, 14],
        "objects": [
            [OBJECT],
            [OBJECT],
            [OBJECT | {"bbox": [1.0, 2.0, 3.0]}, OBJECT | {"category": 3}, OBJECT],
            [OBJECT],
            [OBJECT | {"bbox": [1.0, 2.0, 0.0, 4.0]}],
        ],
    }
    features = Features({"image": datasets.Image(), "image_id": Value("int64"), "objects": List(FIELDS)})
    splits = {"train": Dataset.from_dict(data, features=features)}
    options = {"bbox_format": "xywh", "categories": [{"id": 1, "name": "newt"}]}
    with pytest.raises(ValueError, match="problems found: 5;"):
        load(splits, **options)
    dataset = load(splits, **options, invalid="skip")
    assert dataset["image_id"][:] == [10, 12, 14]
    assert [np.asarray(image)[0, 0, 0] for image in dataset["image"]] == [0, 2, 4]
    assert [len(row["objects"]) for row in rows_of(dataset)] == [1, 1, 0]
    assert {kind: entry["count"] for kind, entry in left_out(dataset).items()} == {
        "missing_picture": 1, "unreadable_picture": 1, "box_not_finite": 1, "unknown_category": 1,
        "box_without_area": 1,
    }  # fmt: skip


def test_pictures_of_a_table_are_not_copied(tmp_path):
    """The column of pictures is that which `datasets` maps from its cache."""
    from datasets.table import MemoryMappedTable

    dataset = load_detection_dataset(hub_like(tmp_path), "train")
    mapped = [block for row in dataset.data.blocks for block in row if isinstance(block, MemoryMappedTable)]
    assert [block.column_names for block in mapped] == [["image"]]


# Streams -------------------------------------------------------------------------------------------------------------


def plain(rows):
    """Rows with their pictures as numbers."""
    return [{**row, "image": np.asarray(row["image"]).tolist()} for row in rows]


def sharded(tmp_path, **extra):
    """Write nine rows as three parquet files; returns the folder."""
    source = Dataset.from_parquet(str(hub_like(tmp_path, **extra) / "data" / "*.parquet"), cache_dir=str(tmp_path))
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    for shard in range(3):
        part = source.map(lambda row, i, shard=shard: {"image_id": 10 * shard + i}, with_indices=True)
        part.to_parquet(tmp_path / "data" / f"train-0000{shard}-of-00003.parquet")
    return tmp_path


@pytest.mark.parametrize("box_format", ["xyxy", None])
def test_a_stream_holds_what_the_dataset_holds(tmp_path, box_format):
    folder = sharded(tmp_path, box_format="xyxy", iscrowd=True)
    dataset = load_detection_dataset(folder, "train", bbox_format=box_format)
    stream = load_detection_dataset(folder, "train", bbox_format=box_format, streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert stream.features == FEATURES and categories(stream) == categories(dataset)
    assert categories(stream.shuffle(seed=0, buffer_size=2)) == categories(dataset)
    streamed, loaded = plain(stream), plain(dataset)
    for rows in (streamed, loaded):
        for row in rows:  # names and ids that the source lacks are of each reader's own making
            del row["file_name"]
            for item in row["objects"]:
                del item["id"]
    assert streamed == loaded and len(streamed) == 9
    undecoded = stream.cast_column("image", datasets.Image(decode=False))  # as training wants them
    assert all(row["image"]["bytes"].startswith(b"\x89PNG") for row in undecoded)
    ids = [item["id"] for row in stream for item in row["objects"]]
    assert len(set(ids)) == len(ids) == 12


@pytest.mark.parametrize("source", ["parquet", "coco"])
@pytest.mark.parametrize("invalid", ["error", "skip"])
def test_a_stopped_stream_resumes_at_the_same_row(tmp_path, source, invalid, coco_folder):
    def stream():
        if source == "coco":
            return load_detection_dataset(coco_folder[0], "val", streaming=True, invalid=invalid)
        return load_detection_dataset(folder, "train", bbox_format="xywh", streaming=True, invalid=invalid)

    folder = sharded(tmp_path / "hub", iscrowd=True) if source == "parquet" else None
    whole = plain(stream())
    for stop in range(1, len(whole)):
        stopped = stream()
        rows = iter(stopped)
        before = plain(next(rows) for _ in range(stop))
        state = json.loads(json.dumps(stopped.state_dict()))  # as a checkpoint keeps it
        resumed = stream()
        resumed.load_state_dict(state)
        assert before + plain(resumed) == whole


def test_workers_share_the_shards_of_a_stream(tmp_path):
    from torch.utils.data import DataLoader

    folder = sharded(tmp_path)
    stream = load_detection_dataset(folder, "train", bbox_format="xywh", streaming=True)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(row["image_id"] for row in loader) == [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_bad_rows_of_a_stream(tmp_path, caplog):
    folder = hub_like(tmp_path)
    path = folder / "data" / "train-00000-of-00001.parquet"
    rows = list(Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "a")))
    rows[1]["objects"] = {"bbox": [[1.0, 2.0, 0.0, 4.0]], "category": [0], "area": [0.0]}
    rows[2]["width"] = 0
    features = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "b")).features
    Dataset.from_list(rows, features=features).to_parquet(path)
    options = {"bbox_format": "xywh", "streaming": True}
    stream = iter(load_detection_dataset(folder, "train", **options))
    assert next(stream)["image_id"] == 100
    with pytest.raises(ValueError, match=r"picture 50, problems found: 1.*\n.*inside their picture: 1"):
        next(stream)
    with caplog.at_level(logging.WARNING, logger="drmm_hf"):
        kept = list(load_detection_dataset(folder, "train", **options, invalid="skip"))
    assert [(row["image_id"], len(row["objects"])) for row in kept] == [(100, 2), (50, 0)]
    assert "picture 75, problems found and left out: 1" in caplog.text and "width is 0" in caplog.text


def test_what_a_stream_must_be_told(tmp_path):
    folder = hub_like(tmp_path, kind="string", area=False)
    with pytest.raises(ValueError, match="a stream is not searched for them: give categories"):
        load_detection_dataset(folder, "train", streaming=True)
    records = [{"id": 3, "name": "newt"}, {"id": 5, "name": "crab"}]
    stream = load_detection_dataset(folder, "train", streaming=True, categories=records, bbox_format="xywh")
    assert [item["category_id"] for row in stream for item in row["objects"]] == [3, 5, 3, 5]
    with pytest.raises(ValueError, match=r"split 'test' is not in .*\['train'\]"):
        load_detection_dataset(folder, "test", streaming=True)
