"""The stock object-detection pipeline and our own, on a tiny random model saved to a folder."""

import logging
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection, pipeline
from transformers.pipelines import PIPELINE_REGISTRY, ObjectDetectionPipeline

from drmm_hf import (
    DrmmConfig,
    DrmmForObjectDetection,
    DrmmImageProcessor,
    DrmmModel,
    DrmmObjectDetectionPipeline,
)


def picture(width, height, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.manual_seed(seed))
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = DrmmConfig(
        num_queries=6,
        proposal_grid=[2, 3],
        num_stages=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        dynamic_size=4,
        id2label={0: "circle", 1: "square", 2: "star"},
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    )
    path = tmp_path_factory.mktemp("model")
    DrmmForObjectDetection(config).save_pretrained(path)
    DrmmImageProcessor(size={"shortest_edge": 40, "longest_edge": 66}).save_pretrained(path)
    return path


def ours(folder, **kwargs):
    return pipeline("object-detection", model=str(folder), pipeline_class=DrmmObjectDetectionPipeline, **kwargs)


def direct(folder, image, threshold=0.1):
    """What model and processor say without a pipeline."""
    processor = DrmmImageProcessor.from_pretrained(folder)
    model = DrmmForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**processor(images=[image], return_tensors="pt"))
    return processor.post_process_object_detection(outputs, threshold, [image.size[::-1]])[0]


def test_auto_classes(folder):
    assert type(AutoConfig.from_pretrained(folder)) is DrmmConfig
    assert type(AutoModel.from_pretrained(folder)) is DrmmModel
    assert type(AutoModelForObjectDetection.from_pretrained(folder)) is DrmmForObjectDetection
    assert type(AutoImageProcessor.from_pretrained(folder)) is DrmmImageProcessor


def test_at_one_padded_size_boxes_do_not_depend_on_the_batch(folder):
    processor = DrmmImageProcessor.from_pretrained(folder, pad_size={"height": 96, "width": 96})
    model = DrmmForObjectDetection.from_pretrained(folder).eval()
    images = [picture(60, 45, 1), picture(45, 60, 2), picture(90, 30, 3)]
    target_sizes = [image.size[::-1] for image in images]
    with torch.no_grad():
        outputs = model(**processor(images=images, return_tensors="pt"))
        alone = [model(**processor(images=[image], return_tensors="pt")) for image in images]
    together = processor.post_process_object_detection(outputs, 0.1, target_sizes)
    for result, output, size in zip(together, alone, target_sizes, strict=True):
        expected = processor.post_process_object_detection(output, 0.1, [size])[0]
        assert result["query_indices"].tolist() == expected["query_indices"].tolist()
        torch.testing.assert_close(result["boxes"], expected["boxes"], atol=1e-3, rtol=0)
        torch.testing.assert_close(result["scores"], expected["scores"], atol=1e-6, rtol=0)


class TestStockPipeline:
    def test_no_error_and_the_same_detections(self, folder):
        records = []
        handler = logging.Handler()
        handler.emit = records.append
        logger = logging.getLogger("transformers.pipelines.base")
        logger.addHandler(handler)
        try:
            detector = pipeline("object-detection", model=str(folder))
        finally:
            logger.removeHandler(handler)
        assert not [record for record in records if record.levelno >= logging.ERROR]
        assert type(detector) is ObjectDetectionPipeline

        image = picture(60, 45)
        detections, expected = detector(image, threshold=0.1), direct(folder, image)
        assert len(detections) == len(expected["scores"]) > 0
        for row, score, label, box in zip(
            detections, expected["scores"], expected["labels"], expected["boxes"], strict=True
        ):
            assert row["score"] == pytest.approx(score.item(), abs=1e-6)
            assert row["label"] == ("circle", "square", "star")[label]
            assert list(row["box"].values()) == box.int().tolist()

    def test_takes_the_saved_threshold_where_it_is_told_to(self, folder, tmp_path):
        """What the documentation says of it: its own 0.5, unless `threshold=None` lets the processor choose."""
        shutil.copytree(folder, tmp_path / "model")
        saved = DrmmImageProcessor.from_pretrained(folder, score_threshold=[0.0, 0.0, 1.0])
        saved.save_pretrained(tmp_path / "model")
        image, labels = picture(60, 45), lambda found: sorted({row["label"] for row in found})
        stock = pipeline("object-detection", model=str(tmp_path / "model"))
        told = pipeline("object-detection", model=str(tmp_path / "model"), threshold=None)
        assert stock(image) == stock(image, threshold=0.5) == told(image, threshold=0.5) != told(image)
        assert labels(told(image)) == labels(stock(image, threshold=None)) == ["circle", "square"]
        assert told(image) == [row for row in stock(image, threshold=0.0) if row["label"] != "star"]

    def test_the_task_is_not_registered_again(self):
        task = PIPELINE_REGISTRY.check_task("object-detection")[1]
        assert ObjectDetectionPipeline.__name__ in str(task["impl"])
        assert "drmm" not in repr(task).lower()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, folder, dtype):
        detector = pipeline("object-detection", model=str(folder), dtype=dtype)
        assert detector.model.dtype == dtype
        detections = detector(picture(60, 45), threshold=0.0)
        assert len(detections) == 18
        assert all(0 <= row["score"] <= 1 for row in detections)

    def test_a_batch_of_one_shape(self, folder):
        detector = pipeline("object-detection", model=str(folder))
        images = [picture(60, 45, seed) for seed in range(3)]
        for batched, image in zip(detector(images, batch_size=2, threshold=0.1), images, strict=True):
            for row, alone in zip(batched, detector(image, threshold=0.1), strict=True):
                assert row["score"] == pytest.approx(alone["score"], abs=1e-5) and row["label"] == alone["label"]


