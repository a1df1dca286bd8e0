import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from drmm_hf.modeling.image_processing_drmm import DrmmImageProcessor
from drmm_hf.visualization import batch_pictures
from drmm_hf.visualization.batch_pictures import save_augmented_pictures


NAMES = {0: "cat", 1: "dog"}


def batch_of(processor, *shapes):
    """Random pictures with one box each, and what the processor makes of them."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    annotations = [
        {"image_id": i, "annotations": [{"bbox": [w / 4, h / 8, w / 2, h / 4], "category_id": i % 2}]}
        for i, (h, w) in enumerate(shapes)
    ]
    return images, processor(images=images, annotations=annotations, do_resize=False)


@pytest.fixture
def drawn(monkeypatch):
    """Collect what is handed over for drawing."""
    calls = []
    draw = batch_pictures.draw_boxes

    def record(image, result, id2label):
        calls.append((image, result))
        return draw(image, result, id2label)

    monkeypatch.setattr(batch_pictures, "draw_boxes", record)
    return calls


@pytest.mark.parametrize(
    "switches", [{}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False}, {"image_std": [0.1] * 3}]
)
def test_the_pixels_and_boxes_are_those_of_the_picture(tmp_path, drawn, switches):
    processor = DrmmImageProcessor(**switches)
    images, batch = batch_of(processor, (40, 64), (60, 36))
    save_augmented_pictures([batch], processor, NAMES, tmp_path / "new" / "batch.png")
    for (image, result), original in zip(drawn, images, strict=True):
        assert image.tobytes() == original.tobytes()
        w, h = original.size
        np.testing.assert_allclose(result["boxes"], [[w / 4, h / 8, 3 * w / 4, 3 * h / 8]], atol=1e-3)
    assert [result["labels"].tolist() for _, result in drawn] == [[0], [1]]
    with Image.open(tmp_path / "new" / "batch.png") as sheet:
        assert sheet.width > sheet.height


@given(st.integers(1, 7), st.integers(1, 3))
@settings(max_examples=8)
def test_no_more_batches_are_read_than_needed(tmp_path_factory, num_pictures, batch_size):
    processor = DrmmImageProcessor()
    _, batch = batch_of(processor, *[(20, 20)] * batch_size)
    read = []

    def batches():
        while True:
            read.append(1)
            yield batch

    save_augmented_pictures(batches(), processor, NAMES, tmp_path_factory.mktemp("a") / "b.jpg", num_pictures)
    assert len(read) == -(-num_pictures // batch_size)


def test_pictures_without_boxes_are_drawn_and_nothing_is_an_error(tmp_path):
    processor = DrmmImageProcessor()
    empty = {"image_id": 3, "annotations": []}
    batch = processor(images=[torch.zeros(3, 20, 30, dtype=torch.uint8)], annotations=[empty])
    save_augmented_pictures([batch], processor, NAMES, tmp_path / "batch.png")
    with pytest.raises(ValueError, match="batches is empty"):
        save_augmented_pictures([], processor, NAMES, tmp_path / "none.png")
