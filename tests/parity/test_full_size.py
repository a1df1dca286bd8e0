"""Key names, shapes and parameter counts of the full-size checkpoints."""

import json

import pytest
import torch
from transformers import ResNetConfig

from drmm_hf import DrmmConfig, DrmmForObjectDetection
from drmm_hf.conversion.public_names import DETECTOR_NAMES, convert_state_dict
from parity.conftest import cases


@pytest.mark.parametrize("path", cases("keys_drmm_*.json"))
def test_every_key_of_the_checkpoint_is_one_of_ours_and_none_is_left(path):
    recorded = json.loads(path.read_text())
    config = DrmmConfig(
        backbone_config=ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"]), freeze_backbone_stages=1
    )
    with torch.device("meta"):
        model = DrmmForObjectDetection(config).model
        public = {name: torch.empty(shape) for name, shape in recorded["keys"].items()}
    converted = convert_state_dict(public, DETECTOR_NAMES)
    ours = model.state_dict()
    assert converted.keys() == ours.keys()
    assert {name: value.shape for name, value in converted.items()} == {n: v.shape for n, v in ours.items()}
    parameters = dict(model.named_parameters())
    assert sum(value.numel() for value in parameters.values()) == recorded["total_params"]
    assert sum(v.numel() for v in parameters.values() if v.requires_grad) == recorded["trainable_params"]
    assert len(recorded["buffers"]) == sum(1 for _ in model.named_buffers())
    parts = {"backbone": "backbone", "neck": "neck", "rpn_head": "queries", "roi_head": "decoder"}
    for part, count in recorded["params_by_part"].items():
        assert sum(v.numel() for n, v in parameters.items() if n.startswith(parts[part])) == count
    frozen = convert_state_dict({name: public[name] for name in recorded["frozen"]}, DETECTOR_NAMES)
    assert frozen.keys() == {name for name, value in parameters.items() if not value.requires_grad}
