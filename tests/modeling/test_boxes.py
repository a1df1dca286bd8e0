"""Formats and frames against coordinates computed one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drmm_hf.modeling.boxes import (
    cxcywh_to_xyxy,
    frame_scale,
    image_sizes_from_mask,
    side_lengths,
    xyxy_to_cxcywh,
)


numbers = st.floats(-1e4, 1e4, allow_nan=False, width=32)
boxes = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5)


@given(boxes)
@settings(max_examples=30, deadline=None)
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
@settings(max_examples=20, deadline=None)
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
