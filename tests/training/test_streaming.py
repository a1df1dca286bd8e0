"""`drmm train --streaming true`: killed as the runs of `test_resume`, on generated pictures and on parquet files."""

import json

import datasets
import pytest
from datasets import ClassLabel, Features, List, Value

from drmm_hf.data.coco import categories
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.stream import StreamLoader
from drmm_hf.training.arguments import DataArguments, Recipe, TrainingArguments
from drmm_hf.training.build import load_split
from drmm_hf.training.loop import train
from drmm_hf.training.manifest import data_fingerprint
from drmm_hf.training.presets import choose_recipe
from training.test_resume import Server, assert_same, moments, results


# Blocks of 4 pictures: four in an epoch of 14, or two in each of two workers.
STREAM = {"streaming": "true", "shuffle_buffer": 4, "max_steps": 8, "save_every_steps": 3, "evaluate_every": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("runs"))
    yield server
    server.process.kill()
    server.process.wait(60)


def parquet_folder(folder, shards, bad=()):
    """Write generated pictures as parquet files of so many rows; those at the places `bad` have no picture."""
    fields = {"bbox": List(Value("float64"))}
    numbers = {name: Value("int64") for name in ("image_id", "width", "height")}
    for split, sizes in (("train", shards), ("validation", [3])):
        shapes = generate_shapes(sum(sizes), seed=len(sizes), image_size=(64, 64))
        fields["category"] = ClassLabel(names=[f"shape{number}" for number in range(10)])
        features = Features({**numbers, "image": datasets.Image(), "objects": List(fields)})
        rows = list(shapes.cast_column("image", datasets.Image(decode=False)))
        for place, row in enumerate(rows):
            row["objects"] = [{"bbox": item["bbox"], "category": item["category_id"]} for item in row["objects"]]
            if split == "train" and place in bad:
                row["image"] = None
        rows = [{name: row[name] for name in features} for row in rows]
        for number, size in enumerate(sizes):
            part, rows = rows[:size], rows[size:]
            path = folder / "data" / f"{split}-{number:05d}-of-{len(sizes):05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(part, features=features).to_parquet(path)
    return {"source": folder, "val_split": "validation", "bbox_format": "xywh"}


@pytest.mark.parametrize(
    ("processes", "num_workers", "events"), [(1, 0, moments(30, 2)), (1, 2, moments(51, 1)), (2, 0, moments(47, 1))]
)
def test_a_killed_run_ends_as_if_it_had_not_been(server, processes, num_workers, events):
    options = {**STREAM, "num_workers": num_workers}
    name = f"{processes} processes, {num_workers} workers"
    assert set(server.train(f"{name}, whole", processes, **options)) == {0}, server.output()
    whole = results(server.folder / f"{name}, whole")
    assert whole["summary"]["epochs"] == 2 and whole["summary"]["num_training_images"] is None
    assert whole["summary"]["images"] == 28
    server.train_and_kill(name, events, processes=processes, **options)
    assert_same(results(server.folder / name), whole)
    starts = json.loads((server.folder / name / "manifest.json").read_text())
    assert any(start["step"] % 4 for start in starts)  # in the middle of an epoch


def test_so_does_a_run_on_files_with_bad_rows_which_it_counts(server, tmp_path):
    options = {**STREAM, **parquet_folder(tmp_path, [6, 5, 4], bad=(2, 9)), "invalid_data": "skip"}
    assert server.train("files, whole", **options) == [0], server.output()
    output, whole = server.output(), results(server.folder / "files, whole")
    assert whole["summary"]["images"] == 2 * 13
    for epoch in range(2):
        line = f"epoch {epoch}, left out of the stream: 2\n  pictures that do not exist: 2\n"
        assert output.count(line) == 1
    server.train_and_kill("files", moments(60, 1), **options)
    assert_same(results(server.folder / "files"), whole)
    assert "epoch 1, left out of the stream: 2\n" in server.output()


def test_processes_with_unequal_shards_end_their_epochs_together(server, tmp_path):
    """Nine and four pictures: two batches each, which is one step, and the rest of the longer share is dropped."""
    options = {**STREAM, **parquet_folder(tmp_path, [9, 4]), "max_steps": 3, "epochs": 3}
    assert set(server.train("unequal", processes=2, **options)) == {0}, server.output()
    found = results(server.folder / "unequal")
    assert found["summary"]["epochs"] == 3 and found["summary"]["steps"] == 3
    assert found["summary"]["images"] == 3 * 8


