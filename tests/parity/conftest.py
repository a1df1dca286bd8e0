"""Recorded cases of the public implementation, found by file name.

The folder in the environment variable `DRMM_REFERENCE_DIR` is tested when it is set, else the copy in `tests/golden`.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


GOLDEN = Path(__file__).parents[1] / "golden"
REFERENCE = Path(os.environ.get("DRMM_REFERENCE_DIR", GOLDEN))


class Case:
    """One recorded case: its sizes and options (`info`) and its tensors."""

    def __init__(self, path: Path):
        self.info = json.loads(path.with_suffix(".json").read_text())
        self.tensors = load_file(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def starting_with(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors whose name starts with `prefix`, by the rest of the name."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def labels(self, prefix: str = "in.") -> list[dict[str, torch.Tensor]]:
        """Ground truths as labels of the model: cxcywh in [0, 1], in float64 to lose nothing."""
        labels = []
        for index, (height, width) in enumerate(self["in.img_hw"].tolist()):
            corners = self[f"{prefix}gt_boxes.{index}"].double() / torch.tensor([width, height] * 2)
            centres, sizes = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
            labels.append(
                {"boxes": torch.cat([centres, sizes], 1), "class_labels": self[f"{prefix}gt_labels.{index}"]}
            )
        return labels


def cases(*patterns: str, golden: bool = True) -> list:
    """Pytest parameters for every recorded file that fits a pattern.

    Finding none at all is an error, but for cases that the copy in `tests/golden` has no room for (`golden=False`).
    """
    paths = [path for pattern in patterns for path in sorted(REFERENCE.glob(pattern))]
    if not paths and (golden or REFERENCE != GOLDEN):
        raise FileNotFoundError(f"{REFERENCE} holds no file {' or '.join(patterns)}")
    return [pytest.param(path, id=path.stem) for path in paths]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |a - b| / (1 + |b|)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    return ((actual.double() - expected.double()).abs() / (1 + expected.double().abs())).max().item()


def gradient_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |a - b| relative to the largest |b|."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max().item()
    return difference / max(expected.double().abs().max().item(), 1e-30)


def config_of(info: dict, backbone_config=None):
    """Build the configuration of a recorded case from its sizes and options."""
    from drmm_hf import DrmmConfig

    options = info["additional_cfg"]
    rows, columns = info["proposal_grid_rows_cols"]
    return DrmmConfig(
        backbone_config=backbone_config,
        num_labels=info["num_classes"],
        num_queries=rows * columns,
        proposal_grid=[rows, columns],
        proposal_size=info["proposal_size"],
        hidden_size=info["channels"],
        dynamic_size=info["dynamic_feat_channels"],
        num_attention_heads=info["num_heads"],
        intermediate_size=info["ffn_channels"],
        num_stages=info["num_stages"],
        roi_size=info.get("roi_size", 7),
        roi_sampling_ratio=info.get("sampling_ratio", 2),
        top_k_ratio=options["top_k_ratio"],
        freeze_backbone_stages=info.get("backbone", {}).get("frozen_stages", 0),
        backbone_norm="eval",
        **objective_of(options),
    )


def objective_of(options: dict) -> dict:
    """Translate the public code's options of the loss into ours."""
    detached = {"pi": "mcm_mix_detach", "F": "mcm_coord_detach", "P": "mcm_cat_detach"}
    return {
        "coordinate_distribution": options["coord_dist"],
        "student_t_freedom": options["t_freedom"],
        "min_scale_ratio": options["min_sc_ratio"],
        "class_exponent": options["prob_weight"],
        "loss_weight": options["mm_weight"],
        "mcm_weight": options["mcm_weight"],
        "mcm_stop_gradient": [factor for factor, name in detached.items() if options[name]],
    }


def check_mixture(mixture, expected: dict, tolerance: float):
    """Compare a stage's mixture with the recorded `loc, sc, prob, fg, mix`."""
    assert error(mixture.boxes, expected["loc"]) < tolerance
    assert error(mixture.scales, expected["sc"]) < tolerance
    assert error(mixture.class_logits.softmax(-1), expected["prob"]) < tolerance
    assert error(mixture.objectness_logits.sigmoid(), expected["fg"].squeeze(-1)) < tolerance
    assert error(mixture.log_mixing.exp(), expected["mix"].squeeze(-1)) < tolerance


def check_detections(case: Case, outputs):
    """Compare the best detections in original pixels, where neighbouring scores differ by more than 1e-5."""
    from drmm_hf import DrmmImageProcessor

    sizes = [
        (height / scale_y, width / scale_x)
        for (height, width), (scale_x, scale_y) in zip(
            case["in.img_hw"].tolist(), case.info["scale_factor_wh"], strict=True
        )
    ]
    top_k = case.info.get("max_per_img", 100)
    results = DrmmImageProcessor().post_process_object_detection(outputs, 0.0, sizes, top_k)
    for index, result in enumerate(results):
        scores = case[f"det.{index}.scores"]
        assert error(result["scores"], scores) < 2e-4
        gaps = (scores[:-1] - scores[1:]).abs()
        apart = torch.ones(len(scores), dtype=torch.bool)
        apart[1:] &= gaps > 1e-5
        apart[:-1] &= gaps > 1e-5
        assert apart.sum() >= 5
        assert torch.equal(result["labels"][apart], case[f"det.{index}.labels"][apart])
        assert error(result["boxes"][apart], case[f"det.{index}.boxes"][apart]) < 1e-3
