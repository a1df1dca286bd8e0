"""Formats and frames against coordinates computed one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drmm_hf.modeling.boxes import (
    cxcywh_to_xyxy,
    frame_scale,
    image_sizes_from_mask,
    move_cxcywh,
    move_xyzr,
    side_lengths,
    xyxy_to_cxcywh,
    xyxy_to_xyzr,
    xyzr_to_xyxy,
)


numbers = st.floats(-1e4, 1e4, allow_nan=False, width=32)
boxes = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5)


@given(boxes)
@settings(max_examples=30)
def test_corners_and_centres_are_each_other_back(corners):
    xyxy = torch.tensor(corners, dtype=torch.float64)
    for box, (left, top, right, bottom) in zip(xyxy_to_cxcywh(xyxy).tolist(), corners, strict=True):
        assert box == pytest.approx([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], abs=1e-9)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(xyxy)), xyxy)


def test_sides_are_width_height_twice_and_keep_the_sign_of_an_inverted_box():
    box = torch.tensor([[[10.0, 50.0, 4.0, 90.0]]])
    assert side_lengths(box).tolist() == [[[-6.0, 40.0, -6.0, 40.0]]]
    assert side_lengths(box[0, 0]).tolist() == [-6.0, 40.0, -6.0, 40.0]
    assert xyxy_to_cxcywh(box).tolist() == [[[7.0, 70.0, -6.0, 40.0]]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 11)), min_size=1, max_size=4))
@settings(max_examples=20)
def test_sizes_are_read_from_masks_of_every_type(sizes):
    mask = torch.zeros(len(sizes), 9, 11)
    for index, (height, width) in enumerate(sizes):
        mask[index, :height, :width] = 1
    for dtype in (torch.int64, torch.bool, torch.float32, torch.uint8):
        found = image_sizes_from_mask(mask.to(dtype))
        assert found.dtype == torch.int64
        assert found.tolist() == [list(size) for size in sizes]


def test_frame_is_width_then_height():
    frame = frame_scale(torch.tensor([[480, 640], [3, 5]]), torch.float64)
    assert frame.dtype == torch.float64
    assert frame.tolist() == [[[640, 480, 640, 480]], [[5, 3, 5, 3]]]


@given(st.lists(st.tuples(*[st.floats(-500, 500)] * 2, *[st.floats(0.5, 1000)] * 2), min_size=1, max_size=5))
def test_xyzr_holds_centre_log_size_and_log_aspect_ratio(centres_and_sizes):
    boxes = cxcywh_to_xyxy(torch.tensor(centres_and_sizes, dtype=torch.float64))
    xyzr = xyxy_to_xyzr(boxes)
    for (x, y, width, height), row in zip(centres_and_sizes, xyzr.tolist(), strict=True):
        expected = [x, y, math.log2(math.sqrt(width * height)), math.log2(height / width)]
        assert row == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(xyzr_to_xyxy(xyzr), boxes, rtol=1e-9, atol=1e-9)


def test_xyzr_of_a_box_without_size_is_finite():
    boxes = torch.tensor([[5.0, 5, 5, 5], [6, 6, 5, 7]])
    xyzr = xyxy_to_xyzr(boxes)
    assert xyzr.tolist() == [[5, 5, -10, 0], [5.5, 6.5, -5, 10]]


def test_adamixers_move_has_one_unit_for_both_axes():
    boxes = torch.tensor([[0.0, 0, 16, 4]])  # z = 3: 8 pixels
    torch.testing.assert_close(move_xyzr(boxes, torch.tensor([[1.0, 1, 0, 0]])), boxes + 8)
    torch.testing.assert_close(move_xyzr(boxes, torch.tensor([[0.0, 0, 1, 0]])), torch.tensor([[-8.0, -2, 24, 6]]))
    torch.testing.assert_close(move_xyzr(boxes, torch.tensor([[0.0, 0, 0, 2]])), torch.tensor([[4.0, -2, 12, 6]]))


def test_sparse_rcnns_move_is_relative_to_each_side_and_bounded():
    boxes = torch.tensor([[0.0, 0, 16, 4]])
    moved = move_cxcywh(boxes, torch.tensor([[1.0, -1, math.log(2), 9]]), math.log(3))
    torch.testing.assert_close(moved, torch.tensor([[0.0, -6, 32, 6]]))
    moved = move_cxcywh(boxes, torch.tensor([[0.0, 0, -9, 0]]), math.log(4))
    torch.testing.assert_close(moved, torch.tensor([[6.0, 0, 10, 4]]))