def test_other_numbers_of_processes_start_the_epoch_anew(server):
    """A position is that of one share of the stream."""
    name = "two, then one"
    assert set(server.train(name, processes=2, **{**STREAM, "max_steps": 1})) == {0}, server.output()
    assert server.train(name, **{**STREAM, "max_steps": 6}) == [0], server.output()
    summary = results(server.folder / name)["summary"]
    assert summary["steps"] == 6 and summary["images"] == 8 + 14 + 4
    assert "the rest of the epoch in progress has other pictures" in server.output()


# What a recipe may say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [{"max_minutes": 1e-9}, {"epochs": 1, "schedule": "constant"}])  # fmt: skip
def test_any_bound_ends_a_run(tiny_recipe, bounds):
    by = {"schedule_by": "time"} if "max_minutes" in bounds else {}
    summary = train(tiny_recipe(streaming=True, **{"epochs": None, **bounds, **by}))
    assert summary["steps"] == (1 if "max_minutes" in bounds else 3)  # 10 pictures: 5 batches, 3 steps an epoch
    assert summary["epochs"] == (0 if "max_minutes" in bounds else 1)


def test_a_schedule_by_steps_needs_their_number():
    data, training = DataArguments(streaming=True), TrainingArguments(epochs=3)
    with pytest.raises(ValueError, match=r"streaming is true.* steps in 3 epochs is not known: .* needs .*max_steps"):
        Recipe(model={}, data=data, training=training)
    Recipe(model={}, data=data, training=TrainingArguments(max_minutes=3, schedule_by="time"))
    Recipe(model={}, data=DataArguments(), training=training)


@pytest.mark.parametrize("field", [{"holdout": 0.1}, {"overfit": 8}])
def test_what_chooses_among_all_pictures_is_refused(field):
    with pytest.raises(ValueError, match=rf"data.{next(iter(field))} is .* must not be set with data.streaming"):
        DataArguments(streaming=True, **field)


def test_no_batch_size_is_found_for_a_stream(tiny_recipe):
    with pytest.raises(ValueError, match="find_batch_size is true: it must be false with data.streaming"):
        tiny_recipe(streaming=True, max_steps=4, find_batch_size=True)


def test_a_recipe_is_chosen_for_a_folder_but_not_for_a_stream_from_elsewhere(tmp_path):
    options = parquet_folder(tmp_path, [4])
    recipe, _ = choose_recipe(
        str(tmp_path), {"streaming": "true", "bbox_format": "xywh", "backbone_weights": "none", "max_steps": 5}
    )
    assert recipe.data.streaming and recipe.data.val_split == options["val_split"]
    with pytest.raises(ValueError, match="'owner/name' is no folder: .* name one to stream"):
        choose_recipe("owner/name", {"streaming": "true"})


def test_an_empty_stream_is_an_error(tiny_recipe, monkeypatch):
    monkeypatch.setattr(StreamLoader, "__iter__", lambda loader: iter(()))
    with pytest.raises(ValueError, match="stream of training pictures ended where the run stands, in epoch 0"):
        train(tiny_recipe(streaming=True, max_steps=2))


def test_a_stream_of_bad_pictures_alone_tells_what_was_left_out(tiny_recipe, tmp_path):
    options = parquet_folder(tmp_path / "data", [3, 2], bad=range(5)) | {"source": str(tmp_path / "data")}
    with pytest.raises(ValueError, match="in epoch 0: .* 5 were left out of it, pictures that do not exist: 5"):
        train(tiny_recipe(streaming=True, max_steps=2, invalid_data="skip", **options))


def test_the_validation_split_is_no_stream_and_a_stream_has_a_fingerprint(tiny_recipe):
    data = tiny_recipe(streaming=True, max_steps=2).data
    stream, nothing = load_split(data, "train")
    assert isinstance(stream, datasets.IterableDataset) and nothing is None
    assert isinstance(load_split(data, "val")[0], datasets.Dataset)
    assert data_fingerprint(stream)["num_shards"] == 10
    assert categories(stream) == categories(load_split(data, "val")[0])
