"""One stage, and its dynamic convolution against one written with loops."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import tiny_config
from drmm_hf.modeling import sparse_rcnn_stage
from drmm_hf.modeling.roi_pooling import pool_regions
from drmm_hf.modeling.sparse_rcnn_stage import DynamicConv, SparseRcnnStage


def config(attention="sdpa", **overrides):
    result = tiny_config(**overrides)
    result._attn_implementation = attention
    return result


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def disturbed(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


def test_dynamic_convolution_equals_loops():
    module = disturbed(DynamicConv(config(roi_size=2)))
    features, regions = random(2, 3, 16), random(2, 3, 4, 16, seed=1)
    ours = module(features, regions)
    numbers = F.linear(features, module.generator.weight, module.generator.bias)
    for image in range(2):
        for query in range(3):
            first = numbers[image, query, :64].reshape(16, 4)
            second = numbers[image, query, 64:].reshape(4, 16)
            rows = []
            for position in range(4):
                x = module.norm_inner(regions[image, query, position] @ first).relu()
                rows.append(module.norm_outer(x @ second).relu())
            x = module.projection(torch.cat(rows))
            torch.testing.assert_close(ours[image, query], module.norm_projection(x).relu())


def stage_inputs():
    maps = [random(2, 16, 64 // stride, 96 // stride, seed=stride) for stride in (4, 8, 16, 32)]
    corners = 60 * torch.rand(2, 12, 2, 2, generator=torch.Generator().manual_seed(5)).sort(dim=2).values
    return maps, corners.flatten(2).double(), random(2, 12, 16)


def test_order_of_the_parts():
    stage = disturbed(SparseRcnnStage(config()))
    maps, boxes, features = stage_inputs()
    regions = pool_regions(maps, boxes, (4, 8, 16, 32), 7, 2, 56)
    x = F.layer_norm(features + stage.attention(features)[0], (16,), *stage.attention_norm.parameters())
    x = F.layer_norm(x + stage.dynamic_conv(x, regions), (16,), *stage.dynamic_norm.parameters())
    first, second = stage.feed_forward[0], stage.feed_forward[3]
    hidden = (x @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    expected = F.layer_norm(x + hidden, (16,), *stage.feed_forward_norm.parameters())
    torch.testing.assert_close(stage(maps, boxes, features), expected)


def test_queries_are_a_set():
    """No position is encoded: reordered queries give reordered features."""
    stage = disturbed(SparseRcnnStage(config()))
    maps, boxes, features = stage_inputs()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        stage(maps, boxes[:, order], features[:, order]), stage(maps, boxes, features)[:, order]
    )


def test_dropout_works_while_training_only():
    stage = disturbed(SparseRcnnStage(config(dropout=0.5, attention_dropout=0.5)))
    inputs = stage_inputs()
    assert torch.equal(stage(*inputs), stage(*inputs))
    stage.train()
    assert not torch.equal(stage(*inputs), stage(*inputs))


@pytest.mark.parametrize("autocast", [False, True])
def test_regions_are_placed_in_float32(autocast, monkeypatch):
    seen = []

    def record(maps, boxes, *args):
        seen.append((boxes.dtype, torch.is_autocast_enabled("cpu")))
        return pool_regions(maps, boxes, *args)

    monkeypatch.setattr(sparse_rcnn_stage, "pool_regions", record)
    maps, boxes, features = stage_inputs()
    dtype = torch.float32 if autocast else torch.bfloat16
    stage = disturbed(SparseRcnnStage(config())).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = stage([m.to(torch.bfloat16) for m in maps], boxes.float(), features.to(dtype))
    assert seen == [(torch.float32, False)] and output.isfinite().all()


def test_overlap_biases_the_attention_on_request():
    plain, biased = config(), config(overlap_attention=True)
    stage, other = disturbed(SparseRcnnStage(biased)), disturbed(SparseRcnnStage(plain))
    assert other.iof_scale is None and stage.iof_scale.shape == (2,)
    other.load_state_dict({name: value for name, value in stage.state_dict().items() if name != "iof_scale"})
    maps = [random(2, 16, 64 // stride, 96 // stride, seed=stride) for stride in (4, 8, 16, 32)]
    boxes, features = random(2, 5, 4).abs().cumsum(-1) * 10, random(2, 5, 16, seed=9)
    assert not torch.allclose(stage(maps, boxes, features), other(maps, boxes, features))
    nn.init.zeros_(stage.iof_scale)
    torch.testing.assert_close(stage(maps, boxes, features), other(maps, boxes, features))
