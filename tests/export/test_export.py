"""An exported graph finds what the model finds, whatever the runtime, the batch and the size."""

import copy
import json
import shutil
import subprocess
import sys
from collections import Counter
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.export.export import check_export, export_detector
from drmm_hf.export.exported import FILES, ExportedDetector
from drmm_hf.export.graph import DetectionGraph, trace
from drmm_hf.export.parity import largest_differences, top_detections
from drmm_onnx import OnnxDetector, open_picture, preprocess


ADAMIXER = {"decoder_type": "adamixer", "hidden_size": 32, "num_attention_heads": 4, "proposal_grid": None}
CALIBRATIONS = {
    "temperature": {"scores": {"method": "temperature", "temperature": 1.3}},
    "isotonic": {
        "scores": {"method": "isotonic", "scores": [0.05, 0.2, 0.5, 0.9], "calibrated": [0.0, 0.3, 0.4, 0.95]},
        "scale_factor": 1.5,
    },
}
# Of each exported model, the options of its config and its calibration.
KINDS = {"sparse_rcnn": ({}, "temperature"), "adamixer": (ADAMIXER, "isotonic")}


def detector(**options):
    """Return a tiny model with noise on all that it has: some layers start at 0, which would hide what feeds them."""
    torch.manual_seed(0)
    model = DrmmForObjectDetection(tiny_config(**options)).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value += 0.05 * torch.randn_like(value)
    return model


def processor_of(**options):
    return DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, **options)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """Export each decoder to ONNX once, with calibrated post-processing; the last is the trace."""
    options, calibration = KINDS[request.param]
    folder, programs = tmp_path_factory.mktemp("export") / request.param, []
    model, processor = detector(**options), processor_of(score_threshold=0.01)
    processor.calibration = CALIBRATIONS[calibration]
    with patch("drmm_hf.export.export.trace", lambda *args: programs.append(trace(*args)) or programs[0]):
        about = export_detector(model, processor, folder, "onnx", post_process=True)
    return model, processor, folder, about, programs[0]


def export_again(exported, output, form, **options):
    """Export to another format from the trace and the ONNX file that stand already: they take most of the time."""
    model, processor, folder, _, program = exported
    with (
        patch("drmm_hf.export.export.trace", lambda *_: program),
        patch("drmm_hf.export.export.write_onnx", lambda _, path, *__: shutil.copyfile(folder / "model.onnx", path)),
    ):
        return export_detector(model, processor, output, form, post_process=True, **options)


def operators(folder):
    """Count the operators of an exported graph."""
    graph = onnx.load(folder / "model.onnx").graph
    assert not any(attribute.HasField("g") for node in graph.node for attribute in node.attribute)  # none within one
    return Counter(node.op_type for node in graph.node)


def batch_of(sizes, height, width):
    """Return random pictures of unequal sizes as a padded batch."""
    generator = torch.Generator().manual_seed(height)
    pixel_values = torch.zeros(len(sizes), 3, height, width)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for index, (bottom, right) in enumerate(sizes):
        pixel_values[index, :, :bottom, :right] = torch.randn(3, bottom, right, generator=generator)
        mask[index, :bottom, :right] = 1
    return pixel_values, mask, torch.tensor(sizes, dtype=torch.float32)


