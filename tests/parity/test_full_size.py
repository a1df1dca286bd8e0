"""Key names, shapes and parameter counts of the full-size checkpoints."""

import json

import pytest
import torch

from drmm_hf import DrmmConfig, DrmmForObjectDetection
from drmm_hf.conversion.architecture import infer_fields
from drmm_hf.conversion.public_names import convert_state_dict, detector_names
from parity.conftest import cases


@pytest.mark.parametrize("path", cases("keys_*.json"))
def test_every_key_of_the_checkpoint_is_one_of_ours_and_none_is_left(path):
    recorded = json.loads(path.read_text())
    with torch.device("meta"):
        public = {name: torch.empty(shape) for name, shape in recorded["keys"].items()}
        names = detector_names(public)
        converted = convert_state_dict(public, names)
        fields = infer_fields(converted)
        resnet = fields["backbone_config"].model_type == "resnet"
        model = DrmmForObjectDetection(DrmmConfig(**fields, freeze_backbone_stages=int(resnet))).model

    # Swin: the positions inside a window are computed anew, and transformers has a norm that no map passes through.
    recomputed = {name for name in converted if name.endswith("relative_position_index")}
    unused = {f"backbone.network.swin.layernorm.{kind}" for kind in ("weight", "bias")}
    assert recomputed <= {name for name, _ in model.named_buffers()} and resnet == (not recomputed)
    ours = {name: value.shape for name, value in model.state_dict().items() if resnet or name not in unused}
    assert {name: value.shape for name, value in converted.items() if name not in recomputed} == ours
    assert len(recorded["buffers"]) == sum(1 for _ in model.named_buffers())

    # AdaMixer's initial boxes get no gradient, in the public code either; here they are frozen.
    parameters = {name: value for name, value in model.named_parameters() if name in ours}
    untrained = {"queries.boxes"} if model.config.decoder_type == "adamixer" else set()
    frozen = convert_state_dict({name: public[name] for name in recorded["frozen"]}, names)
    assert {name for name, value in parameters.items() if not value.requires_grad} == frozen.keys() | untrained
    assert sum(value.numel() for value in parameters.values()) == recorded["total_params"]
    trainable = sum(value.numel() for value in parameters.values() if value.requires_grad)
    trainable += sum(parameters[name].numel() for name in untrained)
    assert trainable == recorded["trainable_params"]
    parts = {"backbone": "backbone", "neck": "neck", "rpn_head": "queries", "roi_head": "decoder"}
    for part, count in recorded["params_by_part"].items():
        assert sum(v.numel() for n, v in parameters.items() if n.startswith(parts[part])) == count
