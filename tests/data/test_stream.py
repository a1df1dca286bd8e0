import json
import random

import datasets
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.data.augmentation import build_augmentation
from drmm_hf.data.canonical import canonical_dataset, canonical_stream
from drmm_hf.data.coco import categories, load_detection_dataset
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.labels import LabelMap
from drmm_hf.data.loading import DetectionDataset, read_pair
from drmm_hf.data.problems import Problems
from drmm_hf.data.stream import StreamLoader
from drmm_hf.modeling.image_processing_drmm import DrmmImageProcessor


PROCESSOR = DrmmImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})


@pytest.fixture(scope="module")
def shapes():
    return generate_shapes(23, seed=0, image_size=(32, 48))


def sharded(dataset, num_shards):
    stream = dataset.to_iterable_dataset(num_shards=num_shards)
    stream.info.description = dataset.info.description
    return stream


def loader_of(stream, batch_size=2, **options):
    options = {"shuffle_buffer": 6, "seed": 3, **options}
    return StreamLoader(stream, LabelMap.from_categories(categories(stream)), PROCESSOR, batch_size, **options)


def ids_of(batches):
    return [[int(label["image_id"]) for label in batch["labels"]] for batch in batches]


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    return list(loader)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a["pixel_values"], b["pixel_values"])
        and all(torch.equal(x[key], y[key]) for x, y in zip(a["labels"], b["labels"], strict=True) for key in x)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_holds_each_picture_once_in_an_order_of_its_own(shapes, num_workers, grouped):
    loader = loader_of(canonical_stream(shapes), num_workers=num_workers, group_by_aspect_ratio=grouped)
    epochs = [ids_of(epoch_of(loader, epoch)) for epoch in (0, 1, 0)]
    assert all(sorted(sum(epoch, [])) == sorted(shapes["image_id"]) for epoch in epochs)
    assert epochs[0] == epochs[2] != epochs[1]
    assert epochs[0] != ids_of(loader_of(canonical_stream(shapes), num_workers=num_workers, seed=4))
    assert sum(len(batch) < 2 for batch in epochs[0]) <= max(1, num_workers)


def test_pictures_are_those_of_the_data_set(shapes):
    """Augmented by random numbers that follow the picture, wherever it comes in the stream."""
    augmentation = build_augmentation("flip", horizontal_flip=0.5)
    label_map = LabelMap.from_categories(categories(shapes))
    rows = {row["image_id"]: row for row in DetectionDataset(shapes, label_map).dataset}
    for options in ({}, {"num_workers": 2, "shuffle_buffer": 2}):
        batches = epoch_of(loader_of(canonical_stream(shapes), augmentation=augmentation, **options), 5)
        for batch in batches:
            for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
                image_id = int(label["image_id"])
                pair = read_pair(rows[image_id], label_map, augmentation, (3, 5, image_id))
                expected = PROCESSOR(images=[pair[0]], annotations=[pair[1]], return_tensors="pt")
                assert torch.equal(pixels[:, :32, :48], expected["pixel_values"][0, :, :32, :48])
                assert torch.equal(label["boxes"], expected["labels"][0]["boxes"])
    flipped = {bool(torch.equal(read_pair(rows[1], label_map, augmentation, (3, epoch, 1))[0],
                                read_pair(rows[1], label_map, None, ())[0])) for epoch in range(9)}  # fmt: skip
    assert flipped == {True, False}


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_loader_resumes_at_the_same_batch_wherever_it_stopped(shapes, data):
    """Whatever the shards, blocks, processes and batches; through json, as a checkpoint would keep it."""
    num_shards, ranks = data.draw(st.integers(1, 23)), data.draw(st.integers(1, 3))
    options = {
        "shuffle_buffer": data.draw(st.integers(1, 30)),
        "group_by_aspect_ratio": data.draw(st.booleans()),
        "rank": data.draw(st.integers(0, ranks - 1)),
        "num_ranks": ranks,
    }
    batch_size, lanes = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))

    def build(num_workers=0):
        loader = loader_of(sharded(shapes, num_shards), batch_size, **options)
        loader.collate = lambda pairs: [pair[1]["image_id"] for pair in pairs]
        loader.num_workers = lanes
        loader.set_epoch(7)  # with as many lanes
        loader.num_workers = num_workers
        return loader

    whole, loader, states = [], build(), []
    for batch in loader:
        whole.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    for stop in data.draw(st.lists(st.sampled_from(range(len(whole))), max_size=3)) if whole else []:
        resumed = build()
        resumed.load_state_dict(states[stop])
        assert list(resumed) == whole[stop + 1 :]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_loader_of_other_sizes_and_seed_goes_on_without_loss(shapes, data):
    """No picture twice and none missing; with the next epoch it is the loader that it would have been."""
    stream = sharded(shapes, data.draw(st.integers(1, 5)))

    def build():
        sizes = {"shuffle_buffer": data.draw(st.integers(1, 30)), "group_by_aspect_ratio": data.draw(st.booleans())}
        loader = loader_of(stream, data.draw(st.integers(1, 7)), seed=data.draw(st.integers(0, 9)), **sizes)
        loader.collate = lambda pairs: [pair[1]["image_id"] for pair in pairs]
        return loader

    first, second = build(), build()
    batches = iter(first)
    before = [next(batches) for _ in range(data.draw(st.integers(1, 3)))]
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert sorted(sum(before + rest, [])) == sorted(shapes["image_id"])
    assert sum(rest, []) == sum(batches, [])  # in the order of the first
    assert max(map(len, rest), default=0) <= second.batch_size
    fresh = loader_of(stream, second.batch_size, seed=second.seed, shuffle_buffer=second.block_size,
                      group_by_aspect_ratio=second.group_by_aspect_ratio)  # fmt: skip
    fresh.collate = second.collate
    assert epoch_of(second, 1) == epoch_of(fresh, 1)


