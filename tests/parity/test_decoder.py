"""Queries and decoder stages from given pyramid maps: predictions, losses and gradients."""

import pytest
import torch
from torch import nn

from drmm_hf.conversion.public_names import DETECTOR_NAMES, convert_state_dict
from drmm_hf.modeling.criteria import nll_mcm, pad_targets, reduce_terms
from drmm_hf.modeling.decoder import DrmmDecoder
from drmm_hf.modeling.queries import DrmmQueries, initial_query_boxes
from drmm_hf.modeling.roi_pooling import pool_regions, roi_levels
from parity.conftest import Case, cases, check_mixture, config_of, error, gradient_error


def _run(case: Case, dtype):
    """Return config, proposals, maps, mixtures, last features, loss, its parts and the modules."""
    config = config_of(case.info)
    modules = nn.ModuleDict({"queries": DrmmQueries(config), "decoder": DrmmDecoder(config)}).eval()
    config._attn_implementation = "eager"
    modules.load_state_dict(convert_state_dict(case.starting_with("param."), DETECTOR_NAMES), strict=True)
    modules.to(dtype)
    maps = [case[f"in.feat{level}"].to(dtype).requires_grad_() for level in range(4)]
    boxes, features = modules["queries"](case["in.img_hw"])
    last, mixtures = modules["decoder"](maps, boxes, features)
    targets = pad_targets(case.labels(), case["in.img_hw"], dtype)
    loss, parts = reduce_terms(nll_mcm(mixtures, targets, config), targets, config)
    return config, (boxes, features), maps, mixtures, last, loss * len(boxes), parts, modules


@pytest.mark.parametrize("path", cases("drmm_decoder*.safetensors", "drmm_topk*.safetensors"))
def test_stages_and_losses_in_float32(path):
    case = Case(path)
    config, proposals, maps, mixtures, last, loss, parts, modules = _run(case, torch.float32)
    rows, columns = case.info["proposal_grid_rows_cols"]
    grid = initial_query_boxes(rows * columns, [rows, columns], case.info["proposal_size"])
    assert error(grid, case["init.proposal_grid"]) < 1e-6
    assert error(proposals[0], case["proposals.boxes"]) < 2e-4
    assert error(proposals[1], case["proposals.feats"]) < 2e-4
    regions = pool_regions(maps, proposals[0], (4, 8, 16, 32), 7, 2, 56).transpose(2, 3).flatten(0, 1)
    assert error(regions.reshape(case["stage0.roi_feat"].shape), case["stage0.roi_feat"]) < 2e-4
    num_stages, size = case.info["num_stages"], len(proposals[0])
    inputs = [proposals[0], *(mixture.boxes for mixture in mixtures[:-1])]
    for stage, mixture in enumerate(mixtures):
        recorded = case.starting_with(f"stage{stage}.")
        assert error(inputs[stage].reshape(-1, 4), recorded["rois"][:, 1:]) < 2e-4
        assert torch.equal(roi_levels(inputs[stage], 4, 56).flatten(), recorded["roi_level"])
        check_mixture(mixture, recorded, 2e-4)
        stage_loss = (
            config.loss_weight * size * (parts[f"nll.stage{stage}"] + config.mcm_weight * parts[f"mcm.stage{stage}"])
        )
        assert error(stage_loss, case[f"loss.stage{stage}"]) < 1e-5
    assert error(last, case[f"stage{num_stages - 1}.obj_feat"]) < 2e-4
    assert error(loss, case["loss.total"]) < 1e-5


@pytest.mark.parametrize("path", cases("drmm_decoder*.safetensors", "drmm_topk*.safetensors"))
def test_last_stage_losses_and_gradients_in_float64(path):
    case = Case(path)
    config, _, maps, mixtures, last, loss, parts, modules = _run(case, torch.float64)
    recorded = case.starting_with(f"stage{case.info['num_stages'] - 1}.f64.")
    check_mixture(mixtures[-1], recorded, 1e-8)
    assert error(last, recorded["obj_feat"]) < 1e-8
    assert error(loss, case["loss64.total"]) < 1e-8
    for stage in range(case.info["num_stages"]):
        stage_loss = len(last) * (parts[f"nll.stage{stage}"] + config.mcm_weight * parts[f"mcm.stage{stage}"])
        assert error(config.loss_weight * stage_loss, case[f"loss64.stage{stage}"]) < 1e-8
    loss.backward()
    ours = {name: parameter.grad for name, parameter in modules.named_parameters()}
    gradients = case.starting_with("grad.")
    for level in range(4):
        if f"in.feat{level}" in gradients:
            assert gradient_error(maps[level].grad, gradients.pop(f"in.feat{level}")) < 1e-5
    assert gradients
    for name, gradient in convert_state_dict(gradients, DETECTOR_NAMES).items():
        assert gradient_error(ours[name], gradient) < 1e-5, name
