import pytest
from transformers import ResNetConfig, SwinConfig

from drmm_hf import DrmmConfig
from drmm_hf.conversion.class_names import class_fields
from drmm_hf.conversion.model_card import TABLE_5, model_card, stated_result, title


COCO = class_fields("coco", 80)
R101 = ResNetConfig(depths=[3, 4, 23, 3])


@pytest.mark.parametrize(
    ("fields", "name", "average_precision"),
    [
        ({}, "D-RMM on Sparse R-CNN, ResNet-50", 47.0),
        ({"backbone_config": R101, "head_type": "box"}, "Sparse R-CNN, ResNet-101", 46.4),
        ({"backbone_config": SwinConfig(), "decoder_type": "adamixer"}, "D-RMM on AdaMixer, Swin-T", 50.7),
        ({"backbone_config": SwinConfig(), "decoder_type": "adamixer", "head_type": "box"}, "AdaMixer, Swin-T", 48.9),
    ],
)
def test_rows_of_table_5(fields, name, average_precision):
    config = DrmmConfig(**fields, **COCO)
    assert title(config) == name
    assert stated_result(config)[0] == average_precision
    card = model_card(config, "r50.pth", "mmdetection", "a1b2")
    assert f"# {name}\n" in card and f"The paper states AP {average_precision} (AP50 " in card
    assert "not measured" in card and "`r50.pth`" in card and "`a1b2`" in card


@pytest.mark.parametrize(
    "fields",
    [
        {"num_queries": 100, "proposal_grid": [10, 10], **COCO},
        {"top_k_ratio": 0.9, **COCO},
        {"num_labels": 80},
        {"num_labels": 3},
        {"backbone_config": SwinConfig(depths=[2, 2, 18, 2]), **COCO},
    ],
    ids=["100 queries", "fewer queries", "unnamed classes", "3 classes", "Swin-S"],
)
def test_other_detectors_have_no_row(fields):
    config = DrmmConfig(**fields)
    assert stated_result(config) is None
    assert "states no figure" in model_card(config, "x.pth", "mmdetection", "0")


def test_the_gains_of_table_5_are_those_it_prints():
    """The paper prints the gain of each D-RMM over its baseline: a check of twelve copied figures."""
    gains = {("Sparse R-CNN", "ResNet-50"): 2.0, ("Sparse R-CNN", "ResNet-101"): 1.6, ("Sparse R-CNN", "Swin-T"): 2.5}
    gains |= {("AdaMixer", "ResNet-50"): 1.4, ("AdaMixer", "ResNet-101"): 1.2, ("AdaMixer", "Swin-T"): 1.8}
    for (method, backbone), gain in gains.items():
        assert round(TABLE_5[f"D-RMM on {method}", backbone][0] - TABLE_5[method, backbone][0], 1) == gain
    assert len(TABLE_5) == 12
