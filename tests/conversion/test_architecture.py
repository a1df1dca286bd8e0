import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ResNetConfig, SwinConfig

from conftest import STAGES, tiny_config
from conversion.conftest import tiny_detector, tiny_swin
from drmm_hf import DrmmConfig, DrmmForObjectDetection
from drmm_hf.conversion.architecture import backbone_name, infer_fields


def weights_of(config: DrmmConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return DrmmForObjectDetection(config).model.state_dict()


SIZES = {
    "num_labels": 5,
    "num_queries": 7,
    "proposal_grid": None,
    "num_stages": 3,
    "intermediate_size": 40,
    "num_class_layers": 2,
    "num_box_layers": 4,
}


def check(config: DrmmConfig):
    fields = infer_fields(weights_of(config))
    backbone = fields.pop("backbone_config")
    for name, value in fields.items():
        assert getattr(config, name) == value, name
    assert backbone.to_dict() == config.backbone_config.to_dict()
    return fields


def test_sizes_of_every_detector(detector):
    sizes = {name: value for name, value in SIZES.items() if name != "num_labels"}
    config = tiny_config(
        decoder_type=detector.config.decoder_type,
        head_type=detector.config.head_type,
        hidden_size=64,
        dynamic_size=5,
        roi_size=4,
        num_labels=5,
        num_attention_heads=8 if detector.config.decoder_type == "sparse_rcnn" else 2,
        **sizes,
    )
    fields = check(config)
    assert ("num_attention_heads" in fields) == (config.decoder_type == "adamixer")
    assert ("roi_size" in fields) == (config.decoder_type == "sparse_rcnn")


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 9), st.integers(1, 9), st.sampled_from([32, 64]))
def test_groups_and_points_of_adamixer_follow_from_shapes(groups, points_in, points_out, width):
    stage = "decoder.layers.0.stage."
    over_channels = (width // groups) ** 2
    weights = SMALL | {
        "queries.features": torch.empty(3, width, device="meta"),
        f"{stage}iof_scale": torch.empty(4, device="meta"),
        f"{stage}sampling_offset.weight": torch.empty(3 * groups * points_in, width, device="meta"),
        f"{stage}mixing.generator.weight": torch.empty(
            groups * (over_channels + points_in * points_out), width, device="meta"
        ),
        f"{stage}mixing.projection.weight": torch.empty(width, width * points_out, device="meta"),
    }
    fields = infer_fields(weights)
    found = [fields[f"num_{name}"] for name in ("sampling_groups", "sampling_points", "mixing_points")]
    assert found == [groups, points_in, points_out]


SMALL = weights_of(tiny_config(decoder_type="adamixer", hidden_size=32, num_stages=1))


@pytest.mark.parametrize(
    "backbone",
    [
        ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 6, 8, 10], depths=[1, 2, 1, 3], layer_type="basic", out_features=STAGES
        ),
        ResNetConfig(embedding_size=4, hidden_sizes=[8, 16, 24, 32], depths=[2, 1, 3, 1], out_features=STAGES),
        tiny_swin(),
        SwinConfig(
            embed_dim=8,
            depths=[1, 2, 3, 1],
            num_heads=[1, 1, 2, 4],
            window_size=5,
            mlp_ratio=2.0,
            qkv_bias=False,
            out_features=STAGES,
        ),
    ],
    ids=["basic", "bottleneck", "swin", "swin without bias"],
)
def test_backbones(backbone):
    found = infer_fields(weights_of(tiny_config(backbone_config=backbone)))["backbone_config"]
    untold = {"drop_path_rate": 0.1} if backbone.model_type == "swin" else {}
    assert found.to_dict() == backbone.to_dict() | untold


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ResNetConfig(), "ResNet-50"),
        (ResNetConfig(depths=[3, 4, 23, 3]), "ResNet-101"),
        (ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic"), "ResNet-18"),
        (ResNetConfig(hidden_sizes=[32, 64, 128, 256]), "ResNet of depths 3-4-6-3 and width 256"),
        (SwinConfig(), "Swin-T"),
        (SwinConfig(depths=[2, 2, 18, 2]), "Swin-S"),
        (tiny_swin(), "Swin of depths 2-2-2-2 and width 8"),
    ],
)
def test_backbones_have_the_names_of_papers(config, name):
    assert backbone_name(config) == name


def test_the_grid_is_the_papers_where_it_has_one():
    fields = infer_fields(weights_of(tiny_config(num_queries=100, proposal_grid=[10, 10])))
    assert fields["proposal_grid"] == [10, 10]
    assert infer_fields(weights_of(tiny_config()))["proposal_grid"] is None
    boxes = tiny_config(head_type="box", num_queries=100, proposal_grid=None)
    assert infer_fields(weights_of(boxes))["proposal_grid"] is None


def test_a_missing_tensor_and_contradicting_sizes_are_named():
    weights = tiny_detector("adamixer", "box").model.state_dict()
    with pytest.raises(ValueError, match="no tensor of the checkpoint becomes 'queries.features'"):
        infer_fields({name: value for name, value in weights.items() if name != "queries.features"})
    name = "decoder.layers.0.stage.mixing.generator.weight"
    with pytest.raises(ValueError, match="fit no number of groups"):
        infer_fields(weights | {name: torch.empty(len(weights[name]) + 1, 32)})
