import random
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F  # noqa: N812

from drmm_hf.data.augmentation import build_augmentation
from drmm_hf.data.coco import canonical_dataset, categories, load_detection_dataset
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.labels import LabelMap
from drmm_hf.data.loading import DetectionDataset, collate, data_loader, load_image, read_image
from drmm_hf.modeling.image_processing_drmm import DrmmImageProcessor


PROCESSOR = DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 128})


@pytest.fixture(scope="module")
def shapes():
    return generate_shapes(10, seed=0, image_size=(64, 96))


def detection_dataset(dataset, *args, **kwargs):
    return DetectionDataset(dataset, LabelMap.from_categories(categories(dataset)), *args, **kwargs)


def epoch_of(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a["pixel_values"], b["pixel_values"])
        and all(
            torch.equal(x[key], y[key])
            for x, y in zip(a["labels"], b["labels"], strict=True)
            for key in ("boxes", "class_labels", "image_id")
        )
        for a, b in zip(first, second, strict=True)
    )


# Rows --------------------------------------------------------------------------------------------------------------


def test_rows_carry_labels_and_exact_boxes(coco_folder):
    dataset = detection_dataset(load_detection_dataset(coco_folder[0], "val"))
    image, annotation = dataset[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 30, 40)
    assert image[:, 3, 3].tolist() == [7, 100, 200]
    assert annotation == {
        "image_id": 7,
        "annotations": [
            {"id": 5, "category_id": 0, "bbox": [0.0, 0.0, 40.0, 30.0], "area": 600.0, "iscrowd": 1},
            {"id": 8, "category_id": 1, "bbox": [5.0, 6.0, 7.0, 8.0], "area": 56.0, "iscrowd": 0},
        ],
    }
    assert dataset[2][1] == {"image_id": 11, "annotations": []}


def test_augmented_rows_keep_the_form(shapes):
    plain = detection_dataset(shapes)
    flipped = detection_dataset(shapes, build_augmentation("flip", horizontal_flip=1.0))
    for i in range(3):
        (image, before), (mirrored, after) = plain[i], flipped[i]
        assert torch.equal(mirrored, image.flip(2))
        for one, other in zip(before["annotations"], after["annotations"], strict=True):
            x, y, w, h = one["bbox"]
            assert other["bbox"] == pytest.approx([96 - x - w, y, w, h], abs=1e-4)
            assert other["area"] == pytest.approx(one["area"], rel=1e-5)
            assert [one[key] for key in ("id", "category_id", "iscrowd")] == [
                other[key] for key in ("id", "category_id", "iscrowd")
            ]
    empty = one_row(Image.new("RGB", (5, 4)), 5, 4)
    assert detection_dataset(empty, build_augmentation("small_data"))[0][1]["annotations"] == []


def test_category_outside_the_label_map_is_named(shapes):
    with pytest.raises(ValueError, match="is not in the label map"):
        DetectionDataset(shapes, LabelMap((1,), ("other",)))[0]


# Pictures ----------------------------------------------------------------------------------------------------------


def one_row(image, width, height):
    row = {"image_id": 1, "file_name": "one.jpg", "image": image, "width": width, "height": height, "objects": []}
    return canonical_dataset([row], [{"id": 1, "name": "thing"}])


