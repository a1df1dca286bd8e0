"""Checkpoints of earlier versions load and predict what they did: `tests/golden/checkpoints/VERSION`.

`python tests/test_older_checkpoints.py` writes a folder for the version at hand; do so before a release.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import drmm_hf
from conftest import random_labels, tiny_config, tiny_resnet
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor


CHECKPOINTS = Path(__file__).parent / "golden" / "checkpoints"
SMALL = {"num_queries": 4, "proposal_grid": [2, 2], "intermediate_size": 8, "dynamic_size": 2, "roi_size": 2}
KINDS = {
    "sparse_rcnn_mixture": {},
    "adamixer_box": {
        "decoder_type": "adamixer",
        "head_type": "box",
        "hidden_size": 32,
        "num_stages": 1,
        "num_sampling_points": 1,
        "num_mixing_points": 1,
    },
}


def picture() -> torch.Tensor:
    """Return a picture `(3, 50, 70)` of bytes that no generator of random numbers has a part in."""
    y, x = torch.meshgrid(torch.arange(50), torch.arange(70), indexing="ij")
    return torch.stack([(3 * x + y) % 256, (x * y) % 256, (5 * y) % 256]).byte()


@torch.no_grad()
def outputs_of(folder: Path) -> dict[str, torch.Tensor]:
    model, information = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(information.values()), information
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(picture(), return_tensors="pt")
    outputs = model(**inputs, labels=random_labels(2))
    found = processor.post_process_object_detection(outputs, 0.0, [(50, 70)], top_k=10)[0]
    values = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    return values | {"scores": found["scores"], "boxes": found["boxes"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", sorted(path.name for path in CHECKPOINTS.glob("*")))
def test_a_checkpoint_loads_and_predicts_as_it_did(version, kind):
    folder = CHECKPOINTS / version / kind
    recorded, outputs = load_file(folder / "outputs.safetensors"), outputs_of(folder)
    assert recorded.keys() <= outputs.keys()
    for name, value in recorded.items():
        torch.testing.assert_close(outputs[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def write(folder: Path) -> None:
    """Save a small model of each kind, its processor and its outputs."""
    for kind, fields in KINDS.items():
        torch.manual_seed(0)
        backbone = tiny_resnet()
        backbone.hidden_sizes = [4, 4, 8, 8]
        model = DrmmForObjectDetection(tiny_config(backbone_config=backbone, **SMALL | fields))
        for parameter in model.parameters():  # layers that start at zero would hide what they do
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / kind)
        DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder / kind)
        save_file(outputs_of(folder / kind), folder / kind / "outputs.safetensors")


if __name__ == "__main__":
    write(CHECKPOINTS / drmm_hf.__version__)