class TestOwnPipeline:
    def test_floats_and_scales(self, folder):
        image = picture(60, 45)
        detections, expected = ours(folder)(image, threshold=0.1), direct(folder, image)
        assert len(detections) == len(expected["scores"]) > 0
        for i, row in enumerate(detections):
            assert row.keys() == {"score", "label", "box", "box_scales"}
            for name, values in (("box", "boxes"), ("box_scales", "box_scales")):
                assert list(row[name]) == ["xmin", "ymin", "xmax", "ymax"]
                assert list(row[name].values()) == pytest.approx(expected[values][i].tolist(), abs=1e-4)
            assert row["score"] == pytest.approx(expected["scores"][i].item(), abs=1e-6)

    @pytest.mark.parametrize("batch_size", [1, 2, 4])
    def test_mixed_aspect_ratios(self, folder, batch_size):
        """Each picture answers as the model does for the same padded batch, in pixels of that picture."""
        images = [picture(60, 45, 1), picture(45, 60, 2), picture(90, 30, 3)]
        results = ours(folder)(images, batch_size=batch_size, threshold=0.1)
        processor = DrmmImageProcessor.from_pretrained(folder)
        model = DrmmForObjectDetection.from_pretrained(folder).eval()
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            with torch.no_grad():
                outputs = model(**processor(images=batch, return_tensors="pt"))
            sizes = [image.size[::-1] for image in batch]
            expected = processor.post_process_object_detection(outputs, 0.1, sizes)
            for detections, result in zip(results[start : start + batch_size], expected, strict=True):
                assert [row["score"] for row in detections] == pytest.approx(result["scores"].tolist(), abs=1e-6)
                boxes = torch.tensor([list(row["box"].values()) for row in detections])
                torch.testing.assert_close(boxes, result["boxes"], atol=1e-3, rtol=1e-5)

    def test_the_stock_class_refuses_that_batch(self, folder):
        """Why ours exists; when this stops raising, the docstring must follow."""
        with pytest.raises(RuntimeError, match="must match"):
            pipeline("object-detection", model=str(folder))([picture(60, 45), picture(90, 30)], batch_size=2)

    def test_arguments(self, folder):
        detector = ours(folder, top_k=4)
        assert len(detector(picture(60, 45), threshold=0.0)) == 4
        clipped = detector(picture(60, 45), threshold=0.0, top_k=18, clip=True)
        assert len(clipped) == 18
        for row in clipped:
            assert 0 <= row["box"]["xmin"] <= row["box"]["xmax"] <= 60
            assert 0 <= row["box"]["ymin"] <= row["box"]["ymax"] <= 45

    def test_intervals(self, folder):
        rows = ours(folder)(picture(60, 45), threshold=0.0, interval=0.5)
        for row in rows:
            for name, scale in row["box_scales"].items():
                low, high = row["box_interval"][name]  # the quartiles of Cauchy are one scale away
                assert [low, high] == pytest.approx([row["box"][name] - scale, row["box"][name] + scale], abs=1e-3)

    def test_the_calibration_of_the_folder(self, folder, tmp_path):
        shutil.copytree(folder, tmp_path / "model")
        calibration = {"scores": {"method": "temperature", "temperature": 0.5}, "scale_factor": 2.0}
        DrmmImageProcessor.from_pretrained(folder, calibration=calibration, score_threshold=0.05).save_pretrained(
            tmp_path / "model"
        )
        image = picture(60, 45)
        detections, raw = ours(tmp_path / "model")(image), ours(folder)(image, threshold=0.0)
        assert 0 < len(detections) < len(raw)
        for row, before in zip(detections, raw, strict=False):
            odds = (before["score"] / (1 - before["score"])) ** 2
            assert row["score"] == pytest.approx(odds / (1 + odds), abs=1e-5) and row["score"] > 0.05
            assert row["box"] == pytest.approx(before["box"], abs=1e-4)
            assert row["box_scales"] == pytest.approx({name: 2 * s for name, s in before["box_scales"].items()})
        stock = pipeline("object-detection", model=str(tmp_path / "model"))(image, threshold=0.05)
        assert [row["score"] for row in stock] == pytest.approx([row["score"] for row in detections], abs=1e-6)

    def test_paths_and_generators(self, folder, tmp_path):
        picture(60, 45).save(tmp_path / "picture.png")
        detector = ours(folder)
        from_path = detector(str(tmp_path / "picture.png"), threshold=0.1)
        assert from_path == detector(picture(60, 45), threshold=0.1)
        streamed = list(detector((picture(*size) for size in ((60, 45), (45, 60))), batch_size=2, threshold=0.1))
        assert len(streamed) == 2

    def test_bfloat16(self, folder):
        detections = ours(folder, dtype=torch.bfloat16)([picture(60, 45), picture(45, 60)], batch_size=2, threshold=0)
        assert [len(rows) for rows in detections] == [18, 18]
