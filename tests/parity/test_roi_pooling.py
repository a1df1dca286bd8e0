"""Level choice and RoI pooling against the recorded regions."""

import pytest
import torch

from drmm_hf.modeling.roi_pooling import pool_regions, roi_levels
from parity.conftest import Case, cases, error


@pytest.mark.parametrize("path", cases("roi_extractor*.safetensors"))
def test_levels_and_regions_equal_the_recorded_ones(path):
    case = Case(path)
    maps = list(case.starting_with("in.feat").values())
    rois, expected = case["rois"], case["roi_feat"]
    assert torch.equal(roi_levels(rois[:, 1:], len(maps), 56), case["levels"])
    # The recorded list mixes images; every box is pooled on every image and the right one is compared.
    boxes = rois[None, :, 1:].expand(len(maps[0]), -1, -1)
    regions = pool_regions(maps, boxes, (4, 8, 16, 32), 7, 2, 56)
    regions = regions[rois[:, 0].long(), torch.arange(len(rois))]
    assert error(regions.transpose(1, 2).reshape(expected.shape), expected) < 1e-5
