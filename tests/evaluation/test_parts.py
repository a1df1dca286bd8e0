"""Whoever predicts the parts, whenever and from whatever they are read: the same detections, each picture once."""

import os
import re
import shutil
import weakref
from types import SimpleNamespace
from zipfile import ZipFile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from drmm_hf.data.coco import canonical_dataset
from drmm_hf.evaluation.coco_metrics import ground_truth
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import evaluate
from drmm_hf.evaluation.parts import _write, fingerprint, part_size, predict_parts, remove_parts
from drmm_hf.evaluation.predict import predict


class KilledError(Exception):
    """In the place of a signal."""


class Mean(torch.nn.Module):
    """A detector whose results depend on all pictures of its batch, as rounding does."""

    def __init__(self, weight=1.0, last=10**9):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))
        self.seen, self.last = [], last
        self.config = SimpleNamespace(id2label={0: "LABEL_0"}, category_ids=None)

    def forward(self, pixel_values):
        levels = pixel_values[:, 0, 0, 0]
        self.seen += levels.tolist()
        if len(self.seen) > self.last:
            raise KilledError
        logits = (levels + 1e-3 * levels.mean())[:, None, None] * self.weight
        return {"logits": logits, "pred_boxes": logits.expand(-1, -1, 4)}


class Processor:
    def __call__(self, images, return_tensors):
        level = float(images[0].getpixel((0, 0))[0])
        return {"pixel_values": torch.full((1, 3, images[0].height, images[0].width), level)}

    def post_process_object_detection(self, outputs, threshold, target_sizes):
        return [
            {"scores": one[:, 0] / 512, "labels": torch.zeros(1, dtype=torch.long), "boxes": torch.ones(1, 4) * one}
            for one in outputs["logits"]
        ]


def picture(index):
    return Image.new("RGB", (8, 6) if index % 3 else (6, 8), (index % 256,) * 3)


def rows(count):
    return [{"image_id": 1000 - 7 * index, "image": picture(index)} for index in range(count)]


def images_of(some):
    return [{"id": row["image_id"], "file_name": f"{row['image_id']}.png"} for row in some]


def process(index, number):
    return SimpleNamespace(process_index=index, num_processes=number, wait_for_everyone=lambda: None)


def same(one, other):
    assert list(one) == list(other)
    for image_id in one:
        assert one[image_id].keys() == other[image_id].keys()
        assert all(np.array_equal(one[image_id][name], other[image_id][name]) for name in one[image_id])


CASES = [(0, 1, 2), (1, 2, 3), (7, 2, 2), (40, 1, 3), (61, 3, 2), (90, 2, 3), (90, 1, 1)]


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize(("count", "batch_size", "number"), CASES)
def test_processes_kills_and_streams_change_no_bit(count, batch_size, number, stream, tmp_path):
    """Each picture is predicted once, but for those of a part that was not finished."""
    some = rows(count)
    images = images_of(some)
    alone = predict_parts(Mean(), Processor(), some, images, batch_size=batch_size, progress=False)
    assert sorted(alone) == sorted(record["id"] for record in images)
    seen, killed = [], count // (2 * number)
    for last in (killed, 10**9):
        for rank in reversed(range(number)):  # the main process comes last, since nobody waits here
            model = Mean(last=last)
            options = {"batch_size": batch_size, "processes": process(rank, number), "progress": False}
            try:
                source = iter(some) if stream else some
                found = predict_parts(model, Processor(), source, images, tmp_path, **options)
            except (KilledError, ValueError):  # the main process misses parts of others that were killed
                assert last == killed
                found = None
            assert found is None or rank == 0
            seen += model.seen
    same(found, alone)
    size = part_size(count, batch_size)
    assert len(seen) <= count + number * (size + batch_size)


def test_parts_are_small_enough_to_share_and_large_enough_to_fill_batches():
    assert [part_size(count) for count in (5000, 118_000, 73, 0)] == [157, 256, 4, 4] and part_size(73, 8) == 32
    with pytest.raises(ValueError, match="2 processes share the pictures; the rule is a folder"):
        predict_parts(Mean(), Processor(), rows(2), images_of(rows(2)), processes=process(0, 2), progress=False)


