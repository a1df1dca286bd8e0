import pickle
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from drmm_hf.data import augmentation
from drmm_hf.data.augmentation import RandomSizeCrop, build_augmentation


PRESETS = ("none", "flip", "flip_multiscale", "paper", "small_data")
SMALL = {"short_edges": (48, 64, 80), "max_long_edge": 100}


def picture(height, width, cells, fills=None):
    """Paint one colour an object into the cells of a 4 x 4 grid; what belongs to an object follows from its id."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes, ids = [], []
    for cell in cells:
        row, column = divmod(cell, 4)
        top, bottom = row * height // 4 + 1, (row + 1) * height // 4 - 1
        left, right = column * width // 4 + 1, (column + 1) * width // 4 - 1
        image[:, top:bottom, left:right] = 60 + 12 * cell
        boxes.append([left, top, right, bottom])
        ids.append(1000 + cell)
    boxes, ids = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(ids, dtype=torch.int64)
    return image, {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": ids % 7,
        "area": (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * share(ids),
        "iscrowd": ids % 2,
        "ids": ids,
    }


def share(ids):
    """The part of its box that an object covers."""
    return (ids % 5 + 1) / 5


def seeded(transform, seed, *inputs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transform(*inputs)


scenes = st.tuples(st.integers(24, 90), st.integers(24, 90), st.sets(st.integers(0, 15), max_size=8))


@settings(max_examples=60)
@given(st.sampled_from(PRESETS), scenes, st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_everything_travels_with_its_box(preset, scene, seed, horizontal, vertical):
    height, width, cells = scene
    build = build_augmentation(preset, horizontal_flip=horizontal, vertical_flip=vertical, **SMALL)
    if preset == "small_data":  # keep colours, which tell the objects apart
        build.transform.transforms[0] = v2.Identity()
    image, target = seeded(build, seed, *picture(height, width, sorted(cells)))
    boxes, ids = target["boxes"].as_subclass(torch.Tensor), target["ids"]
    assert image.dtype == torch.uint8
    assert type(image) is torch.Tensor
    assert {len(value) for value in target.values()} == {len(ids)}
    assert target["boxes"].canvas_size == tuple(image.shape[-2:])
    assert set(ids.tolist()) <= {1000 + cell for cell in cells}
    assert torch.equal(target["labels"], ids % 7)
    assert torch.equal(target["iscrowd"], ids % 2)
    sides = boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close(target["area"], sides.prod(1) * share(ids))
    assert (sides >= 1).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor(image.shape[:-3:-1])).all()
    for (x, y), (w, h), number in zip((boxes[:, :2] + boxes[:, 2:]) / 2, sides, ids, strict=True):
        if min(height, width) >= 48 and min(w, h) > 8:  # beyond the reach of two resampling filters in a row
            assert abs(int(image[0, int(y), int(x)]) - (60 + 12 * (int(number) - 1000))) <= 3
    if preset in ("none", "flip", "flip_multiscale"):
        assert len(ids) == len(cells)


@given(scenes)
@settings(max_examples=30)
def test_flips_are_involutions(scene):
    height, width, cells = scene
    image, target = picture(height, width, sorted(cells))
    for sides in ({"horizontal_flip": 1.0}, {"horizontal_flip": 0.0, "vertical_flip": 1.0}):
        flip = build_augmentation("flip", **sides)
        once, once_target = flip(image, target)
        twice, twice_target = flip(once, once_target)
        assert torch.equal(once, image.flip(2 if sides["horizontal_flip"] else 1))
        assert torch.equal(twice, image)
        for key in target:
            torch.testing.assert_close(twice_target[key], target[key], rtol=1e-5, atol=1e-4)


def test_none_changes_nothing():
    image, target = picture(40, 60, [1, 5])
    after, after_target = build_augmentation("none")(image, target)
    assert torch.equal(after, image)
    for key in target:
        torch.testing.assert_close(after_target[key], target[key])


def test_boxes_that_overshoot_are_clipped_not_lost():
    image, target = picture(40, 60, [0, 5])
    target["boxes"][0] = torch.tensor([-2.0, -2.0, 14.0, 9.0])
    _, after = build_augmentation("flip", horizontal_flip=0.0)(image, target)
    assert after["ids"].tolist() == [1000, 1005]
    assert after["boxes"][0].tolist() == [0.0, 0.0, 14.0, 9.0]


@pytest.mark.parametrize("preset", ["flip_multiscale", "paper", "small_data"])
def test_resized_pictures_have_the_sizes_asked_for(preset):
    augment = build_augmentation(preset, short_edges=(64, 80), max_long_edge=100)
    assert augment.resizes
    shorter, longer = set(), set()
    for seed in range(20):
        image, _ = seeded(augment, seed, *picture(60, 60 if seed % 2 else 120, [1, 5, 9]))
        shorter.add(min(image.shape[-2:]))
        longer.add(max(image.shape[-2:]))
    assert max(longer) <= 100
    assert {64, 80} <= shorter
    assert not any(build_augmentation(name).resizes for name in ("none", "flip"))


@pytest.mark.parametrize(("height", "width"), [(700, 900), (500, 450), (300, 700), (384, 384)])
def test_paper_crop_has_sides_of_384_to_600(height, width):
    image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
    _, target = picture(height, width, range(16))
    crop, seen, corners = RandomSizeCrop(384, 600), set(), set()
    for seed in range(30):
        part, after = seeded(crop, seed, image, target)
        for before, side in zip((height, width), part.shape[-2:], strict=True):
            assert min(before, 384) <= side <= min(before, 600)
        assert after["boxes"].canvas_size == tuple(part.shape[-2:])
        seen.add(tuple(part.shape[-2:]))
        left, top = (after["boxes"] - target["boxes"]).min(0).values[:2].tolist()
        corners.add((max(-left, 0), max(-top, 0)))
    assert (len(seen) > 10) == (len(corners) > 10) == (max(height, width) > 384)


def test_paper_preset_crops_half_of_the_pictures():
    augment = build_augmentation("paper", short_edges=(64,))
    image, target = picture(480, 640, range(16))
    sizes = [seeded(augment, seed, image, target)[0].shape[-2:] for seed in range(60)]
    whole = sum(size == (64, 85) for size in sizes)  # the shape of the picture, which hardly any part has
    assert 20 <= whole <= 40


def test_crop_of_the_paper_preset_is_in_proportion_to_the_input():
    options = {"short_edges": (64,), "max_long_edge": 96, "crop_short_edges": (64, 96), "crop_sizes": (32, 48)}
    augment = build_augmentation("paper", horizontal_flip=0, **options)
    image, target = picture(120, 160, range(16))
    widths = []
    for seed in range(60):
        _, after = seeded(augment, seed, image, target)
        height, width = after["boxes"].canvas_size
        edges = torch.tensor([0, 0, width, height])
        inner = after["boxes"][((after["boxes"] - edges).abs() > 1).all(-1)]  # cut by no edge
        if len(inner):
            widths.append((inner[0, 2] - inner[0, 0]).item())
    # A box of 38 pixels in a picture of 120 is 20 in one of 64; crops enlarge it by 64 / 48 to 96 / 32.
    assert min(widths) >= 20 and 40 < max(widths) <= 64


def test_colour_distortion_changes_colours_only():
    image, target = picture(64, 64, [1, 5])
    plain = build_augmentation("flip", horizontal_flip=0)
    always = build_augmentation("flip", horizontal_flip=0, colour_distortion=1.0)
    half = build_augmentation("flip", horizontal_flip=0, colour_distortion=0.5)
    assert all(torch.equal(seeded(plain, seed, image, target)[0], image) for seed in range(5))
    for seed in range(5):
        assert torch.equal(seeded(always, seed, image, target)[1]["boxes"], target["boxes"])
    changed = [
        sum(not torch.equal(seeded(augment, seed, image, target)[0], image) for seed in range(60))
        for augment in (half, always)
    ]
    assert 15 <= changed[0] <= 45 < changed[1]


def test_presets_survive_pickling():
    for preset in PRESETS:
        augment = build_augmentation(preset, **SMALL)
        again = pickle.loads(pickle.dumps(augment))
        first, second = (seeded(a, 3, *picture(50, 70, [0, 3, 8])) for a in (augment, again))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1]["boxes"], second[1]["boxes"])


def test_own_function_is_applied_and_areas_follow():
    def double_and_drop_first(image, target):
        image, target = v2.Resize((80, 120))(image, target)
        return image, {key: target[key][1:] for key in target if key != "boxes"} | {
            "boxes": tv_tensors.wrap(target["boxes"][1:], like=target["boxes"])
        }

    image, target = picture(40, 60, [2, 6, 7])
    augment = build_augmentation(double_and_drop_first)
    assert not augment.resizes
    after, after_target = augment(image, target)
    assert after.shape == (3, 80, 120)
    assert after_target["ids"].tolist() == [1006, 1007]
    torch.testing.assert_close(after_target["area"], target["area"][1:] * 4)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda image, target: (image.float(), target), r"picture of torch.float32 .* must be torch.uint8"),
        (
            lambda image, target: (image[:, :9], target),
            r"size \(9, 60\), must be .*canvas_size of its boxes, \(40, 60\)",
        ),
        (lambda image, target: (image, target | {"boxes": torch.zeros(2, 4)}), "must be BoundingBoxes"),
        (lambda image, target: (image, target | {"labels": target["labels"][1:]}), "must match the number of labels"),
    ],
)
def test_own_function_that_breaks_the_contract(own, message):
    with pytest.raises(ValueError, match=message):
        build_augmentation(own)(*picture(40, 60, [2, 6]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "mosaic"}, r"augmentation is 'mosaic', must be one of \['none', 'flip'"),
        ({"horizontal_flip": 2}, "horizontal_flip is 2, must be a probability"),
        ({"vertical_flip": -1}, "vertical_flip is -1"),
        ({"preset": "paper", "short_edges": ()}, r"short_edges is \[\]"),
        ({"colour_distortion": 1.5}, "colour_distortion is 1.5, must be a probability"),
        ({"preset": "paper", "crop_short_edges": (0,)}, r"crop_short_edges is \[0\], must hold sizes of at least 1"),
        (
            {"preset": "paper", "crop_sizes": (600, 384)},
            r"crop_sizes is \[600, 384\], must be a shortest and a longest side",
        ),
        ({"preset": "paper", "crop_sizes": (384,)}, r"crop_sizes is \[384\]"),
        (
            {"preset": "small_data", "short_edges": (800,), "max_long_edge": 640},
            r"short_edges is \[800\], must hold sizes from 1 to the longest edge, 640",
        ),
        ({"preset": "no_such_module:augment"}, "must name a function as package.module:function: No module named"),
        ({"preset": "math:no_such_function"}, "'math:no_such_function', must name a function .* no attribute"),
        ({"preset": "math:pi"}, "'math:pi', must name a function, is a float"),
        ({"preset": ":augment"}, "':augment', must name a function"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_augmentation(**{"preset": "flip", **arguments})


def test_what_a_preset_does_not_use_is_not_checked():
    unused = {"short_edges": (), "crop_sizes": (), "crop_short_edges": ()}
    assert not build_augmentation("flip", **unused).resizes
    assert build_augmentation("flip_multiscale", crop_sizes=(), crop_short_edges=()).resizes


def test_a_function_is_found_by_name(tmp_path, monkeypatch):
    module = """
        def darken(image, target):
            return image // 2, target

        def shrink(image, target):
            raise NotImplementedError
        shrink.resizes = True
    """
    (tmp_path / "augmentations_of_mine.py").write_text(textwrap.dedent(module))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    image, target = picture(40, 60, [2, 6])
    augment = build_augmentation("augmentations_of_mine:darken")
    assert torch.equal(augment(image, target)[0], image // 2)
    assert not augment.resizes
    assert build_augmentation("augmentations_of_mine:shrink").resizes


def test_paper_has_the_distribution_of_the_paper():
    """Flip, half of the time resize and crop, resize: against numbers drawn in numpy, at a tenth of the size."""
    height, width, count = 72, 96, 1000
    options = {"short_edges": range(48, 81, 3), "max_long_edge": 113, "crop_short_edges": (40, 50, 60)}
    augment = build_augmentation("paper", crop_sizes=(38, 60), **options)
    cells = [(x, y) for x in range(0, width, 12) for y in range(0, height, 12)]
    boxes = torch.tensor([[x, y, x + 12, y + 12] for x, y in cells], dtype=torch.float32)
    ids = torch.arange(len(cells))
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "area": torch.full((len(ids),), 144.0),
    } | dict.fromkeys(("labels", "iscrowd", "ids"), ids)
    image = torch.zeros(3, height, width, dtype=torch.uint8)

    def seen(seed):
        """Return size, and the part of the picture that is left: found from edges of cells that are inside."""
        _, after = seeded(augment, seed, image, target)
        now, before, row = after["boxes"].numpy(), boxes[after["ids"]].numpy(), []
        for axis, side in ((0, width), (1, height)):
            size = after["boxes"].canvas_size[1 - axis]
            inner = (now[:, axis] > 0.01) & (now[:, axis + 2] < size - 0.01)
            slope, start = np.polyfit(*(edges[inner, axis::2].mean(1) for edges in (now, before)), 1)
            ends = sorted((start, start + slope * size))
            row += [size, ends[0] / side, ends[1] / side]
            if axis == 0:
                row.append(slope < 0)
        return row

    rng = np.random.default_rng(0)

    def resized(sides, edges, longest):
        scale = min(rng.choice(edges) / min(sides), longest / max(sides))
        return [int(side * scale + 0.5) for side in sides]

    def drawn():
        flipped, sides, part = rng.random() < 0.5, [width, height], [(0, 1), (0, 1)]
        if rng.random() < 0.5:
            whole = resized(sides, options["crop_short_edges"], 10**4)
            sides = [rng.integers(min(38, side), min(60, side), endpoint=True) for side in whole]
            corners = [rng.integers(0, side - cut, endpoint=True) for side, cut in zip(whole, sides, strict=True)]
            part = [(a / side, (a + cut) / side) for a, cut, side in zip(corners, sides, whole, strict=True)]
        w, h = resized(sides, options["short_edges"], 113)
        return [w, *part[0], flipped, h, *part[1]]

    ours = np.array([seen(seed) for seed in range(count)], dtype=float)
    theirs = np.array([drawn() for _ in range(10 * count)], dtype=float)
    for one, other in zip(ours.T, theirs.T, strict=True):
        points = np.unique(np.concatenate([one, other]).round(3)) + 5e-4
        shares = [np.searchsorted(np.sort(values), points) / len(values) for values in (one, other)]
        # Kolmogorov and Smirnov: two samples of one distribution differ more once in 1000 times.
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * (1.1 / count) ** 0.5


def test_paper_short_edges():
    assert augmentation.PAPER_SHORT_EDGES == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (augmentation.PAPER_CROP_SHORT_EDGES, augmentation.PAPER_CROP_SIZES) == ((400, 500, 600), (384, 600))


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_multiscale_leaves_a_pixel_of_long_and_thin_pictures(size):
    augmentation = build_augmentation("flip_multiscale", short_edges=[64], max_long_edge=96)
    boxes = tv_tensors.BoundingBoxes([[0.0, 0.0, size[1], size[0]]], format="XYXY", canvas_size=size)
    ones = torch.ones(1, dtype=torch.int64)
    target = {"boxes": boxes, "labels": ones, "area": torch.tensor([2000.0]), "iscrowd": 0 * ones, "ids": ones}
    image, target = augmentation(torch.zeros(3, *size, dtype=torch.uint8), target)
    assert sorted(image.shape[1:]) == [1, 96]
    assert len(target["boxes"]) == 1