def turned(tmp_path, orientation, size=(40, 20)):
    """A jpeg whose left half is red as stored, with an EXIF orientation."""
    image = Image.new("RGB", size, (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    image.save(path, exif=exif, quality=95, subsampling=0)
    return str(path)


def read(dataset):
    return detection_dataset(dataset)[0][0]


def is_red(pixel):
    return pixel[0] > 200 and pixel[2] < 60


def test_exif_orientation_is_applied(tmp_path):
    image = read(one_row(turned(tmp_path, 6), 20, 40))  # 6: shown turned clockwise, so left becomes top
    assert image.shape == (3, 40, 20)
    assert is_red(image[:, 5, 10])
    assert not is_red(image[:, 35, 10])
    image = read(one_row(turned(tmp_path, 3), 40, 20))  # 3: upside down
    assert not is_red(image[:, 10, 5])
    assert is_red(image[:, 10, 35])


def test_exif_orientation_that_the_annotations_ignore_is_ignored(tmp_path):
    image = read(one_row(turned(tmp_path, 6), 40, 20))
    assert image.shape == (3, 20, 40)
    assert is_red(image[:, 10, 5])


def test_size_that_disagrees_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"'one\.jpg' \(image 1\) is 40 x 20, its annotations say 41 x 20"):
        read(one_row(turned(tmp_path, 6), 41, 20))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_every_8_bit_mode_becomes_rgb(mode):
    image = read(one_row(Image.new("RGB", (6, 5), (255, 255, 255)).convert(mode), 6, 5))
    assert image.shape == (3, 5, 6)
    assert (image == 255).all()


def test_16_bit_pictures_are_refused():
    grey = Image.fromarray(np.full((5, 6), 4000, dtype=np.uint16))
    with pytest.raises(ValueError, match=r"'one\.jpg' \(image 1\) has pixels of mode 'I;?1?6?'"):
        read(one_row(grey, 6, 5))


@given(st.integers(1, 70), st.integers(1, 70), st.data())
@settings(max_examples=60)
def test_pictures_are_decoded_as_pillow_does(height, width, data):
    """Whatever the kind of file, the loader's own decoder gives the pixels of the plain path."""
    modes = {"JPEG": ["RGB", "L", "CMYK", "YCbCr"], "PNG": ["RGB", "L", "RGBA", "P", "1"], "WEBP": ["RGB", "RGBA"]}
    options = {"JPEG": {"quality": data.draw(st.sampled_from([10, 75, 95])), "progressive": data.draw(st.booleans())}}
    kind = data.draw(st.sampled_from(["JPEG", "JPEG", "PNG", "WEBP"]))
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif, turns = Image.Exif(), data.draw(st.sampled_from([None, 1, 3, 6, 0, 9]))
    if turns is not None:
        exif[0x0112] = turns
    file = BytesIO()
    image = Image.fromarray(pixels).convert(data.draw(st.sampled_from(modes[kind])))
    image.save(file, kind, exif=exif, **options.get(kind, {}))
    if turns == 6 and data.draw(st.booleans()):  # annotated as it is displayed
        height, width = width, height
    row = {"image_id": 1, "image": {"bytes": file.getvalue(), "path": None}, "width": width, "height": height}
    decoded, plain = read_image(row), F.pil_to_tensor(load_image(row))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == plain.shape == (3, height, width)
    assert (decoded.int() - plain.int()).abs().max() <= 1


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "missing"])
def test_unreadable_pictures_are_named(tmp_path, damage):
    path = tmp_path / "one.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": b"\xff\xd8" + bytes(99)}.get(damage, data))
    if damage == "missing":
        path = tmp_path / "two.jpg"
    with pytest.raises(OSError, match=r"'one\.jpg' \(image 1\) cannot be read: "):
        read(one_row(str(path), 50, 40))


def test_decoded_rows_are_taken_too(shapes):
    assert load_image(shapes[0]).tobytes() == shapes[0]["image"].tobytes()


# Batches -----------------------------------------------------------------------------------------------------------


def test_batches_hold_what_the_model_takes(shapes):
    dataset = detection_dataset(shapes)
    batch = collate(PROCESSOR, do_resize=True)([dataset[0], dataset[1], dataset[2]])
    assert set(batch) == {"pixel_values", "pixel_mask", "labels"}
    assert batch["pixel_values"].shape == (3, 3, 64, 96)
    for i, labels in enumerate(batch["labels"]):
        assert type(labels) is dict
        objects = shapes[i]["objects"]
        assert labels["class_labels"].tolist() == [dataset.label_map.label(o["category_id"]) for o in objects]
        x, y, w, h = torch.tensor([o["bbox"] for o in objects]).unbind(1)
        expected = torch.stack([(x + w / 2) / 96, (y + h / 2) / 64, w / 96, h / 64], dim=1)
        torch.testing.assert_close(labels["boxes"], expected, atol=1e-6, rtol=0)


def test_pictures_are_resized_once(shapes):
    augment = build_augmentation("flip_multiscale", short_edges=(40,), max_long_edge=100)
    loader = data_loader(detection_dataset(shapes, augment), PROCESSOR, 2, shuffle=False)
    assert next(iter(loader))["labels"][0]["size"].tolist() == [40, 60]
    loader = data_loader(detection_dataset(shapes, build_augmentation("flip")), PROCESSOR, 2, shuffle=False)
    assert next(iter(loader))["labels"][0]["size"].tolist() == [64, 96]


def shuffled_loader(shapes, seed=0, **kwargs):
    augment = build_augmentation("small_data", short_edges=(48, 64), max_long_edge=128)
    return data_loader(detection_dataset(shapes, augment, seed=seed), PROCESSOR, 4, **kwargs)


def test_same_seed_same_batches_other_epoch_other_batches(shapes):
    first, second = shuffled_loader(shapes), shuffled_loader(shapes)
    torch.manual_seed(1)
    start = epoch_of(first, 0)
    torch.manual_seed(2)
    assert same(start, epoch_of(second, 0))
    assert not same(start, epoch_of(second, 1))
    assert not same(start, epoch_of(shuffled_loader(shapes, seed=1), 0))
    assert same(start, epoch_of(first, 0))  # and back again
    ids = [int(labels["image_id"]) for batch in start for labels in batch["labels"]]
    assert sorted(ids) == list(range(1, 11)) != ids


def test_order_changes_with_seed_and_epoch(shapes):
    orders = set()
    for seed in (0, 1):
        sampler = data_loader(detection_dataset(shapes, seed=seed), PROCESSOR, 1).sampler
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            assert list(sampler) == list(sampler)
            orders.add(tuple(sampler))
    assert len(orders) == 4


