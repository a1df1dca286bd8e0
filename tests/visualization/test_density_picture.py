"""The drawn densities against samples of the mixture."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from drmm_hf.visualization.density_picture import (
    Mixture,
    centre_density,
    density_picture,
    mixture_of_result,
    side_density,
)


MIXTURE = Mixture(
    boxes=np.array([[10.0, 20, 40, 50], [60, 5, 90, 45], [30, 30, 34, 70]]),
    scales=np.array([[3.0, 2, 5, 4], [1, 6, 2, 1], [4, 4, 4, 4]]),
    weights=np.array([0.5, 0.3, 0.2]),
)


def samples(freedom, size=400_000):
    rng = np.random.default_rng(0)
    which = rng.choice(3, size, p=MIXTURE.weights)
    return MIXTURE.boxes[which] + MIXTURE.scales[which] * stats.t.ppf(rng.random((size, 4)), freedom)


@pytest.mark.parametrize("freedom", [1.0, 4.0, math.inf])
def test_centres_are_those_of_samples(freedom):
    """Shares of cells of 10 x 10 pixels; the density is summed over a fine grid inside."""
    boxes = samples(freedom)
    edges = np.arange(0, 101, 10)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    counted, _, _ = np.histogram2d(centres[:, 1], centres[:, 0], bins=(edges, edges))
    fine = np.arange(0.125, 100, 0.25)
    density = centre_density(MIXTURE, fine, fine, freedom)
    assert density.shape == (400, 400)
    found = density.reshape(10, 40, 10, 40).sum(axis=(1, 3)) / 16
    np.testing.assert_allclose(found, counted / len(boxes), atol=0.002)


@pytest.mark.parametrize("freedom", [1.0, 4.0, math.inf])
def test_sides_are_those_of_samples(freedom):
    """The expected length of vertical and horizontal sides in a cell of 10 x 10 pixels."""
    boxes = samples(freedom, 40_000)
    fine = np.arange(0.5, 100, 1)
    found = side_density(MIXTURE, fine, fine, freedom).reshape(10, 10, 10, 10).sum(axis=(1, 3))
    length = np.zeros((10, 10))
    for row in range(10):
        for column in range(10):
            x, y = 10 * column, 10 * row
            high = (np.minimum(boxes[:, 3], y + 10) - np.maximum(boxes[:, 1], y)).clip(min=0)
            wide = (np.minimum(boxes[:, 2], x + 10) - np.maximum(boxes[:, 0], x)).clip(min=0)
            for side in (0, 2):
                length[row, column] += np.mean(high * ((boxes[:, side] >= x) & (boxes[:, side] < x + 10)))
                length[row, column] += np.mean(wide * ((boxes[:, side + 1] >= y) & (boxes[:, side + 1] < y + 10)))
    np.testing.assert_allclose(found, length, atol=0.12)
    assert length.max() > 1


def test_the_mixture_of_a_result():
    """All pairs of 2 queries and 2 classes, in any order."""
    result = {
        "query_indices": [1, 0, 0, 1],
        "labels": [0, 0, 1, 1],
        "objectness": [0.6, 0.2, 0.2, 0.6],
        "class_probabilities": [0.9, 0.3, 0.7, 0.1],
        "boxes": [[1, 1, 2, 2], [0, 0, 3, 3], [0, 0, 3, 3], [1, 1, 2, 2]],
        "box_scales": [[2] * 4, [1] * 4, [1] * 4, [2] * 4],
    }
    everything = mixture_of_result(result)
    np.testing.assert_allclose(everything.weights, [0.25, 0.75])
    assert everything.boxes.tolist() == [[0, 0, 3, 3], [1, 1, 2, 2]]
    one, other = (mixture_of_result(result, label) for label in (0, 1))
    np.testing.assert_allclose(sorted(one.weights), [0.25 * 0.3, 0.75 * 0.9])
    x = y = np.arange(5.0)
    both = centre_density(one, x, y) + centre_density(other, x, y)
    np.testing.assert_allclose(both, centre_density(everything, x, y))
    with pytest.raises(ValueError, match="result has no box_scales, objectness; a density needs"):
        mixture_of_result({name: result[name] for name in result.keys() - {"box_scales", "objectness"}})


def test_the_picture_is_bright_where_the_density_is(tmp_path):
    mixture = Mixture(np.array([[20.0, 20, 40, 40]]), np.full((1, 4), 0.5), np.ones(1))
    image = Image.new("RGB", (200, 100), "white")
    path = density_picture(image, mixture, tmp_path / "new" / "density.png")
    drawn = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    width = drawn.shape[1]
    left = drawn[:, : int(0.36 * width)]  # without the bar
    hot = np.argwhere((left[..., 0] > 230) & (left[..., 2] < 120))
    assert len(hot) > 20
    assert hot[:, 1].max() - hot[:, 1].min() < 0.08 * width  # one small spot
    assert (image.getpixel((30, 30))) == (255, 255, 255)


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("size", [(4000, 2), (2, 4000), (1, 1)])
def test_pictures_of_any_shape_are_drawn(size, tmp_path):
    box = np.array([[0.0, 0.0, *size]])
    mixture = Mixture(box, np.full((1, 4), 0.5), np.ones(1))
    drawn = Image.open(density_picture(Image.new("RGB", size), mixture, tmp_path / "density.png"))
    assert drawn.width > 1000 and 200 < drawn.height < 2000
