"""Initial query boxes and their place on pictures."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection
from drmm_hf.modeling.queries import DrmmQueries, initial_query_boxes


@pytest.mark.parametrize(("rows", "columns", "size"), [(15, 20, 0.5), (3, 4, 0.2), (1, 1, 1)])
def test_grid_row_by_row(rows, columns, size):
    boxes = initial_query_boxes(rows * columns, [rows, columns], size)
    expected = [[(c + 0.5) / columns, (r + 0.5) / rows, size, size] for r in range(rows) for c in range(columns)]
    torch.testing.assert_close(boxes, torch.tensor(expected))


def test_without_a_grid_every_query_is_the_whole_picture():
    assert initial_query_boxes(3, None, 0.5).tolist() == [[0.5, 0.5, 1, 1]] * 3


def filled(**overrides):
    config = tiny_config(**overrides)
    queries = DrmmQueries(config)
    boxes = initial_query_boxes(config.num_queries, config.proposal_grid, config.proposal_size)
    with torch.no_grad():
        queries.boxes.copy_(boxes.repeat(config.num_query_groups, 1))
        queries.features.normal_(generator=torch.Generator().manual_seed(0))
    return queries


def test_boxes_lie_on_each_unpadded_picture_in_its_own_pixels():
    boxes, features = filled(num_queries=2, proposal_grid=[1, 2], proposal_size=0.5)(
        torch.tensor([[40, 80], [10, 100]])
    )
    assert boxes.tolist() == [[[0, 10, 40, 30], [40, 10, 80, 30]], [[0, 2.5, 50, 7.5], [50, 2.5, 100, 7.5]]]
    assert features.shape == (2, 2, 16) and torch.equal(features[0], features[1])


@pytest.mark.parametrize(
    ("dtype", "box_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_boxes_are_at_least_float32(dtype, box_dtype):
    boxes, features = filled().to(dtype)(torch.tensor([[800, 1333]]))
    assert boxes.dtype == box_dtype and features.dtype == dtype


def test_both_are_learnt():
    queries = filled()
    boxes, features = queries(torch.tensor([[40, 80], [10, 100]]))
    (boxes.sum() + features.sum()).backward()
    # Centres move both corners, sizes move them apart; two pictures add up.
    torch.testing.assert_close(queries.boxes.grad, torch.tensor([[360.0, 100.0, 0.0, 0.0]]).expand(12, 4))
    assert torch.equal(queries.features.grad, torch.full((12, 16), 2.0))


def test_groups_of_queries_exist_in_training_only():
    queries = filled(num_query_groups=3, head_type="box", num_queries=2, proposal_grid=[1, 2])
    with torch.no_grad():
        queries.boxes += torch.arange(6)[:, None] / 100
    sizes = torch.tensor([[40, 80], [10, 100]])
    boxes, features = queries.train()(sizes)
    assert boxes.shape == (6, 2, 4) and features.shape == (6, 2, 16)
    for image in range(2):
        for group in range(3):
            assert torch.equal(features[3 * image + group], queries.features[2 * group : 2 * group + 2])
    first_boxes, first_features = queries.eval()(sizes)
    assert torch.equal(first_boxes, boxes[::3]) and torch.equal(first_features, features[::3])


def test_adamixer_fixes_its_boxes_and_normalises_its_features():
    queries = filled(decoder_type="adamixer", hidden_size=32)
    boxes, features = queries.requires_grad_(True).train()(torch.tensor([[40, 80]]))
    assert not boxes.requires_grad and features.requires_grad
    torch.testing.assert_close(features.mean(-1), torch.zeros(1, 12), rtol=0, atol=1e-6)
    torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones(1, 12), rtol=0, atol=1e-4)


def test_shared_features_are_one_vector_a_group_at_the_start_alone(tmp_path):
    config = tiny_config(shared_query_features=True, num_query_groups=2, head_type="box")
    features = DrmmForObjectDetection(config).model.queries.features.unflatten(0, (2, -1))
    assert torch.equal(features, features[:, :1].expand_as(features)) and not torch.equal(features[0], features[1])
    assert features.std() > 0.5
    model = DrmmForObjectDetection(config)
    with torch.no_grad():
        model.model.queries.features.normal_()
    model.save_pretrained(tmp_path)
    loaded = DrmmForObjectDetection.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.queries.features, model.model.queries.features)


def test_shared_features_need_boxes_that_differ():
    with pytest.raises(StrictDataclassError, match="shared_query_features"):
        tiny_config(shared_query_features=True, proposal_grid=None)