@pytest.mark.parametrize("sizes", [[(64, 96)], [(96, 64), (80, 33), (50, 64)], [(128, 160), (20, 150)]], ids=str)
def test_any_batch_and_size_gives_the_model_s_detections(exported, sizes):
    model, processor, folder, *_ = exported
    padded = [32 * -(-max(side) // 32) for side in zip(*sizes, strict=True)]
    inputs = batch_of(sizes, *padded)
    with torch.no_grad():
        expected = processor.top_detections(model(inputs[0], inputs[1]), inputs[2])
    found = ExportedDetector(folder)(*inputs)
    assert set(found) == set(expected)
    differences = largest_differences(expected, found, inputs[2], model.config.num_labels)
    assert differences["missing"] == 0
    assert differences["box_share"] <= 1e-4 and differences["score"] <= 1e-5
    with pytest.raises(ValueError, match="target_sizes is None; this graph needs"):
        ExportedDetector(folder)(*inputs[:2])


def test_what_is_compared_has_moved(exported):
    """Boxes, scales and scores depend on picture, query and stage, so that a part left out would show."""
    model, *_ = exported
    pixel_values, mask, _ = batch_of([(64, 96), (64, 96)], 64, 96)
    with torch.no_grad():
        outputs = model(pixel_values, mask, output_auxiliary=True)
        start = model.model.queries.boxes
    size = outputs.pred_boxes.new_tensor([96, 64, 96, 64])
    before = [start, outputs.auxiliary_outputs[0]["pred_boxes"]]
    for one, other in zip(before, [before[1], outputs.pred_boxes], strict=True):
        assert ((other - one) * size).abs().mean() > 0.2
    for name in ("pred_boxes", "box_scales", "objectness_logits", "class_logits"):
        values = outputs[name]
        assert (values[0] - values[1]).abs().max() > 1e-3 * values.abs().mean(), name
        assert values.std(dim=1).min() > 1e-2 * values.abs().mean(), name


def test_the_graph_has_no_loop(exported):
    """The standard forms of pooling and of a search are loops, several times as slow as their products."""
    found = operators(exported[2])
    assert found["MatMul"] and not found.keys() & {"Loop", "Scan", "If"}


def test_the_report_says_how_far_it_is(exported):
    _, _, folder, about, _ = exported
    assert json.loads((folder / "export.json").read_text()) == about
    assert {(row["batch_size"], row["height"] > row["width"]) for row in about["parity"]} >= {
        (1, True),
        (1, False),
        (2, True),
        (2, False),
    }
    assert all(row["box_share"] <= 1e-4 and row["score"] <= 1e-5 and not row["missing"] for row in about["parity"])


def test_differences_are_found():
    """A graph whose boxes, scores and choice are off by a known amount."""
    expected = {
        "query_indices": torch.tensor([[0, 1, 2]]),
        "labels": torch.tensor([[1, 0, 1]]),
        "scores": torch.tensor([[0.9, 0.8, 0.1]]),
        "boxes": torch.arange(12.0).view(1, 3, 4),
    }
    found = {name: value.clone() for name, value in expected.items()}
    found["boxes"][0, 0, 2] += 3
    found["scores"][0, 0] -= 0.25
    found["query_indices"][0, 1] = 7
    assert largest_differences(expected, found, torch.tensor([[20.0, 30.0]]), 2) == {
        "box_px": 3.0,
        "box_share": pytest.approx(0.1),
        "score": pytest.approx(0.25),
        "missing": 1,
    }


class TestOnnxDetector:
    @pytest.mark.parametrize("size", [(48, 96), (200, 133), (31, 40)], ids=str)
    def test_pixels_are_the_processor_s(self, exported, size):
        _, processor, folder, *_ = exported
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        ours, expected = preprocess([picture], settings), processor(images=[picture], return_tensors="np")
        assert np.array_equal(ours["pixel_mask"], expected["pixel_mask"])
        # One step of 255 in normalised units.
        step = 1 / 255 / np.array(processor.image_std).min()
        assert np.abs(ours["pixel_values"] - expected["pixel_values"]).max() <= 1.01 * step

    def test_results_are_those_of_post_processing(self, exported, tmp_path):
        model, processor, folder, *_ = exported
        pictures = [np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8) for seed in range(2)]
        Image.fromarray(pictures[0]).save(tmp_path / "0.png")
        one = OnnxDetector(folder, threads=1)
        found = one([str(tmp_path / "0.png"), pictures[1]])
        inputs = processor(images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        with torch.no_grad():
            expected = processor.post_process_object_detection(model(**inputs), target_sizes=[(64, 96)] * 2)
        for mine, theirs in zip(found, expected, strict=True):
            assert set(mine) == set(theirs) and len(mine["scores"]) == len(theirs["scores"]) > 0
            for name, value in theirs.items():
                np.testing.assert_allclose(mine[name], value.numpy(), rtol=1e-3, atol=1e-3)
        assert len(one(pictures[0], threshold=1.0)["scores"]) == 0 and one([]) == []
        with pytest.raises(ValueError, match="threshold is 2.0; scores lie in"):
            one(pictures[0], threshold=2.0)

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.zeros((64, 96, 3)), "array of float64 .*; it must be of uint8"),
            (np.zeros((3, 64, 96), dtype=np.uint8), "array of uint8 .*; it must be of uint8, .H, W, 3"),
            (Image.fromarray(np.full((60, 80), 3000, dtype=np.uint16)), "mode 'I;16'; convert it to 8 bits"),
            (Image.new("F", (8, 8)), "mode 'F'"),
            (None, "image is None; it must be a path"),
        ],
    )
    def test_what_it_cannot_read_is_named(self, image, message):
        with pytest.raises(ValueError, match=message):
            open_picture(image)

    def test_the_folder_runs_without_torch_and_this_package(self, exported, tmp_path):
        _, _, folder, *_ = exported
        Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "picture.png")
        program = (
            "import sys\n"
            "for name in ('torch', 'torchvision', 'transformers', 'drmm_hf'): sys.modules[name] = None\n"
            f"sys.path.insert(0, {str(folder)!r})\n"
            "import drmm_onnx\n"
            f"assert drmm_onnx.__file__.startswith({str(folder)!r})\n"
            f"result = drmm_onnx.OnnxDetector({str(folder)!r}, threads=1)({str(tmp_path / 'picture.png')!r}, 0.0)\n"
            "print(result['boxes'].shape[1], len(result['scores']) > 0)"
        )
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
        assert done.stdout == "4 True\n", done.stderr