def test_work_on_something_else_is_said_and_begun_afresh(tmp_path, capsys):
    some = rows(40)
    images = images_of(some)
    for last in (12, 13):
        with pytest.raises(KilledError):
            predict_parts(Mean(last=last), Processor(), some, images, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.npz"))) == 6
    assert f"going on from 3 parts in {folder}" in capsys.readouterr().out
    model = Mean()
    predict_parts(model, Processor(), some, images, tmp_path)
    assert len(model.seen) == 40 - 6 * 4
    model = Mean(weight=1.5)
    predict_parts(model, Processor(), some, images, tmp_path)
    assert len(model.seen) == 40
    assert f"{folder} holds unfinished work on another model, data or options" in capsys.readouterr().out


def test_what_makes_other_detections_makes_another_fingerprint():
    def rows_of(name, last=None):
        folders = (name, name, last or name)
        pictures = [{"path": f"{folder}/{index}.png", "bytes": None} for index, folder in enumerate(folders)]
        features = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(decode=False)})
        return datasets.Dataset.from_dict({"image_id": [0, 1, 2], "image": pictures}, features)

    images, options = [{"id": index, "file_name": f"{index}.png"} for index in range(3)], {"top_k": 100}
    same = {fingerprint(Mean(), Processor(), rows_of("a"), images, options) for _ in range(2)}
    other_config = Mean()
    other_config.config = SimpleNamespace(to_dict=lambda: {"top_k_ratio": 0.5})
    others = [
        fingerprint(Mean(1.5), Processor(), rows_of("a"), images, options),
        fingerprint(Mean().double(), Processor(), rows_of("a"), images, options),
        fingerprint(other_config, Processor(), rows_of("a"), images, options),
        fingerprint(Mean(), SimpleNamespace(to_dict=lambda: {"size": 4}), rows_of("a"), images, options),
        fingerprint(Mean(), Processor(), rows_of("b"), images, options),
        fingerprint(Mean(), Processor(), rows_of("a").select([1, 0, 2]), images, options),
        fingerprint(Mean(), Processor(), rows_of("a", last="b"), images, options),
        fingerprint(Mean(), Processor(), rows_of("a"), images[:2], options),
        fingerprint(Mean(), Processor(), rows_of("a"), images, {"top_k": 10}),
    ]
    assert len(same) == 1 and len({*same, *others}) == 10


