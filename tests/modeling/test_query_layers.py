"""Self-attention and feed-forward network against torch's own."""

import pytest
import torch
from torch import nn

from conftest import tiny_config
from drmm_hf.modeling.query_layers import DrmmSelfAttention, FeedForward, log_overlap


def attention_and_torchs(implementation, heads=4):
    config = tiny_config(num_attention_heads=heads)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, heads, batch_first=True).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = DrmmSelfAttention(config).double().eval()
    ours.load_state_dict(
        {
            "in_proj.weight": theirs.in_proj_weight,
            "in_proj.bias": theirs.in_proj_bias,
            "out_proj.weight": theirs.out_proj.weight,
            "out_proj.bias": theirs.out_proj.bias,
        }
    )
    return ours, theirs


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_equals_torch(implementation, biased):
    ours, theirs = attention_and_torchs(implementation)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=generator)
    bias = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=generator) if biased else None
    mask = bias.flatten(0, 1) if biased else None
    expected, weights = theirs(x, x, x, attn_mask=mask, average_attn_weights=False)
    attended, found = ours(x, bias)
    torch.testing.assert_close(attended, expected)
    if implementation == "eager":
        torch.testing.assert_close(found, weights)
    else:
        assert found is None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_reach_the_bias(implementation):
    ours, _ = attention_and_torchs(implementation, heads=2)
    x = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda bias: ours(x, bias)[0], bias)


def test_overlap_is_the_share_of_the_first_box():
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 2, 4, 4], [10, 10, 12, 14], [5, 5, 5, 9]], dtype=torch.float64)
    share = log_overlap(boxes).exp() - 1e-7
    expected = torch.eye(4, dtype=torch.float64)
    expected[0, 1], expected[1, 0], expected[3, 3] = 0.25, 1, 0
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-12)


def test_feed_forward():
    torch.manual_seed(0)
    module = FeedForward(tiny_config(dropout=0.5)).eval()
    x = torch.randn(3, 16)
    first, second = module[0], module[3]
    expected = (x @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    torch.testing.assert_close(module(x), expected)
    assert not torch.equal(module.train()(x), module(x))
