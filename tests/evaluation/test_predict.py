"""Prediction with tiny random detectors of transformers: any model, any batch size, any precision."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from drmm_hf.evaluation.predict import predict


RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
SMALL = {"shortest_edge": 48, "longest_edge": 96}


def detr():
    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(**RESNET, out_features=["stage4"]),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=7,
        num_labels=3,
    )
    return DetrForObjectDetection(config), DetrImageProcessor(size=SMALL)


def rt_detr():
    config = RTDetrConfig(
        backbone_config=RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"]),
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 16, 16],
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=7,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_denoising=0,
        num_labels=3,
    )
    return RTDetrForObjectDetection(config), RTDetrImageProcessor(size={"height": 64, "width": 64})


def deformable_detr():
    config = DeformableDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(**RESNET, out_features=["stage3", "stage4"]),
        num_feature_levels=2,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=7,
        num_labels=3,
    )
    return DeformableDetrForObjectDetection(config), DeformableDetrImageProcessor(size=SMALL)


def yolos():
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[48, 96],
        num_detection_tokens=7,
        num_labels=3,
    )
    return YolosForObjectDetection(config), YolosImageProcessor(size=SMALL)


DETECTORS = [detr, rt_detr, deformable_detr, yolos]


@pytest.fixture(scope="module", params=DETECTORS, ids=lambda make: make.__name__)
def detector(request):
    torch.manual_seed(0)
    model, processor = request.param()
    for parameter in model.parameters():  # fresh heads are zero or tiny: all boxes would agree
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, processor


def pictures(num=6):
    """Return rows of three sizes, interleaved, one of them grey."""
    rows = []
    for index in range(num):
        height, width = [(40, 60), (60, 40), (50, 50)][index % 3]
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        rows.append({"image_id": 100 - 3 * index, "image": image.convert("L") if index == 4 else image})
    return rows


def test_every_detector_agrees_with_its_own_post_processing(detector):
    """One picture at a time, by hand, in the words of the transformers documentation."""
    model, processor = detector
    rows = pictures(3)
    detections = predict(model, processor, rows, progress=False)
    assert list(detections) == [row["image_id"] for row in rows]
    model.eval()
    for row in rows:
        inputs = processor(images=row["image"].convert("RGB"), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        sizes = [(row["image"].height, row["image"].width)]
        expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)[0]
        order = expected["scores"].argsort(descending=True, stable=True)
        result = detections[row["image_id"]]
        assert len(result["scores"]) == len(order) >= 7
        np.testing.assert_allclose(result["scores"], expected["scores"][order].numpy(), atol=1e-5)
        np.testing.assert_allclose(result["boxes"], expected["boxes"][order].numpy(), atol=1e-2)
        assert np.ptp(result["boxes"][:, 0]) > 0.01  # the queries do not all say the same


def test_batch_size_changes_nothing(detector):
    alone = predict(*detector, pictures(), batch_size=1, progress=False)
    for batch_size in (2, 3):
        together = predict(*detector, pictures(), batch_size=batch_size, progress=False)
        assert list(together) == list(alone)
        for image_id in alone:
            np.testing.assert_allclose(together[image_id]["scores"], alone[image_id]["scores"], atol=1e-5)
            np.testing.assert_allclose(together[image_id]["boxes"], alone[image_id]["boxes"], atol=1e-2)


def test_top_k_keeps_the_most_confident(detector):
    every = predict(*detector, pictures(2), progress=False)
    few = predict(*detector, pictures(2), top_k=3, progress=False)
    for image_id in every:
        assert len(few[image_id]["scores"]) == 3
        assert few[image_id]["scores"] == pytest.approx(every[image_id]["scores"][:3], abs=1e-6)


def test_half_precision_keeps_float_pixels():
    torch.manual_seed(0)
    model, processor = detr()
    torch.nn.init.normal_(model.bbox_predictor.layers[-1].weight)
    seen = []
    model.register_forward_hook(lambda *call: seen.append(call[-1].pred_boxes.clone()))
    boxes = predict(model.to(torch.bfloat16), processor, pictures(1), progress=False)[100]["boxes"]
    assert seen[0].dtype == torch.bfloat16
    x, y, width, height = seen[0][0].double().numpy().T
    expected = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], axis=1) * [60, 40, 60, 40]
    np.testing.assert_allclose(boxes[np.lexsort(boxes.T)], expected[np.lexsort(expected.T)], atol=1e-4)


def test_the_mode_of_the_model_is_left_as_it_was_and_no_gradient_is_kept():
    model, processor = detr()
    model.train()
    first = predict(model, processor, pictures(1), progress=False)[100]
    assert model.training
    second = predict(model.eval(), processor, pictures(1), progress=False)[100]
    assert first["scores"].tolist() == second["scores"].tolist()
    assert not model.training


class Recorder(torch.nn.Module):
    """A detector that knows nothing and remembers the batches it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def forward(self, pixel_values):
        self.batches.append(tuple(pixel_values.shape))
        return {"logits": torch.zeros(len(pixel_values), 1, 2), "pred_boxes": torch.zeros(len(pixel_values), 1, 4)}


