"""Tiles cover a picture, and joined detections are those of a detector that sees all of it sharply."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.evaluation import tiles
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.tiles import merge_tiles, predict_tiles, tile_windows


@given(st.integers(1, 500), st.integers(1, 500), st.integers(32, 200), st.floats(0, 0.9))
def test_tiles_cover_the_picture_and_overlap(height, width, tile, overlap):
    windows = tile_windows(height, width, tile, overlap)
    assert windows[0].tolist() == [0, 0, width, height]
    rest = windows[1:]
    assert len(rest) == 0 if max(height, width) <= tile else len(rest) > 1
    if len(rest) == 0:
        return
    sides = rest[:, 2:] - rest[:, :2]
    assert (sides == [min(tile, width), min(tile, height)]).all()
    for axis, length in ((0, width), (1, height)):
        starts = np.unique(rest[:, axis])
        assert starts[0] == 0 and starts[-1] == max(length - tile, 0)
        assert (np.diff(starts) <= max(1, tile * (1 - overlap))).all()
        assert len(rest) == len(np.unique(rest[:, 0])) * len(np.unique(rest[:, 1]))


@pytest.fixture
def squares():
    """Return a picture of 300 x 200 with squares of a grey of their own, small and large, on borders of tiles too."""
    boxes = [(10, 10, 22, 24), (90, 40, 112, 60), (95, 95, 106, 104), (180, 20, 290, 170), (270, 185, 300, 200)]
    pixels = np.zeros((200, 300), dtype=np.uint8)
    for index, (left, top, right, bottom) in enumerate(boxes):
        pixels[top:bottom, left:right] = 40 * (index + 1)
    return Image.fromarray(pixels), boxes


def seeing(model, processor, rows, batch_size, top_k, progress):
    """Find each square as far as it is in the picture; small ones are seen from near only."""
    found = Detections()
    for row in rows:
        pixels = np.asarray(row["image"].convert("L"))
        result = {"boxes": [], "scores": [], "labels": [], "query_indices": []}
        for grey in np.unique(pixels[pixels > 0]).tolist():
            down, across = np.nonzero(pixels == grey)
            box = [across.min(), down.min(), across.max() + 1, down.max() + 1]
            if len(down) > 1000 or max(pixels.shape) <= 100:
                result["boxes"].append(box)
                result["scores"].append(0.9 - 0.001 * row["image_id"])
                result["labels"].append(grey // 40 % 2)
                result["query_indices"].append(grey)
        found.add(
            row["image_id"],
            {name: np.array(values).reshape(-1, *[4] * (name == "boxes")) for name, values in result.items()},
        )
    return found


def test_small_and_large_objects_are_found_once(squares, monkeypatch):
    image, boxes = squares
    monkeypatch.setattr(tiles, "predict", seeing)
    rows = [{"image_id": 7, "image": image.convert("RGB")}] * 2
    detections = predict_tiles(None, None, rows, 100)
    found = detections[7]
    assert len(detections) == 1
    assert sorted(map(tuple, found["boxes"].tolist())) == sorted(boxes)
    assert "query_indices" not in found and (np.diff(found["scores"]) <= 0).all()


def test_what_a_side_cuts_is_left_out_and_what_the_picture_cuts_is_not():
    windows = np.array([[0, 0, 150, 100], [0, 0, 100, 100], [50, 0, 150, 100]])
    none = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, dtype=int)}
    boxes = np.array([[0.0, 40, 30, 99.8], [60, 40, 99.5, 60]])
    tile = {"boxes": boxes, "scores": np.array([0.5, 0.9]), "labels": np.array([0, 1])}
    joined = merge_tiles(windows, [none, tile, none], 100, 0.2)
    np.testing.assert_allclose(joined["boxes"], boxes[:1])
    joined = merge_tiles(windows, [none, none, tile], 100, 0.2)
    np.testing.assert_allclose(joined["boxes"], [[110, 40, 149.5, 60]])


def test_the_whole_picture_gives_what_is_larger_than_the_overlap():
    """Without tiles it gives all."""
    boxes = np.array([[10.0, 10, 29, 29], [10, 50, 31, 60]])
    found = {"boxes": boxes, "scores": np.array([0.5, 0.9]), "labels": np.array([0, 1])}
    none = {name: values[:0] for name, values in found.items()}
    windows = np.array([[0, 0, 150, 100], [0, 0, 100, 100], [50, 0, 150, 100]])
    np.testing.assert_allclose(merge_tiles(windows, [found, none, none], 100, 0.2)["boxes"], boxes[1:])
    np.testing.assert_allclose(merge_tiles(windows[:1], [found], 150, 0.2)["boxes"], boxes[::-1])


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0.2), (64, 1.0), (64, -0.1)])
def test_tiles_out_of_range_are_refused(tile, overlap):
    with pytest.raises(ValueError, match="tile is .* and overlap"):
        predict_tiles(None, None, [], tile, overlap)
