"""From backbone maps, or from a picture, to detections and losses."""

import pytest
import torch
from torch import nn
from transformers import ResNetConfig

from drmm_hf import DrmmForObjectDetection
from drmm_hf.conversion.public_names import DETECTOR_NAMES, convert_state_dict
from drmm_hf.modeling.boxes import frame_scale, xyxy_to_cxcywh
from drmm_hf.modeling.decoder import DrmmDecoder
from drmm_hf.modeling.mixture import log_confidence, log_odds
from drmm_hf.modeling.modeling_drmm import DrmmObjectDetectionOutput
from drmm_hf.modeling.necks import FPN
from drmm_hf.modeling.queries import DrmmQueries
from parity.conftest import Case, cases, check_detections, check_mixture, config_of, error, gradient_error


DEPTHS = {18: ("basic", [2, 2, 2, 2], 1), 34: ("basic", [3, 4, 6, 3], 1), 50: ("bottleneck", [3, 4, 6, 3], 4)}


def resnet_config(backbone: dict) -> ResNetConfig:
    layer_type, depths, expansion = DEPTHS[backbone["depth"]]
    base = backbone.get("base_channels", 64)
    return ResNetConfig(
        embedding_size=base,
        hidden_sizes=[base * expansion * 2**stage for stage in range(4)],
        depths=depths,
        layer_type=layer_type,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


@pytest.mark.parametrize("path", cases("drmm_fpn_decoder_postproc*.safetensors", golden=False))
def test_from_backbone_maps_to_detections(path):
    case = Case(path)
    config = config_of(case.info)
    config._attn_implementation = "sdpa"
    modules = nn.ModuleDict(
        {
            "neck": FPN(case.info["neck_in_channels"], config.hidden_size),
            "queries": DrmmQueries(config),
            "decoder": DrmmDecoder(config),
        }
    ).eval()
    modules.load_state_dict(convert_state_dict(case.starting_with("param."), DETECTOR_NAMES), strict=True)
    pyramid = modules["neck"]([case[f"in.c{level}"] for level in range(2, 6)])
    for level, value in enumerate(pyramid, start=2):
        assert error(value, case[f"fpn.p{level}"]) < 2e-4
    with torch.no_grad():
        last, mixtures = modules["decoder"](pyramid, *modules["queries"](case["in.img_hw"]))
    for stage, mixture in enumerate(mixtures):
        check_mixture(mixture, case.starting_with(f"stage{stage}."), 2e-4)
    confidence = log_confidence(mixtures[-1].objectness_logits, mixtures[-1].class_logits)
    assert error(confidence.exp(), case["final.conf"]) < 2e-4
    boxes = xyxy_to_cxcywh(mixtures[-1].boxes) / frame_scale(case["in.img_hw"], torch.float32)
    check_detections(case, DrmmObjectDetectionOutput(logits=log_odds(confidence), pred_boxes=boxes))


@pytest.mark.parametrize("path", cases("drmm_e2e_*.safetensors"))
def test_from_a_picture_to_detections_losses_and_gradients(path):
    case = Case(path)
    config = config_of(case.info, resnet_config(case.info["backbone"]))
    model = DrmmForObjectDetection(config)
    weights = {name: value.float() for name, value in case.starting_with("param.").items()}
    missing, unexpected = model.model.load_state_dict(convert_state_dict(weights, DETECTOR_NAMES), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    model.train()

    height, width = case.info["padded_hw"]
    sizes = case["in.img_hw"]
    mask = (torch.arange(height)[:, None] < sizes[:, :1, None]) & (torch.arange(width) < sizes[:, 1:, None])
    maps = model.model.backbone(case["in.image"])
    for index, value in enumerate(maps):
        every = 4 if case.info["backbone_every_4th_channel_only"][index] else 1
        assert error(value[:, ::every], case[f"backbone.c{index + 2}"]) < 2e-4
    for level, value in enumerate(model.model.neck(maps), start=2):
        assert error(value, case[f"fpn.p{level}"]) < 2e-4

    outputs = model(case["in.image"], mask.long(), labels=case.labels())
    mixtures = model.model(case["in.image"], mask.long()).stages
    last = case.info["num_stages"] - 1
    for stage in (0, last):
        check_mixture(mixtures[stage], case.starting_with(f"stage{stage}."), 2e-4)
    assert error(outputs.last_hidden_state, case[f"stage{last}.obj_feat"]) < 2e-4
    assert error(outputs.logits.sigmoid(), case["final.conf"]) < 2e-4
    check_detections(case, outputs)

    size = len(sizes)
    for stage in range(last + 1):
        stage_loss = (
            outputs.loss_dict[f"nll.stage{stage}"] + config.mcm_weight * outputs.loss_dict[f"mcm.stage{stage}"]
        )
        assert error(config.loss_weight * size * stage_loss, case[f"loss.stage{stage}_mm_loss"]) < 1e-5
    assert error(size * outputs.loss, case["loss.total"]) < 1e-5

    (size * outputs.loss).backward()
    parameters = dict(model.model.named_parameters())
    for name, gradient in convert_state_dict(case.starting_with("grad."), DETECTOR_NAMES).items():
        assert gradient_error(parameters[name].grad, gradient) < 1e-4, name
    check_gradient_norms(case, parameters)


def check_gradient_norms(case: Case, parameters: dict):
    """Compare the norm of every parameter's gradient; frozen parameters have none."""
    norms = case.info["grad_norm"]
    shapes = case.starting_with("param.")
    for name, norm in norms.items():
        ours = [parameters[key] for key in convert_state_dict({name: shapes[name]}, DETECTOR_NAMES)]
        if norm is None:
            assert all(not parameter.requires_grad and parameter.grad is None for parameter in ours), name
        else:
            total = torch.cat([parameter.grad.flatten() for parameter in ours]).norm().item()
            assert abs(total - norm) <= 1e-3 * norm + 1e-6, name