class Processor:
    """A processor without pixel_mask and without top_k that counts the pictures it made."""

    def __init__(self):
        self.num_pictures = 0

    def __call__(self, images, return_tensors):
        self.num_pictures += 1
        return {"pixel_values": torch.zeros(1, 3, images[0].height, images[0].width)}

    def post_process_object_detection(self, outputs, threshold, target_sizes):
        return [
            {"scores": torch.zeros(1), "labels": torch.zeros(1, dtype=torch.long), "boxes": torch.ones(1, 4)}
            for _ in target_sizes
        ]


def test_only_equal_sizes_share_a_batch_and_few_pictures_wait():
    model, processor, waiting = Recorder(), Processor(), []
    sizes = [(10, 10 if index % 2 else 11 + index) for index in range(40)]

    def rows():
        for index, size in enumerate(sizes):
            waiting.append(processor.num_pictures - sum(shape[0] for shape in model.batches))
            yield {"image_id": index, "image": Image.new("RGB", size)}

    detections = predict(model, processor, rows(), batch_size=4, progress=False)
    assert list(detections) == list(range(40)) and detections[0]["scores"].tolist() == [0.0]
    seen = sorted(shape[2:] for shape in model.batches for _ in range(shape[0]))
    assert seen == sorted((height, width) for width, height in sizes)
    assert model.batches.count((4, 3, 10, 10)) >= 3
    assert max(waiting) < 16


def test_top_k_reaches_processors_that_cut_by_themselves():
    class Cutting(Processor):
        def post_process_object_detection(self, outputs, threshold, target_sizes, top_k=100):
            boxes = torch.ones(top_k, 4)
            return [{"scores": boxes[:, 0], "labels": boxes[:, 0].long(), "boxes": boxes} for _ in target_sizes]

    rows = [{"image_id": 1, "image": Image.new("RGB", (10, 10))}]
    assert predict(Recorder(), Cutting(), rows, top_k=150, progress=False).num_boxes == 150


def test_a_repeated_picture_counts_once():
    model = Recorder()
    rows = [{"image_id": index, "image": Image.new("RGB", (10, 10))} for index in (1, 2, 1, 2, 1)]
    assert list(predict(model, Processor(), rows, batch_size=2, progress=False)) == [1, 2]
    assert model.batches == [(2, 3, 10, 10)]


@pytest.mark.parametrize("name", ["batch_size", "top_k"])
def test_wrong_arguments_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        predict(Recorder(), Processor(), [], **{name: 0})


def test_a_processor_that_cannot_post_process_is_refused():
    with pytest.raises(ValueError, match="object, which has no post_process_object_detection"):
        predict(Recorder(), object(), [])