def test_random_numbers_change_with_seed_epoch_and_row(shapes):
    drawn = []

    def record(image, target):
        drawn.append((float(torch.rand(())), float(np.random.rand()), random.random()))  # noqa: NPY002
        return image, target

    def read_all():
        for seed in (0, 1):
            dataset = detection_dataset(shapes, build_augmentation(record), seed=seed)
            for epoch in (0, 1):
                dataset.set_epoch(epoch)
                for i in (0, 1):
                    dataset[i]

    read_all()
    assert [len(set(column)) for column in zip(*drawn, strict=True)] == [8, 8, 8]
    first = drawn.copy()
    drawn.clear()
    read_all()
    assert drawn == first


@pytest.mark.parametrize("grouped", [False, True])
def test_workers_make_no_difference_and_follow_the_epoch(shapes, grouped):
    alone, workers = (shuffled_loader(shapes, num_workers=n, group_by_aspect_ratio=grouped) for n in (0, 2))
    for epoch in (0, 1, 0):
        assert same(epoch_of(alone, epoch), epoch_of(workers, epoch))


def test_order_and_incomplete_batches(shapes):
    ids = [
        int(labels["image_id"])
        for batch in shuffled_loader(shapes, shuffle=False, drop_last=True)
        for labels in batch["labels"]
    ]
    assert ids == list(range(1, 9))


@pytest.mark.parametrize("grouped", [False, True])
def test_accelerate_sets_the_epoch_and_skips_batches(shapes, grouped):
    prepared = Accelerator(cpu=True).prepare(shuffled_loader(shapes, group_by_aspect_ratio=grouped))
    prepared.set_epoch(3)
    batches = list(prepared)
    assert same(batches, epoch_of(shuffled_loader(shapes, group_by_aspect_ratio=grouped), 3))
    prepared.set_epoch(3)
    assert same(list(skip_first_batches(prepared, 2)), batches[2:])


# Batches of like shape -----------------------------------------------------------------------------------------------


def pictures_of(ratios):
    """A data set that has the sizes of its pictures only."""
    dataset = datasets.Dataset.from_dict(
        {"image": [None] * len(ratios), "width": [round(1000 * r) for r in ratios], "height": [1000] * len(ratios)}
    )
    return DetectionDataset(dataset, LabelMap((1,), ("thing",)), seed=len(ratios))


def batch_ids(dataset, batch_size, epoch=0, **kwargs):
    loader = data_loader(dataset, PROCESSOR, batch_size, group_by_aspect_ratio=True, **kwargs)
    loader.sampler.set_epoch(epoch)
    return list(loader.batch_sampler)


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=300), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=60)
def test_groups_cover_each_picture_once_in_every_shard(ratios, batch_size, processes):
    dataset = pictures_of(ratios)
    batches = batch_ids(dataset, batch_size)
    assert sorted(sum(batches, [])) == list(range(len(ratios)))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert batches == batch_ids(dataset, batch_size)
    whole = batch_ids(dataset, batch_size, drop_last=True)
    assert whole == [batch for batch in batches if len(batch) == batch_size]
    sampler = data_loader(dataset, PROCESSOR, batch_size, group_by_aspect_ratio=True).batch_sampler
    shards = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    assert len({len(shard) for shard in shards}) == 1
    assert {row for shard in shards for batch in shard for row in batch} == set(range(len(ratios)))
    assert [shards[i % processes][i // processes] for i in range(len(batches) - 1)] == batches[:-1]


def test_groups_are_of_like_shape_and_change_every_epoch():
    ratios = np.exp(np.random.default_rng(0).normal(0, 0.4, 1000))
    dataset = pictures_of(ratios)

    def spread(batches):
        return np.mean([np.ptp(np.log(ratios[batch])) for batch in batches])

    plain = data_loader(dataset, PROCESSOR, 4)
    epochs = [batch_ids(dataset, 4, epoch) for epoch in range(3)]
    assert all(spread(batches) < 0.15 * spread(plain.batch_sampler) for batches in epochs)
    first, second, third = ({frozenset(batch) for batch in batches} for batches in epochs)
    assert len(first & second) + len(first & third) + len(second & third) < 10
    shapes = np.log([ratios[batch].mean() for batch in epochs[0]])
    assert abs(np.corrcoef(shapes[1:], shapes[:-1])[0, 1]) < 0.2  # batches come in random order


def test_small_sets_are_not_sorted_as_a_whole():
    dataset = pictures_of(np.linspace(0.5, 2, 40))
    epochs = [{frozenset(batch) for batch in batch_ids(dataset, 4, epoch)} for epoch in range(5)]
    assert all(len(one & other) < 3 for i, one in enumerate(epochs) for other in epochs[:i])


def test_groups_need_shuffling(shapes):
    with pytest.raises(ValueError, match="group_by_aspect_ratio is True: it needs shuffle"):
        shuffled_loader(shapes, shuffle=False, group_by_aspect_ratio=True)


def test_augmentation_leaves_the_random_numbers_of_others_alone(shapes):
    def greedy(image, target):
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        random.random()
        return image, target

    dataset = detection_dataset(shapes, build_augmentation(greedy))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