def file_rows(folder, count):
    """Return rows of picture files, which hold noise so that their sizes differ."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    pictures = [{"path": str(folder / f"{index}.png"), "bytes": None} for index in range(count)]
    features = datasets.Features({"image_id": datasets.Value("int64"), "image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image_id": list(range(count)), "image": pictures}, features)


CHANGES = [("rows", "size"), ("rows", "time"), ("stream", "size"), ("stream", "time"), ("bytes", "one bit")]


@pytest.mark.parametrize(("form", "change"), CHANGES)
def test_a_picture_of_other_content_under_the_same_name_is_another_picture(form, change, tmp_path):
    """Even the last one. Of files, size and time are looked at; what is in memory is read."""
    dataset, last = file_rows(tmp_path, 3), tmp_path / "2.png"

    def digest():
        rows = dataset.to_iterable_dataset(num_shards=2) if form == "stream" else dataset
        if form == "bytes":
            pictures = [{"path": None, "bytes": (tmp_path / f"{index}.png").read_bytes()} for index in range(3)]
            rows = datasets.Dataset.from_dict({"image_id": [0, 1, 2], "image": pictures}, dataset.features)
        return fingerprint(Mean(), Processor(), rows, [{"id": index} for index in range(3)], {})

    before, content, time = digest(), last.read_bytes(), last.stat().st_mtime_ns
    assert digest() == before
    if change == "one bit":
        last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        last.write_bytes(content + b"more" * (change == "size"))
        os.utime(last, ns=(time, time + (change == "time")))
    assert digest() != before


def test_copies_of_the_pictures_on_other_machines_may_have_other_times(tmp_path, monkeypatch):
    """Processes agree on the times that the main process sees, and on one folder."""
    dataset, digests = file_rows(tmp_path, 3), set()
    sent = []
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda objects: (sent.extend(objects), sent[:1])[1])
    for rank in range(2):
        digests.add(fingerprint(Mean(), Processor(), dataset, [], {}, process(rank, 2)))
        os.utime(tmp_path / "1.png", ns=(0, rank))
    assert len(digests) == 1 and len(sent) == 2


def test_a_stream_is_never_held(tmp_path):
    """Few pictures live at any moment, and detections are arrays of their own."""
    alive, most = set(), 0

    def stream():
        nonlocal most
        for index in range(700):
            image = picture(index)
            alive.add(index)
            weakref.finalize(image, alive.discard, index)
            most = max(most, len(alive))
            yield {"image_id": index, "image": image}

    images = [{"id": index} for index in range(700)]
    found = predict_parts(Mean(), Processor(), stream(), images, tmp_path, batch_size=4, progress=False)
    assert len(found) == 700 and most <= 4 * 4 + 2
    assert len(list(tmp_path.glob("*/*.npz"))) == 700 // part_size(700, 4) + 1
    result = predict(Mean(), Processor(), rows(4), batch_size=4, progress=False)[1000]
    assert all(array.base is None or array.base.nbytes <= array.nbytes for array in result.values())


def test_pictures_of_a_stream_that_nobody_annotated_are_named():
    some = rows(5)
    with pytest.raises(ValueError, match="image_id 972 has no entry in the annotations"):
        predict_parts(Mean(), Processor(), iter(some), images_of(some[:4]), progress=False)


def test_a_dataset_and_its_stream_give_the_same_figures_and_files(tmp_path):
    """A repeated picture counts once, and one that is annotated but not there is an error."""
    data = [
        row | {"file_name": f"{row['image_id']}.png", "width": row["image"].width, "height": row["image"].height}
        for row in rows(9)
    ]
    for row in data:
        row["objects"] = [{"id": row["image_id"], "category_id": 0, "bbox": [0.0, 0.0, 4.0, 4.0], "area": 16.0}]
        row["objects"][0]["iscrowd"] = 0
    dataset = canonical_dataset(data, [{"id": 0, "name": "thing"}])
    annotations = ground_truth(dataset)
    written = []
    for name, source in (
        ("dataset", dataset),
        ("stream", dataset.to_iterable_dataset(num_shards=2)),
        ("repeated", datasets.concatenate_datasets([dataset, dataset.select([3, 3])])),
    ):
        folder = tmp_path / name
        metrics = evaluate(Mean(), Processor(), source, annotations, folder, batch_size=2, progress=False)
        assert metrics["num_images"] == 9 and metrics["num_detections"] == 0 or metrics["num_detections"] == 9
        written.append((folder / "detections.json").read_bytes() + (folder / "metrics.json").read_bytes())
        assert not (folder / "parts").exists()
    assert len(set(written)) == 1
    with pytest.raises(ValueError, match="1 of 9 annotated pictures are not in the dataset"):
        evaluate(Mean(), Processor(), dataset.to_iterable_dataset().take(8), annotations, progress=False)


def test_only_our_own_parts_are_removed(tmp_path):
    """A user keeps a folder of the same name in the output."""
    own = [
        tmp_path / "parts" / "letter.txt",
        tmp_path / "parts" / ("a" * 16) / "notes.txt",
        tmp_path / "parts" / "spare" / "000000.npz",
    ]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    some = rows(40)
    with pytest.raises(KilledError):
        predict_parts(Mean(last=12), Processor(), some, images_of(some), tmp_path / "parts", progress=False)
    predict_parts(Mean(1.5), Processor(), some, images_of(some), tmp_path / "parts", progress=False)
    assert len(list((tmp_path / "parts").glob("*/*.npz"))) == 10 + 1
    remove_parts(tmp_path / "parts")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(own)


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"batch_size": 0}, {"batch_size": -1}])
def test_wrong_options_cost_no_parts(wrong, tmp_path):
    some = rows(40)
    with pytest.raises(KilledError):
        predict_parts(Mean(last=12), Processor(), some, images_of(some), tmp_path, progress=False)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="the rule is at least 1"):
        predict_parts(Mean(), Processor(), some, images_of(some), tmp_path, progress=False, **wrong)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_part_is_named_and_predicted_again(tmp_path, capsys):
    some = rows(40)
    images = images_of(some)
    alone = predict_parts(Mean(), Processor(), some, images, progress=False)
    with pytest.raises(KilledError):
        predict_parts(Mean(last=12), Processor(), some, images, tmp_path)
    first, second, third = sorted(tmp_path.glob("*/*.npz"))
    second.write_bytes(second.read_bytes()[:100])
    model = Mean()
    same(predict_parts(model, Processor(), some, images, tmp_path), alone)
    assert len(model.seen) == 40 - 2 * 4
    said = capsys.readouterr().out
    assert f"{second} is damaged: " in said and "predicted again" in said and "going on from 2 parts" in said


def exchange(one, other):
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


SUBSTITUTES = {
    "another model": lambda parts, strange: shutil.copy(strange, parts[1]),
    "swapped": lambda parts, strange: exchange(parts[0], parts[1]),
    "twice": lambda parts, strange: shutil.copy(parts[0], parts[1]),
    "of no run": lambda parts, strange: Detections.load_arrays(parts[1]).save_arrays(parts[1]),
    "too many": lambda parts, strange: shutil.copy(parts[0], parts[0].with_name("000099.npz")),
}


@pytest.mark.parametrize("kind", SUBSTITUTES)
def test_a_part_that_is_not_what_its_name_says_is_predicted_again(kind, tmp_path, capsys):
    dataset = file_rows(tmp_path / "pictures", 40)
    images = [{"id": index} for index in range(40)]
    alone = predict_parts(Mean(), Processor(), dataset, images, progress=False)
    for weight in (1.5, 1.0):
        with pytest.raises(KilledError):
            predict_parts(Mean(weight, last=12), Processor(), dataset, images, tmp_path / "parts")
        (place,) = (tmp_path / "parts").iterdir()
        shutil.copytree(place, tmp_path / f"copy {weight}")
    SUBSTITUTES[kind](sorted(place.glob("*.npz")), tmp_path / "copy 1.5" / "000001.npz")
    capsys.readouterr()
    same(predict_parts(Mean(), Processor(), dataset, images, tmp_path / "parts"), alone)
    said = capsys.readouterr().out
    assert said.count("its pictures are predicted again") == {"swapped": 2}.get(kind, 1)
    assert f"going on from {({'swapped': 1, 'too many': 3}).get(kind, 2)} parts" in said


def test_a_part_of_other_pictures_is_predicted_again(tmp_path, capsys):
    """As one that an earlier version of this file mixed up, whatever it says of itself."""
    dataset = file_rows(tmp_path / "pictures", 40)
    images = [{"id": index} for index in range(40)]
    with pytest.raises(KilledError):
        predict_parts(Mean(last=12), Processor(), dataset, images, tmp_path / "parts")
    first, second, third = sorted((tmp_path / "parts").glob("*/*.npz"))
    _write(Detections.load_arrays(first), second)
    found = predict_parts(Mean(), Processor(), dataset, images, tmp_path / "parts")
    assert f"{second} is of other pictures: its pictures are predicted again" in capsys.readouterr().out
    assert list(found) == list(range(40))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("scores", np.nan, "holds numbers that are not finite"),
        ("boxes", np.inf, "holds numbers that are not finite"),
        ("image_ids", 0, "was added twice"),
    ],
)
def test_a_part_of_impossible_numbers_is_named_and_predicted_again(name, value, rule, tmp_path, capsys):
    """Whole as a file, and marked as what its place says: it would stop every evaluation."""
    dataset = file_rows(tmp_path / "pictures", 40)
    images = [{"id": index} for index in range(40)]
    alone = predict_parts(Mean(), Processor(), dataset, images, progress=False)
    with pytest.raises(KilledError):
        predict_parts(Mean(last=12), Processor(), dataset, images, tmp_path / "parts")
    first, *_ = sorted((tmp_path / "parts").glob("*/*.npz"))
    with np.load(first) as file:
        arrays = dict(file)
    arrays[name][:2] = value
    np.savez(first, **arrays)
    with ZipFile(first, "a") as archive:
        archive.comment = f"{first.parent.name}/{first.stem}".encode()
    capsys.readouterr()
    same(predict_parts(Mean(), Processor(), dataset, images, tmp_path / "parts"), alone)
    said = capsys.readouterr().out
    assert re.search(f"{re.escape(str(first))} is damaged: .*{rule}.*: its pictures are predicted again", said)


@pytest.mark.parametrize("place", ["part", "run", "parts"])
def test_what_is_in_the_way_of_parts_is_named(place, tmp_path):
    some = rows(40)
    images = images_of(some)
    with pytest.raises(KilledError):
        predict_parts(Mean(last=12), Processor(), some, images, tmp_path / "parts", progress=False)
    (run,) = (tmp_path / "parts").iterdir()
    path = {"part": run / "000003.npz", "run": run, "parts": tmp_path / "parts"}[place]
    if place == "part":
        path.mkdir()
        (path / "letter.txt").write_text("mine")
    else:
        shutil.rmtree(path)
        path.write_text("mine")
    rule = "a file of detections" if place == "part" else "a folder"
    with pytest.raises(ValueError, match=f"{path}.* is a (file|folder); the rule is {rule}"):
        predict_parts(Mean(), Processor(), some, images, tmp_path / "parts", progress=False)
    assert "mine" in {file.read_text() for file in tmp_path.rglob("*") if file.suffix != ".npz" and file.is_file()}
