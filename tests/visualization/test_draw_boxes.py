"""Drawing: the right pixels in the right colours, whatever form the boxes have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.visualization.draw_boxes import colour, draw_boxes, grid


NAMES = {0: "red cell", 1: "white cell"}


def has_colour(image, wanted, box=None):
    """Return where a picture has exactly this colour."""
    pixels = np.asarray(image if box is None else image.crop(box))
    return (pixels == np.array(wanted)).all(axis=-1)


def test_a_box_is_drawn_at_its_place_in_the_colour_of_its_class():
    image = Image.new("RGB", (1280, 960), (90, 90, 90))
    result = {"boxes": torch.tensor([[100.0, 200.0, 400.0, 500.0]]), "labels": torch.tensor([1]), "scores": [0.9]}
    drawn = draw_boxes(image, result, NAMES)
    assert drawn.size == image.size and drawn.getpixel((250, 350)) == (90, 90, 90)
    for point in ((100, 350), (400, 350), (250, 200), (250, 500)):
        assert drawn.getpixel(point) == colour(1)
    assert not has_colour(drawn, colour(0)).any()
    assert image.getpixel((100, 350)) == (90, 90, 90)  # the argument is left as it is


def test_sides_fade_out_to_the_ends_of_their_intervals():
    image = Image.new("RGB", (1280, 960), (90, 90, 90))
    result = {"boxes": [[300.0, 200, 800, 700]], "labels": [1], "scores": [0.9]}
    result["box_intervals"] = [[[200, 400], [190, 210], [780, 820], [700, 700]]]
    drawn = np.asarray(draw_boxes(image, result, NAMES), dtype=int)
    change = np.abs(drawn - 90).max(axis=-1)
    along = change[450]  # left of the box to its right
    assert (along[304:380] > 0).all() and (np.diff(along[304:400]) <= 0).all() and (along[401:770] == 0).all()
    assert (along[230:297] > 0).all() and (along[:199] == 0).all() and (along[821:] == 0).all()
    assert along[310] < np.abs(np.array(colour(1)) - 90).max() and along[320] < along[310]
    assert (change[211:690, 405:775] == 0).all() and (change[705:, 300:800] == 0).all()
    assert (change[100:180, 600:] == 0).all() and (change[192:197, 600] > 0).any()


def test_small_pictures_are_enlarged_and_boxes_with_them():
    drawn = draw_boxes(Image.new("L", (320, 160), 90), {"boxes": [[40, 80, 80, 120]], "labels": [0]}, NAMES)
    assert drawn.size == (1280, 640) and drawn.mode == "RGB"
    assert drawn.getpixel((160, 400)) == drawn.getpixel((320, 400)) == colour(0)


def test_the_threshold_hides_and_the_name_has_a_tag():
    image = Image.new("RGB", (1280, 960), (90, 90, 90))
    boxes = [[100, 200, 400, 500], [700, 200, 900, 500]]
    drawn = draw_boxes(image, {"boxes": boxes, "labels": [0, 1], "scores": [0.6, 0.59]}, NAMES, threshold=0.6)
    assert not has_colour(drawn, colour(1)).any()
    tag = np.asarray(drawn.crop((100, 170, 300, 200)))
    assert (tag == 0).all(axis=-1).sum() > 50  # black letters


def test_ground_truth_is_dashed():
    image = Image.new("RGB", (1280, 960), (90, 90, 90))
    nothing = {"boxes": [], "labels": [], "scores": []}
    drawn = draw_boxes(image, nothing, NAMES, ground_truth={"boxes": [[100, 200, 400, 500]]})
    left = has_colour(drawn, (255, 255, 255), (100, 200, 101, 500))
    assert 0.3 < left.mean() < 0.7


def test_tags_of_equal_boxes_do_not_cover_each_other():
    image = Image.new("RGB", (1280, 960), (90, 90, 90))
    result = {"boxes": [[300, 300, 800, 800]] * 2, "labels": [0, 1], "scores": [0.9, 0.8]}
    both = draw_boxes(image, result, NAMES)
    first = draw_boxes(image, {key: value[:1] for key, value in result.items()}, NAMES)
    above = (300, 270, 800, 299)
    tag = ~has_colour(first, (90, 90, 90), above)
    assert tag.sum() > 1000
    assert (np.asarray(both.crop(above))[tag] == np.asarray(first.crop(above))[tag]).all()
    assert (~has_colour(both, (90, 90, 90), above) & ~tag).sum() > 1000  # the second tag stands beside it


@settings(max_examples=25)
@given(
    boxes=st.lists(st.lists(st.floats(-500, 2000), min_size=4, max_size=4), max_size=4),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_no_box_stops_the_drawing(boxes, size):
    """Inverted, empty and outside boxes, and pictures of one pixel."""
    result = {"boxes": boxes, "labels": [3] * len(boxes), "scores": [1.0] * len(boxes)}
    drawn = draw_boxes(Image.new("RGB", size), result, {3: "x"})
    assert max(drawn.size) == 1280


def test_classes_have_colours_of_their_own():
    colours = [colour(label) for label in range(80)]
    assert len(set(colours)) == 80
    assert all(0 <= part <= 255 for one in colours for part in one)


def test_grid_puts_every_picture_into_its_cell():
    images = [Image.new("RGB", (200, 100), shade) for shade in ("red", "green", "blue")]
    images[2] = images[2].resize((50, 100))
    sheet = grid(images, columns=2, captions=["a", "b", "c"])
    for shade in ((255, 0, 0), (0, 128, 0)):
        assert has_colour(sheet, shade).sum() == 200 * 100
    assert has_colour(sheet, (0, 0, 255)).sum() == 50 * 100
    assert sheet.width < 430 and sheet.height > 200
    with pytest.raises(ValueError, match="images is empty"):
        grid([])