def differences_of(expected, found, processor):
    """Compare two detectors on a padded batch of unequal pictures."""
    pixel_values, pixel_mask, sizes = batch_of([(64, 96), (40, 50)], 64, 96)
    inputs = {"pixel_values": pixel_values, "pixel_mask": pixel_mask}
    with torch.no_grad():
        detections = [top_detections(one, processor, inputs, sizes) for one in (expected, found)]
    return largest_differences(*detections, sizes, num_classes=3)


def test_openvino_finds_the_same(exported, tmp_path):
    model, processor, *_ = exported
    export_again(exported, tmp_path / "openvino", "openvino")
    assert (tmp_path / "openvino" / FILES["openvino"]).is_file()
    differences = differences_of(DetectionGraph(model), ExportedDetector(tmp_path / "openvino"), processor)
    assert differences["missing"] == 0 and differences["box_share"] <= 1e-4 and differences["score"] <= 1e-5


def in_type(model, dtype):
    half = copy.deepcopy(model).to(dtype)
    half.model.queries.boxes.data = model.model.queries.boxes.data.clone()
    return DetectionGraph(half)


def test_float16_of_box_heads_is_that_of_torch(tmp_path):
    """Its kernels round elsewhere than torch's, but no further."""
    model, processor = detector(head_type="box", criterion="focal_l1_giou", num_stages=1), processor_of()
    about = export_detector(model, processor, tmp_path / "float16", "onnx", dtype="float16")
    assert about["outputs"] == ["logits", "pred_boxes"]
    graph = ExportedDetector(tmp_path / "float16")
    rounding = differences_of(DetectionGraph(model), in_type(model, torch.float16), processor)
    found = differences_of(DetectionGraph(model), graph, processor)
    assert rounding["score"] > 1e-5 and rounding["box_px"] > 1e-3
    assert found["score"] < 2 * rounding["score"] and found["box_px"] < 2 * rounding["box_px"]
    weights = onnx.load(tmp_path / "float16" / "model.onnx").graph.initializer
    sizes = Counter()
    for one in weights:
        sizes[one.data_type] += np.prod(one.dims)
    assert sizes[onnx.TensorProto.FLOAT16] > 0.9 * sizes.total()


def weight_bytes(path):
    return sum(onnx.numpy_helper.to_array(one).nbytes for one in onnx.load(path).graph.initializer)


