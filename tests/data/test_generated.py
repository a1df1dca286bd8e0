import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

from drmm_hf.data import generated
from drmm_hf.data.coco import FEATURES, categories
from drmm_hf.data.generated import generate_shapes


SIZE = (128, 128)


@pytest.fixture(scope="module")
def rows():
    return list(generate_shapes(150, seed=0).remove_columns("image"))


def boxes_of(row):
    boxes = torch.tensor([item["bbox"] for item in row["objects"]])
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)


def test_schema_and_pictures():
    dataset = generate_shapes(2, seed=3, image_size=(96, 160))
    assert dataset.features == FEATURES
    assert [record["name"] for record in categories(dataset)] == ["ellipse", "rectangle", "triangle"]
    assert dataset["image_id"][:] == [1, 2]
    assert dataset[0]["image"].size == (160, 96) == (dataset[0]["width"], dataset[0]["height"])
    ids = [item["id"] for row in dataset for item in row["objects"]]
    assert ids == list(range(1, len(ids) + 1))


def test_pictures_depend_on_seed_and_index_alone():
    few, many, other = generate_shapes(2, seed=1), generate_shapes(4, seed=1), generate_shapes(2, seed=2)
    for i in range(2):
        assert few[i]["objects"] == many[i]["objects"] != other[i]["objects"]
        assert few[i]["image"].tobytes() == many[i]["image"].tobytes() != other[i]["image"].tobytes()


def test_counts_classes_and_sizes(rows):
    counts = [len(row["objects"]) for row in rows]
    assert min(counts) == 3
    assert max(counts) == 12
    objects = [item for row in rows for item in row["objects"]]
    shares = np.bincount([item["category_id"] for item in objects])[[2, 3, 7]] / len(objects)
    assert shares.min() > 0.25
    longest = np.array([max(item["bbox"][2:]) for item in objects])
    assert np.percentile(longest, 99) / np.percentile(longest, 1) > 3.5
    assert longest.max() / longest.min() > 4
    assert all(0 < item["area"] <= item["bbox"][2] * item["bbox"][3] for item in objects)


def test_boxes_lie_inside_their_picture(rows):
    for row in rows:
        boxes = boxes_of(row)
        assert boxes.min() >= 0
        assert boxes.max() <= 128


def overlapping_share(rows):
    overlapping = total = 0
    for row in rows:
        iou = box_iou(boxes_of(row), boxes_of(row))
        labels = torch.tensor([item["category_id"] for item in row["objects"]])
        iou[(labels[:, None] != labels) | torch.eye(len(labels), dtype=torch.bool)] = 0
        assert iou.max() < 0.601  # no two of a class are as good as the same
        overlapping += int((iou > 0.3).any(1).sum())
        total += len(labels)
    return overlapping / total


def test_a_fifth_and_more_overlap_another_of_their_class(rows):
    assert overlapping_share(rows) > 0.25


def test_overlap_is_what_was_asked_for():
    for overlap in (0.0, 0.8):
        rows = generate_shapes(60, seed=0, overlap=overlap).remove_columns("image")
        assert overlapping_share(rows) == pytest.approx(overlap, abs=0.15)


def painted(shape, scale):
    """Rasterise a shape with PIL, `scale` times as large: an implementation of its own."""
    canvas = Image.new("1", (SIZE[1] * scale, SIZE[0] * scale))
    if shape.corners is None:
        t = np.linspace(0, 2 * np.pi, 720)
        points = np.stack([np.cos(t), np.sin(t)], axis=1) * shape.axes @ shape.turn + shape.centre
    else:
        points = shape.corners + shape.centre
    ImageDraw.Draw(canvas).polygon([tuple(point * scale - 0.5) for point in points], fill=1)
    return np.asarray(canvas)


@pytest.mark.parametrize("seed", range(3))
def test_boxes_and_areas_are_those_of_the_painted_shapes(seed):
    scale = 8
    for shape in generated._arrange(np.random.default_rng(seed), SIZE, (3, 12), (0.12, 0.5), 0.3):
        mask = painted(shape, scale)
        y, x = np.nonzero(mask)
        bounds = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) / scale
        assert shape.box == pytest.approx(bounds, abs=2.5 / scale)
        assert shape.annotation(1)["area"] == pytest.approx(mask.sum() / scale**2, rel=0.06)
        where, distance = shape.patch(SIZE)
        drawn = np.zeros(SIZE, dtype=bool)
        drawn[where] = distance < 0
        coarse = mask.reshape(SIZE[0], scale, SIZE[1], scale).mean((1, 3)) > 0.5
        assert (drawn != coarse).sum() <= 0.06 * coarse.sum() + 4


@pytest.mark.parametrize("seed", range(3))
def test_every_object_stays_in_sight(seed):
    shapes = generated._arrange(np.random.default_rng(seed), SIZE, (12, 12), (0.12, 0.5), 0.5)
    assert len(shapes) >= 6
    top = np.full(SIZE, -1)
    masks = [painted(shape, 1) for shape in shapes]
    for i, mask in enumerate(masks):
        top[mask] = i
    for i, mask in enumerate(masks):
        assert (top[mask] == i).mean() > 0.3


def test_the_picture_shows_the_shapes():
    """Without noise, colours jump at the outline: inside the box more than in the ground around it."""
    dataset = generate_shapes(20, seed=0, num_objects=(1, 1), noise=0.0)
    for row in dataset:
        pixels = np.asarray(row["image"], dtype=float)
        jump = np.maximum(np.abs(np.diff(pixels, axis=0))[:, :-1], np.abs(np.diff(pixels, axis=1))[:-1]).max(2)
        y, x = np.nonzero(jump > 25)
        left, top, width, height = row["objects"][0]["bbox"]
        found = np.array([x.min(), y.min(), x.max(), y.max()]) + 1  # a jump lies between two pixels
        assert found == pytest.approx([left, top, left + width, top + height], abs=1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images is 0"),
        ({"image_size": (16, 128)}, r"image_size is \(16, 128\)"),
        ({"num_objects": (5, 3)}, r"num_objects is \(5, 3\)"),
        ({"object_sizes": (0.5, 1.5)}, r"object_sizes is \(0.5, 1.5\)"),
        ({"overlap": -0.1}, "overlap is -0.1"),
        (
            {"image_size": (32, 32), "num_objects": (9, 9), "object_sizes": (1.0, 1.0)},
            r"num_objects is \(9, 9\): 9 of .* do not fit",
        ),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_shapes(**{"num_images": 1, "seed": 0, **arguments})
