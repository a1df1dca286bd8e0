"""Inference and the training step are one graph each, which sizes and numbers of ground truths do not multiply."""

import pytest
import torch
from torch._dynamo.utils import counters

from conftest import random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection


ADAMIXER = {"decoder_type": "adamixer", "hidden_size": 32, "num_attention_heads": 4, "proposal_grid": None}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[{}, ADAMIXER], ids=["sparse_rcnn", "adamixer"])
def model(request):
    torch.manual_seed(0)
    return DrmmForObjectDetection(tiny_config(**request.param))


def test_inference_is_one_graph_for_any_batch_and_size(model):
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    shapes = [(batch, 3, *size) for size in ((64, 96), (96, 64), (128, 96)) for batch in (1, 2, 3)]
    with torch.no_grad():
        for shape in shapes:
            pictures = torch.rand(shape)
            assert torch.equal(compiled(pictures).pred_boxes, model(pictures).pred_boxes)
    # At most one a size, and one more because torch compiles a batch of 1 apart.
    assert counters["stats"]["unique_graphs"] <= 4


def test_a_training_step_is_one_graph_for_any_number_of_ground_truths(model):
    model.train()

    def loss(pictures, mask, labels):
        return model(pictures, pixel_mask=mask, labels=labels).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    pictures, mask = random_pictures(), torch.ones(2, 64, 96, dtype=torch.int64)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for counts in ((3, 1), (4, 4), (5, 2), (9, 6), (2, 7)):
        labels = random_labels(*counts)
        values = [one(pictures, mask, labels) for one in (compiled, loss)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=0)
        mine, expected = (torch.autograd.grad(value, parameters, materialize_grads=True) for value in values)
        largest = max(gradient.abs().max() for gradient in expected)
        for one, other in zip(mine, expected, strict=True):
            assert (one - other).abs().max() <= 1e-5 * largest
    assert counters["stats"]["unique_graphs"] <= 3