def linear_of_eight_bits(x, weight, bias=None, linear=F.linear):
    """Multiply as the graph should: each row of the weights in 255 steps, all inputs together in 256."""
    step = weight.abs().amax(1, keepdim=True) / 127
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    unit = (high - low) / 255
    zero = (-low / unit).round()
    x = (((x / unit).round() + zero).clamp(0, 255) - zero) * unit
    return linear(x, (weight / step).round() * step, bias)


def test_eight_bits_are_those_of_the_linear_layers(exported, tmp_path):
    """What differs is what rounding their weights and inputs in torch changes."""
    model, processor, folder, *_ = exported
    export_again(exported, tmp_path / "int8", "onnx", int8=True)
    float32, int8 = operators(folder), operators(tmp_path / "int8")
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    unused = 4  # classes (two layers), objectness and scales of the first of two stages
    assert int8["MatMulInteger"] == len(linear) - unused == float32["MatMul"] - int8["MatMul"]
    assert int8["Conv"] == float32["Conv"]
    before, after = (folder / "model.onnx", tmp_path / "int8" / "model.onnx")
    saved = 3 * sum(layer.weight.numel() for layer in linear)
    assert weight_bytes(before) - weight_bytes(after) > 0.8 * saved  # some of it says how they were rounded
    assert before.stat().st_size - after.stat().st_size > 0.8 * saved
    graph, plain = ExportedDetector(tmp_path / "int8"), DetectionGraph(model)
    rounding = differences_of(plain, graph, processor)
    with patch("torch.nn.functional.linear", linear_of_eight_bits):
        found = differences_of(plain, graph, processor)
    assert rounding["score"] > 1e-3 and rounding["box_px"] > 0.01
    if model.config.decoder_type == "sparse_rcnn":
        assert found["missing"] == 0 and found["box_share"] <= 1e-4 and found["score"] <= 1e-5
    else:  # some of its many inputs lie so near the middle of two steps that the last bit decides
        assert found["score"] < rounding["score"] / 2 and found["box_px"] < rounding["box_px"] / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("tflite",), "format is 'tflite'; it must be one of onnx, torch, openvino"),
        (("onnx", "bfloat16"), "dtype bfloat16 is not for onnx"),
        (("openvino", "float16"), "dtype float16 is not for openvino"),
        (("torch", "float32", True), "int8 is not for torch in float32"),
        (("onnx", "int4"), "dtype is 'int4'"),
    ],
)
def test_what_cannot_be_exported_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_export(*options)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("drmm_hf.export.export.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ValueError, match=r"format onnx needs onnxscript: pip install 'drmm-hf\[onnx\]'"):
        check_export("onnx")


def test_a_folder_that_holds_something_is_not_written(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="give a new folder"):
        export_detector(detector(), processor_of(), tmp_path, "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_torch_keeps_plain_sizes_of_a_backbone_with_padding_of_tensorflow(tmp_path):
    """Its layers compute their padding from the size; nested eight deep, such formulas took minutes."""
    backbone = {"model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0", "out_indices": [1, 2, 3, 4]}
    model, processor = detector(backbone_config=backbone, num_stages=1), processor_of()
    export_detector(model, processor, tmp_path / "torch", "torch", dtype="bfloat16")
    rounded, graph = in_type(model, torch.bfloat16), ExportedDetector(tmp_path / "torch")
    assert differences_of(DetectionGraph(model), graph, processor)["score"] > 1e-4
    assert differences_of(rounded, graph, processor) == {"box_px": 0, "box_share": 0, "score": 0, "missing": 0}
    nodes = torch.export.load(tmp_path / "torch" / FILES["torch"]).graph.nodes
    convolutions = [node for node in nodes if node.target is torch.ops.aten.conv2d.default]
    assert convolutions and max(len(str(node.meta["val"].shape)) for node in convolutions) < 80


@pytest.mark.parametrize("settings", [{"do_pad": False}, {"size_divisor": 16}], ids=str)
def test_the_detector_refuses_pictures_that_the_graph_does_not_fit(exported, settings, tmp_path):
    _, _, folder, *_ = exported
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | settings))
    with pytest.raises(ValueError, match="the graph needs pictures padded to multiples of 32"):
        OnnxDetector(tmp_path)
