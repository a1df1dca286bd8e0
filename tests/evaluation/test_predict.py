"""Prediction with tiny random detectors of transformers: any model, any batch size, any precision, boxes right."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    ResNetConfig,
    RfDetrConfig,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

from conftest import tiny_config
from drmm_cli import main
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.evaluation.predict import load_detector, predict


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


def conditional_detr():
    config = ConditionalDetrConfig(
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
    return ConditionalDetrForObjectDetection(config), ConditionalDetrImageProcessor(size=SMALL)


def d_fine():
    backbone = HGNetV2Config(
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[4, 4, 4, 4],
        stage_out_channels=[8, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DFineConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[16, 16, 16],
        feat_channels=[16, 16, 16],
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        num_queries=7,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_denoising=0,
        num_labels=3,
    )
    return DFineForObjectDetection(config), RTDetrImageProcessor(size={"height": 64, "width": 64})


def rf_detr():
    backbone = RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        num_windows=2,
        out_indices=[1, 2],
    )
    config = RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        num_queries=7,
        group_detr=2,
        decoder_layers=1,
        decoder_ffn_dim=16,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_labels=3,
    )
    return RfDetrForObjectDetection(config), RfDetrImageProcessor(size={"height": 64, "width": 64})


def padded_detr():
    """As the example scripts of transformers set it up: every picture is padded to one square."""
    square = {"height": 96, "width": 96}
    return detr()[0], DetrImageProcessor(size={"max_height": 96, "max_width": 96}, do_pad=True, pad_size=square)


def drmm():
    return DrmmForObjectDetection(tiny_config()), DrmmImageProcessor(size=SMALL)


DETECTORS = [detr, conditional_detr, deformable_detr, rt_detr, d_fine, rf_detr, yolos]


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
        options = {"top_k": 100} if isinstance(processor, RfDetrImageProcessor) else {}  # its default is fewer
        expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes, **options)[0]
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


LEVELS = [40, 90, 140, 190]  # every picture is of one grey, by which a patched model knows it
OBJECTS = [  # (label, x, y, width, height): far from square, and the last picture is empty
    (60, 40, [(0, 3, 2, 40, 10), (2, 50, 20, 8, 18), (2, 1, 30, 11, 9)]),
    (40, 60, [(1, 5, 40, 30, 17)]),
    (90, 50, [(0, 60, 5, 25, 30), (1, 2, 1, 9, 44)]),
    (50, 50, []),
]


@pytest.fixture
def coco_folder(tmp_path):
    """Return a COCO folder of four grey pictures of four sizes, with categories 0, 1 and 2."""
    images, annotations = [], []
    for folder in ("annotations", "val"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for index, (width, height, objects) in enumerate(OBJECTS):
        Image.new("RGB", (width, height), (LEVELS[index],) * 3).save(tmp_path / "data" / "val" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": width, "height": height})
        for label, *bbox in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index, "category_id": label, "bbox": bbox})
            annotations[-1] |= {"area": bbox[2] * bbox[3], "iscrowd": 0}
    categories = [{"id": index, "name": name} for index, name in enumerate(("round", "square", "long"))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data" / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return tmp_path / "data"


def perfect_forward(processor, softmax, of_unpadded):
    """Return the forward of a model that finds every object, as fractions of its input or of the unpadded picture."""
    greys = []
    for (width, height, _), level in zip(OBJECTS, LEVELS, strict=True):
        inputs = processor(images=[Image.new("RGB", (width, height), (level,) * 3)], return_tensors="pt")
        greys.append(inputs["pixel_values"][0, 0, 0, 0].item())

    def forward(self, pixel_values, pixel_mask=None, **kwargs):
        logits = torch.full((len(pixel_values), 7, 4 if softmax else 3), -9.0)
        boxes = torch.full((len(pixel_values), 7, 4), 0.5)
        if softmax:
            logits[..., 3] = 9.0
        for row, pixels in enumerate(pixel_values[:, 0]):
            index = int(np.argmin([abs(pixels[0, 0].item() - grey) for grey in greys]))
            shown = (pixels - greys[index]).abs() < 0.02
            part = torch.tensor([shown[0].sum() / shown.shape[1], shown[:, 0].sum() / shown.shape[0]])
            width, height, objects = OBJECTS[index]
            for query, (label, x, y, w, h) in enumerate(objects):
                centre = torch.tensor([(x + w / 2) / width, (y + h / 2) / height])
                box = torch.stack([centre, torch.tensor([w / width, h / height])])
                boxes[row, query] = (box if of_unpadded else box * part).flatten()
                logits[row, query] = -9.0
                logits[row, query, label] = 9.0
        return DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)

    return forward


@pytest.mark.parametrize("make", [*DETECTORS, padded_detr, drmm], ids=lambda make: make.__name__)
def test_every_detector_that_is_right_scores_one_through_the_command(make, coco_folder, tmp_path, monkeypatch, capsys):
    """First as it is, random; then with outputs that encode the annotations, in pictures of mixed sizes."""
    monkeypatch.setattr("drmm_hf.visualization.evaluation_pictures.draw_report", lambda *_: [])
    torch.manual_seed(0)
    model, processor = make()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), str(coco_folder), "--batch-size", "2", "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "random")]) == 0
    figures = json.loads((tmp_path / "random" / "metrics.json").read_text())
    assert figures["AP"] < 0.5 and figures["num_detections"] > 4
    assert ["2", "LABEL_2", "2", "long"] in [line.split() for line in capsys.readouterr().out.splitlines()]

    softmax = make in (detr, padded_detr, yolos)
    forward = perfect_forward(processor, softmax, of_unpadded=make is drmm)
    monkeypatch.setattr(type(model), "forward", forward)
    assert main([*command, "--output", str(tmp_path / "right")]) == 0
    figures = json.loads((tmp_path / "right" / "metrics.json").read_text())
    assert figures["AP"] == pytest.approx(1.0) and figures["num_images"] == 4
    found = json.loads((tmp_path / "right" / "detections.json").read_text())
    expected = [(index, label, box) for index, (_, _, objects) in enumerate(OBJECTS) for label, *box in objects]
    right = sorted((entry["image_id"], entry["category_id"], entry["bbox"]) for entry in found if entry["score"] > 0.9)
    assert [entry[:2] for entry in right] == [entry[:2] for entry in sorted(expected)]
    for entry, wanted in zip(right, sorted(expected), strict=True):
        assert entry[2] == pytest.approx(wanted[2], abs=1e-3)


def test_a_model_without_boxes_is_refused():
    class Wordy(Recorder):
        def forward(self, pixel_values):
            return {"logits": torch.zeros(1, 1, 1)}

    with pytest.raises(ValueError, match="output of the model has no pred_boxes"):
        predict(Wordy(), Processor(), [{"image_id": 1, "image": Image.new("RGB", (10, 10))}], progress=False)


def test_scores_that_the_processor_of_rt_detr_misreads_are_refused():
    """Its softmax has no dimension, and goes over the batch: alone, every picture would score 1 everywhere."""
    model, processor = rt_detr()
    outputs = DetrObjectDetectionOutput(logits=torch.randn(1, 7, 3), pred_boxes=torch.rand(1, 7, 4))
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        (result,) = processor.post_process_object_detection(outputs, -1.0, use_focal_loss=False)
    assert result["scores"].tolist() == [1.0] * 7
    model.config.use_focal_loss = False
    with pytest.raises(ValueError, match="config.use_focal_loss is False"):
        predict(model, processor, pictures(1), progress=False)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"3", b"null", b"{", b"\xff\xfe", b'{"image_processor_type": "NoSuch"}', b'{"image_processor_type": 3}']
    + [b'{"image_processor_type": "DrmmImageProcessor", "size": []}'],
)
def test_a_damaged_image_processor_is_named(tmp_path, content):
    DrmmForObjectDetection(tiny_config()).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"model is {str(tmp_path)!r}, whose preprocessor_config.json (cannot|does not)"
    ):
        load_detector(str(tmp_path), "cpu")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path):
    """A download would ask six times, with pauses of 24 seconds together; port 1 refuses every connection."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    address = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"a pause of {seconds} s"))
    with pytest.raises(
        ValueError, match="model is 'nobody/nothing', which is no folder here, and the Hub cannot be re"
    ):
        load_detector("nobody/nothing", "cpu")
