"""Level choice and pooling against torchvision's RoIAlign, level by level."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from drmm_hf.modeling.roi_pooling import FeatureMaps, pool_regions, roi_levels, weighted_sums


STRIDES = (4, 8, 16, 32)
coordinates = st.floats(-300, 600, allow_nan=False, width=32)
any_box = st.tuples(coordinates, coordinates, coordinates, coordinates)
EDGES = [
    (10.0, 20.0, 10.0, 20.0),  # no area
    (10.0, 20.0, 90.0, 20.0),
    (50.0, 60.0, 20.0, 80.0),  # one side inverted: no level
    (50.0, 60.0, 20.0, 10.0),  # both inverted: sampled mirrored
    (3.2, 4.1, 3.4, 4.2),  # within a cell
    (-500.0, -500.0, -400.0, -450.0),  # outside on each side
    (400.0, 300.0, 500.0, 380.0),
    (-4.0, -4.0, 0.0, 0.0),  # touches the corner
    (-1e6, -1e6, 1e6, 1e6),  # huge
    (0.0, 0.0, 112.0, 112.0),  # exactly a boundary of levels
    (0.0, 0.0, 112.0 - 1e-3, 112.0),
    (0.0, 0.0, 224.0, 224.0),
    (0.0, 0.0, 448.0, 448.0),
]


def level_of(box, base=56, num_levels=4):
    """The public rule on one box, in plain numbers."""
    left, top, right, bottom = box
    area = (right - left) * (bottom - top)
    if area < 0:
        return -1
    return min(max(math.floor(math.log2(math.sqrt(area) / base + 1e-6)), 0), num_levels - 1)


def pyramid(batch_size=2, channels=3, height=64, width=96, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]
    return [torch.randn(batch_size, channels, *size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def pool_with_torchvision(maps, boxes, size, ratio, base=56):
    """Pool every box on every level and keep the level that the rule names."""
    pooled = boxes.new_zeros(*boxes.shape[:2], size * size, maps[0].shape[1])
    for image, image_boxes in enumerate(boxes):
        for index, box in enumerate(image_boxes):
            level = level_of(box.tolist(), base, len(maps))
            if level >= 0:
                region = roi_align(
                    maps[level][image : image + 1], [box[None]], size, 1 / STRIDES[level], ratio, aligned=True
                )
                pooled[image, index] = region[0].flatten(1).T
    return pooled


def near_a_boundary(box):
    side = math.sqrt(abs((box[2] - box[0]) * (box[3] - box[1])))
    return any(abs(side - boundary) < 1e-3 for boundary in (112, 224, 448))


@given(any_box)
@settings(max_examples=60)
def test_levels_follow_the_public_rule(box):
    assume(not near_a_boundary(box))
    assert roi_levels(torch.tensor(box, dtype=torch.float64), 4, 56).item() == level_of(box)


def test_levels_of_edge_cases():
    assert roi_levels(torch.tensor(EDGES), 4, 56).tolist() == [level_of(box) for box in EDGES]
    assert [level_of(box) for box in EDGES[-4:]] == [1, 0, 2, 3]
    broken = torch.tensor([[math.nan] * 4, [0, 0, math.inf, 5], [0, math.nan, 9, 9], [-1e30, -1e30, 1e30, 1e30]])
    assert roi_levels(broken, 4, 56).tolist() == [-1, 3, -1, 3]


@given(st.lists(any_box, min_size=2, max_size=2), st.sampled_from([(7, 2), (3, 1), (2, 3)]), st.integers(0, 5))
@example([EDGES[0], EDGES[1]], (7, 2), 0)
@settings(max_examples=25)
def test_equals_torchvision_with_its_gradients(boxes, sizes, seed):
    size, ratio = sizes
    boxes = torch.tensor(boxes, dtype=torch.float64).expand(2, -1, -1).contiguous()
    assume(not any(near_a_boundary(box) for box in boxes[0].tolist()))
    maps = pyramid(seed=seed)
    ours, theirs = pool_regions(maps, boxes, STRIDES, size, ratio, 56), pool_with_torchvision(maps, boxes, size, ratio)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((theirs * weight).sum() + sum(0 * m.sum() for m in maps), maps)
    found = torch.autograd.grad((ours * weight).sum(), maps)
    for gradient, value in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 47), (1, 1), (480, 640)])
def test_edge_cases_on_maps_of_every_size(height, width, dtype, tolerance):
    maps = pyramid(batch_size=1, height=height, width=width, dtype=dtype)
    boxes = torch.tensor([EDGES], dtype=dtype)
    ours = pool_regions(maps, boxes, STRIDES, 7, 2, 56)
    torch.testing.assert_close(ours, pool_with_torchvision(maps, boxes, 7, 2), rtol=tolerance, atol=tolerance)
    assert not ours[0, 2].any() and not ours[0, 5].any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_table_holds_every_cell_where_its_sizes_say(layout):
    maps = [level_map.detach().contiguous(memory_format=layout) for level_map in pyramid(height=40, width=70)]
    table = FeatureMaps(maps, torch.float32)
    assert list(table) == maps and table.table.dtype == torch.float32
    assert len(table.table) == sum(level_map[:, 0].numel() for level_map in maps)
    sizes = torch.stack([table.starts, table.heights, table.widths], dim=1).tolist()
    for level_map, (start, height, width) in zip(maps, sizes, strict=True):
        assert level_map.shape[-2:] == (height, width)
        for image, row, column in ((0, 0, 0), (1, height - 1, width - 1), (1, height // 2, width // 3)):
            cell = table.table[start + (image * height + row) * width + column]
            assert torch.equal(cell, level_map[image, :, row, column].float())


def test_each_picture_is_pooled_from_its_own_maps():
    maps = pyramid(batch_size=3)
    boxes = 60 * torch.rand(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = pool_regions(maps, boxes, STRIDES, 7, 2, 8)
    for image in range(3):
        alone = pool_regions([m[image : image + 1] for m in maps], boxes[image : image + 1], STRIDES, 7, 2, 8)
        torch.testing.assert_close(batch[image], alone[0], rtol=1e-12, atol=1e-12)


def test_no_gradient_reaches_the_boxes_and_every_map_gets_one():
    maps = pyramid()
    boxes = nn.Parameter(torch.tensor([[[4.0, 4, 30, 30]]] * 2, dtype=torch.float64))
    pool_regions(maps, boxes, STRIDES, 7, 2, 56).sum().backward()
    assert boxes.grad is None
    # Only the finest map is read, yet the others are part of the graph: distributed training waits for all.
    assert maps[0].grad.any() and all(m.grad is not None and not m.grad.any() for m in maps[1:])


def test_boxes_that_are_not_numbers_read_nothing():
    """A diverged model must end in a loss that is not a number, not in an index outside the maps."""
    maps = pyramid(batch_size=1)
    good = [4.0, 4.0, 30.0, 30.0]
    rows = [
        good,
        [math.nan] * 4,
        [math.inf] * 4,
        [-math.inf, 0, math.inf, 9],
        [0, 0, 1e38, 1e38],
        [9, 9, math.nan, 30],
    ]
    ours = pool_regions(maps, torch.tensor([rows], dtype=torch.float64), STRIDES, 7, 2, 56)
    assert torch.equal(ours[:, :1], pool_regions(maps, torch.tensor([[good]], dtype=torch.float64), STRIDES, 7, 2, 56))
    assert not ours[0, 1].any() and ours.isfinite().all()


@given(
    rows=st.integers(1, 9),
    sums=st.integers(0, 7),
    terms=st.integers(1, 5),
    width=st.integers(1, 4),
    seed=st.integers(),
)
def test_weighted_sums_and_their_gradients_are_those_of_embedding_bag(rows, sums, terms, width, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    index = torch.randint(0, rows, (sums, terms), generator=generator)  # with repetitions, in any order
    table, weight, direction = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((rows, width), (sums, terms), (sums, width))
    )
    found = weighted_sums(table, index, weight)
    expected = F.embedding_bag(index, table, mode="sum", per_sample_weights=weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(sums, (table, weight), direction) for sums in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", ["table", "weight"])
def test_weighted_sums_need_no_gradient_of_both(wanted):
    inputs = {"table": torch.randn(5, 2), "weight": torch.rand(3, 4)}
    inputs[wanted].requires_grad_()
    weighted_sums(inputs["table"], torch.randint(0, 5, (3, 4)), inputs["weight"]).sum().backward()
    assert {name for name, value in inputs.items() if value.grad is not None} == {wanted}
