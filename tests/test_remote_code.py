"""The bundle: a folder that a machine without this package loads with `trust_remote_code=True`."""

import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from drmm_hf import DrmmConfig, DrmmForObjectDetection, DrmmImageProcessor, DrmmModel
from drmm_hf.hub import save_bundle
from drmm_hf.modeling.remote_code import REQUIREMENTS, requirements
from elsewhere import answers_elsewhere


@pytest.fixture(scope="module")
def model():
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
        coordinate_distribution="student_t",
        student_t_freedom=3.5,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "layer_type": "basic",
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
    )
    return DrmmForObjectDetection(config).eval()


@pytest.fixture(scope="module")
def processor():
    calibration = {"scores": {"method": "temperature", "temperature": 0.8}, "scale_factor": 1.5}
    size = {"shortest_edge": 40, "longest_edge": 66}
    return DrmmImageProcessor(size=size, calibration=calibration, score_threshold=[0.1, 0.2, 1.0])


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_same_numbers_where_the_package_is_absent(model, processor, tmp_path):
    folder = tmp_path / "bundle"
    save_bundle(model, processor, folder)
    image = np.random.default_rng(0).integers(0, 256, (45, 60, 3), dtype=np.uint8)
    np.save(tmp_path / "picture.npy", image)
    answer = answers_elsewhere([folder], tmp_path)[str(folder)]

    # Read from the same file: weights mapped at other addresses may take another path through the BLAS library,
    # which moves the last bit.
    here = DrmmForObjectDetection.from_pretrained(folder).eval()
    inputs = processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        outputs = here(**inputs)
    result = processor.post_process_object_detection(outputs, 0.05, [image.shape[:2]], interval=0.9)[0]
    assert len(result["scores"]) > 0 and result["box_intervals"].shape == (len(result["scores"]), 4, 2)
    expected = {"inputs": inputs, "outputs": outputs, "result": result, "state": model.model.state_dict()}
    for part, tensors in expected.items():
        tensors = {name: value for name, value in tensors.items() if torch.is_tensor(value)}
        assert answer[part].keys() == tensors.keys(), part
        for name, tensor in tensors.items():
            assert torch.equal(answer[part][name], tensor), (part, name)
    assert [row["score"] for row in answer["detections"]] == result["scores"].tolist()
    saved = processor.post_process_object_detection(outputs, None, [image.shape[:2]])[0]["scores"].tolist()
    assert [row["score"] for row in answer["above_saved"]] == saved and 0 < len(saved) < len(answer["detections"])


def test_the_folder_is_what_transformers_would_publish(model, processor, tmp_path, monkeypatch):
    save_bundle(model, processor, tmp_path / "ours")
    monkeypatch.setattr(DrmmConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(DrmmForObjectDetection, "_auto_class", "AutoModelForObjectDetection")
    monkeypatch.setattr(DrmmImageProcessor, "_auto_class", "AutoImageProcessor")
    copy = DrmmForObjectDetection(deepcopy(model.config))
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(tmp_path / "theirs")
    DrmmImageProcessor(**processor.to_dict()).save_pretrained(tmp_path / "theirs")

    ours, theirs = ({path.name: path for path in (tmp_path / side).iterdir()} for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() | {"requirements.txt"}
    for name in theirs.keys() - {"config.json", "preprocessor_config.json"}:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name
    for name in ("config.json", "preprocessor_config.json"):
        mine, other = read(tmp_path / "ours", name), read(tmp_path / "theirs", name)
        assert mine.pop("auto_map").items() >= other.pop("auto_map").items()
        assert mine == other


def test_saving_a_bundle_changes_no_class_and_no_object(model, processor, tmp_path):
    save_bundle(model, processor, tmp_path / "bundle")
    assert [cls._auto_class for cls in (DrmmConfig, DrmmModel, DrmmForObjectDetection, DrmmImageProcessor)] == [
        None
    ] * 4
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    assert {path.suffix for path in (tmp_path / "plain").iterdir()} == {".json", ".safetensors"}
    for name in ("config.json", "preprocessor_config.json"):
        assert "auto_map" not in read(tmp_path / "plain", name)


def test_with_the_package_a_bundle_loads_its_classes(model, processor, tmp_path):
    """No code of the folder is run, whether trusted or not."""
    save_bundle(model, processor, tmp_path)
    for trust in (None, True):
        assert type(AutoModelForObjectDetection.from_pretrained(tmp_path, trust_remote_code=trust)) is type(model)
        assert type(AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=trust)) is type(processor)


def test_nothing_of_the_package_is_named_in_the_code(model, processor, tmp_path):
    files = save_bundle(model, processor, tmp_path)
    assert {"configuration_drmm.py", "modeling_drmm.py", "image_processing_drmm.py"} <= {file.name for file in files}
    assert not [
        file.name for file in files if "import drmm_hf" in file.read_text() or "from drmm_hf" in file.read_text()
    ]


def test_the_required_versions_begin_where_the_package_s_do():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for package, versions in REQUIREMENTS.items():
        assert re.search(rf'"{package}{versions.split(",")[0]}[",]', text), package
    assert requirements({"backbone_config": {"model_type": "resnet"}}).keys() == REQUIREMENTS.keys() - {"timm"}
    assert requirements({"backbone_config": {"model_type": "timm_backbone"}}) == REQUIREMENTS
