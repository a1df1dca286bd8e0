"""An exported graph finds what the model finds, whatever the runtime, the batch and the size."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.export.export import check_export, export_detector
from drmm_hf.export.exported import FILES, ExportedDetector
from drmm_hf.export.graph import DetectionGraph, trace
from drmm_hf.export.parity import largest_differences, top_detections
from drmm_onnx import OnnxDetector, open_picture, preprocess


KINDS = {
    "sparse_rcnn": {},
    "adamixer": {"decoder_type": "adamixer", "hidden_size": 32, "num_attention_heads": 4, "proposal_grid": None},
}


def detector(kind):
    torch.manual_seed(0)
    return DrmmForObjectDetection(tiny_config(**KINDS[kind])).eval()


def processor_of(**options):
    return DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}, **options)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """Export each decoder to ONNX once, with calibrated post-processing."""
    folder = tmp_path_factory.mktemp("export") / request.param
    model, processor = detector(request.param), processor_of(score_threshold=0.01)
    processor.calibration = {"scores": {"method": "temperature", "temperature": 1.3}}
    about = export_detector(model, processor, folder, "onnx", post_process=True)
    return model, processor, folder, about


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
    model, processor, folder, _ = exported
    padded = [32 * -(-max(side) // 32) for side in zip(*sizes, strict=True)]
    inputs = batch_of(sizes, *padded)
    with torch.no_grad():
        expected = processor.top_detections(model(inputs[0], inputs[1]), inputs[2])
    found = ExportedDetector(folder)(*inputs)
    assert set(found) == set(expected)
    differences = largest_differences(expected, found, inputs[2], model.config.num_labels)
    assert differences["missing"] == 0
    assert differences["box_share"] <= 1e-4 and differences["score"] <= 1e-5


def test_the_report_says_how_far_it_is(exported):
    _, _, folder, about = exported
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
        _, processor, folder, _ = exported
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        ours, expected = preprocess([picture], settings), processor(images=[picture], return_tensors="np")
        assert np.array_equal(ours["pixel_mask"], expected["pixel_mask"])
        # One step of 255 in normalised units.
        step = 1 / 255 / np.array(processor.image_std).min()
        assert np.abs(ours["pixel_values"] - expected["pixel_values"]).max() <= 1.01 * step

    def test_results_are_those_of_post_processing(self, exported, tmp_path):
        model, processor, folder, _ = exported
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
        _, _, folder, _ = exported
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


@pytest.mark.parametrize("form", ["torch", "openvino"])
def test_other_formats_find_the_same(form, tmp_path):
    model, processor = detector("sparse_rcnn"), processor_of()
    about = export_detector(model, processor, tmp_path / form, form)
    assert (tmp_path / form / FILES[form]).is_file()
    inputs = batch_of([(64, 96), (40, 50)], 64, 96)
    graph = DetectionGraph(model)
    with torch.no_grad():
        expected = top_detections(graph, processor, {"pixel_values": inputs[0], "pixel_mask": inputs[1]}, inputs[2])
    found = top_detections(
        ExportedDetector(tmp_path / form), processor, {"pixel_values": inputs[0], "pixel_mask": inputs[1]}, inputs[2]
    )
    differences = largest_differences(expected, found, inputs[2], model.config.num_labels)
    assert differences["missing"] == 0 and differences["box_share"] <= 1e-4 and differences["score"] <= 1e-5
    assert about["outputs"][:2] == ["logits", "pred_boxes"]


def test_weights_of_eight_bits_still_find_the_objects(tmp_path):
    model, processor = detector("sparse_rcnn"), processor_of()
    about = export_detector(model, processor, tmp_path / "int8", "onnx", int8=True)
    float32 = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert (tmp_path / "int8" / "model.onnx").stat().st_size < 1.5 * float32
    assert max(row["score"] for row in about["parity"]) < 0.2


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
        export_detector(detector("sparse_rcnn"), processor_of(), tmp_path, "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_backbone_with_padding_of_tensorflow_keeps_plain_sizes(tmp_path):
    """Its layers compute their padding from the size; nested eight deep, such formulas took minutes."""
    backbone = {"model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0", "out_indices": [1, 2, 3, 4]}
    torch.manual_seed(0)
    model = DrmmForObjectDetection(tiny_config(backbone_config=backbone)).eval()
    program = trace(DetectionGraph(model))
    torch.export.save(program, tmp_path / "model.pt2")
    inputs = batch_of([(96, 64), (64, 50)], 96, 64)
    with torch.no_grad():
        expected = model(*inputs[:2])
        found = torch.export.load(tmp_path / "model.pt2").module()(pixel_values=inputs[0], pixel_mask=inputs[1])
    assert (found["pred_boxes"] - expected.pred_boxes).abs().max() < 1e-5
    convolutions = [node for node in program.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert convolutions and max(len(str(node.meta["val"].shape)) for node in convolutions) < 80


@pytest.mark.parametrize("settings", [{"do_pad": False}, {"size_divisor": 16}], ids=str)
def test_the_detector_refuses_pictures_that_the_graph_does_not_fit(exported, settings, tmp_path):
    _, _, folder, _ = exported
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor | settings))
    with pytest.raises(ValueError, match="the graph needs pictures padded to multiples of 32"):
        OnnxDetector(tmp_path)