@pytest.mark.parametrize("stop", [0, 7, 10])
@pytest.mark.parametrize(("saved_with", "resumed_with"), [(2, 2), (2, 0), (2, 1)])
def test_workers_resume_at_the_same_batch(shapes, saved_with, resumed_with, stop):
    """Five shards: one worker ends before the others."""
    stream = sharded(shapes, 5)
    whole = epoch_of(loader_of(stream, num_workers=saved_with), 1)
    stopped = loader_of(stream, num_workers=saved_with)
    stopped.set_epoch(1)
    batches = iter(stopped)
    before = [next(batches) for _ in range(stop)]
    resumed = loader_of(stream, num_workers=resumed_with)
    resumed.load_state_dict(stopped.state_dict())
    assert same(before + list(resumed), whole)


def test_resumed_with_more_workers_it_reads_the_same_pictures(shapes):
    stream = sharded(shapes, 6)
    stopped = loader_of(stream, num_workers=2)
    batches = iter(stopped)
    before = [next(batches) for _ in range(3)]
    resumed = loader_of(stream, num_workers=3)
    resumed.load_state_dict(stopped.state_dict())
    assert sorted(sum(ids_of([*before, *resumed]), [])) == sorted(shapes["image_id"])


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_share_a_stream(shapes, num_shards, num_workers):
    """By shards where they divide, else by rows, in which case they have equally many but for one."""
    stream = sharded(shapes, num_shards)
    shares = [sum(ids_of(loader_of(stream, rank=rank, num_ranks=2, num_workers=num_workers)), []) for rank in range(2)]
    assert sorted(sum(shares, [])) == sorted(shapes["image_id"])
    assert abs(len(shares[0]) - len(shares[1])) <= (23 // num_shards + 1 if num_shards % 2 == 0 else num_shards)


def test_rows_are_mixed_across_a_block_and_shards_across_epochs(shapes):
    stream = sharded(shapes, 1)
    ids = sum(ids_of(loader_of(stream, shuffle_buffer=6)), [])
    assert [sorted(ids[at : at + 6]) for at in range(0, 23, 6)] == [
        list(range(at + 1, min(at + 7, 24))) for at in range(0, 23, 6)
    ]
    assert ids != sorted(ids)
    firsts = {ids_of(epoch_of(loader_of(sharded(shapes, 23), shuffle_buffer=2), epoch))[0][0] for epoch in range(8)}
    assert len(firsts) > 3


def test_batches_of_like_shape():
    ratios = random.Random(0).choices([0.5, 2.0], k=64)
    rows = [
        {"image_id": i, "file_name": f"{i}.png", "image": Image.new("RGB", (round(20 * r), 20)), "objects": [],
         "width": round(20 * r), "height": 20} for i, r in enumerate(ratios)
    ]  # fmt: skip
    stream = canonical_stream(canonical_dataset(rows, [{"id": 1, "name": "thing"}]))
    batches = ids_of(loader_of(stream, 4, shuffle_buffer=64, group_by_aspect_ratio=True))
    mixed = sum(len({ratios[i] for i in batch}) > 1 for batch in batches)
    assert mixed <= 4 < sum(len({ratios[i] for i in batch}) > 1 for batch in ids_of(loader_of(stream, 4)))


# Bad data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_folder(tmp_path, shapes):
    """Twelve rows in 3 files: 2 without picture, 1 box without area, 1 picture cut off and 1 of another size."""
    rows = [dict(row) for row in DetectionDataset(shapes, LabelMap.from_categories(categories(shapes))).dataset][:12]
    for row in rows:
        row["objects"] = [{"bbox": item["bbox"], "category": item["category_id"]} for item in row["objects"]]
    for index in (2, 9):
        rows[index]["image"] = None
    rows[4]["objects"][0]["bbox"] = [1.0, 1.0, 0.0, 2.0]
    rows[5]["image"] = {"bytes": rows[5]["image"]["bytes"][:-300], "path": None}
    rows[7]["width"] = 49
    fields = {
        "bbox": datasets.List(datasets.Value("float64")),
        "category": datasets.ClassLabel(names=list("abcdefghij")),
    }
    plain = {name: datasets.Value("int64") for name in ("image_id", "width", "height")}
    features = datasets.Features({**plain, "image": datasets.Image(), "objects": datasets.List(fields)})
    for shard in range(3):
        part = [{name: row[name] for name in features} for row in rows[4 * shard : 4 * shard + 4]]
        path = tmp_path / "data" / f"train-0000{shard}-of-00003.parquet"
        path.parent.mkdir(exist_ok=True)
        datasets.Dataset.from_list(part, features=features).to_parquet(path)
    return tmp_path


EXPECTED = {"missing_picture": 2, "box_without_area": 1, "unreadable_picture": 1, "wrong_size": 1}


def counts(found):
    return {kind: entry["count"] for kind, entry in found.items()}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle_buffer", [2, 12])
def test_bad_rows_are_left_out_and_counted_once(bad_folder, shapes, num_workers, shuffle_buffer, caplog):
    """In each epoch anew, and across a stop after any batch."""

    def build():
        problems = Problems()
        options = {"bbox_format": "xywh", "streaming": True, "invalid": "skip", "problems": problems}
        stream = load_detection_dataset(bad_folder, "train", **options)
        return loader_of(stream, num_workers=num_workers, shuffle_buffer=shuffle_buffer, problems=problems)

    loader = build()
    states = []
    for epoch in (1, 0):
        loader.set_epoch(epoch)
        batches = []
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
        assert sorted(sum(ids_of(batches), [])) == sorted(
            image_id for index, image_id in enumerate(shapes["image_id"][:12]) if index not in (2, 5, 7, 9)
        )
        assert counts(loader.left_out) == EXPECTED
        assert sum(len(entry["first"]) for entry in loader.left_out.values()) == 5
    for position in range(len(batches)):
        resumed = build()
        resumed.load_state_dict(states[position - len(batches)])
        assert same(list(resumed), batches[position + 1 :])
        assert counts(resumed.left_out) == EXPECTED
    assert "left out" not in caplog.text  # a line a row, each epoch


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_rows_are_an_error_that_names_them(bad_folder, num_workers):
    stream = load_detection_dataset(bad_folder, "train", bbox_format="xywh", streaming=True)
    with pytest.raises((ValueError, FileNotFoundError), match="problems found: 1"):
        list(loader_of(stream, num_workers=num_workers))


def test_undecodable_pictures_are_an_error_that_names_them(shapes):
    row = dict(DetectionDataset(shapes, LabelMap.from_categories(categories(shapes))).dataset[0])
    row["image"] = {"bytes": row["image"]["bytes"][:-300], "path": None}
    stream = canonical_stream(canonical_dataset([row], categories(shapes)))
    with pytest.raises(OSError, match=r"\(image 1\) cannot be read"):
        list(loader_of(stream))


# Sources -------------------------------------------------------------------------------------------------------------


def test_folders_stream_with_their_categories(coco_folder, content):
    stream = load_detection_dataset(coco_folder[0], "val", streaming=True)
    assert categories(stream) == content["categories"]
    batches = list(loader_of(stream))
    labels = {int(label["image_id"]): label["class_labels"].tolist() for batch in batches for label in batch["labels"]}
    assert labels == {7: [1], 3: [1], 11: []}


def test_only_the_files_of_a_split_are_fetched(bad_folder, tmp_path_factory, monkeypatch):
    """The validation split of a source whose training split is streamed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    table = pyarrow.parquet.read_table(bad_folder / "data" / "train-00000-of-00003.parquet")
    features = datasets.Features.from_arrow_schema(table.schema)
    bare = table.replace_schema_metadata()  # the card says what the columns are
    pyarrow.parquet.write_table(bare, bad_folder / "data" / "validation-00000-of-00001.parquet")
    for shard in range(3):
        (bad_folder / "data" / f"train-0000{shard}-of-00003.parquet").write_bytes(b"not to be read")
    sizes = {"train": 12, "validation": 4}
    files = [{"split": split, "path": f"data/{split}-*"} for split in sizes]
    counts = [{"name": split, "num_examples": size, "num_bytes": 1} for split, size in sizes.items()]
    info = {"features": features._to_yaml_list(), "splits": counts}
    card = yaml.dump({"configs": [{"config_name": "default", "data_files": files}], "dataset_info": info})
    (bad_folder / "README.md").write_text(f"---\n{card}---\n")
    dataset = load_detection_dataset(bad_folder, "val", bbox_format="xywh", invalid="skip", alone=True)
    assert dataset["image_id"][:] == [1, 2, 4]
    assert [record["name"] for record in categories(dataset)] == list("abcdefghij")
    with pytest.raises(Exception, match="(?i)parquet|generat"):
        load_detection_dataset(bad_folder, "val", bbox_format="xywh", invalid="skip")


@pytest.mark.parametrize("position", [{"epoch": 1, "next": 0, "lanes": [], "left_out": {}}, None], ids=str)
def test_a_position_of_another_version_is_refused(position):
    loader = loader_of(sharded(generate_shapes(4, seed=0, image_size=(32, 48)), 2))
    with pytest.raises(ValueError, match="the position in the stream is .*; it must have epoch, order, next, lanes"):
        loader.load_state_dict(position)
