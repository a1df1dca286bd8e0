"""Where a model may lie and in which types it may compute: `device_map`, offloading, devices without float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForObjectDetection

from conftest import random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor


VARIANTS = [
    {"decoder_type": "sparse_rcnn"},
    {"decoder_type": "sparse_rcnn", "head_type": "box"},
    {"decoder_type": "adamixer", "hidden_size": 32},
    {"decoder_type": "adamixer", "hidden_size": 32, "head_type": "box"},
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def model(request):
    torch.manual_seed(0)
    return DrmmForObjectDetection(tiny_config(**request.param)).eval()


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "cpu"},
        {"model.backbone": "disk", "model.neck": "cpu", "model.queries": "cpu", "model.decoder": "cpu"},
        {
            "model.backbone": "cpu",
            "model.neck": "disk",
            "model.queries": "cpu",
            "model.decoder.layers.0": "cpu",
            "model.decoder.layers.1": "disk",
        },
    ],
    ids=["auto", "cpu", "backbone on disk", "neck and stage on disk"],
)
def test_a_device_map_changes_no_prediction(model, device_map, tmp_path):
    model.save_pretrained(tmp_path)
    placed = AutoModelForObjectDetection.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path)
    assert "disk" not in str(device_map) or any(parameter.is_meta for parameter in placed.parameters())
    with torch.no_grad():
        expected, outputs = model(random_pictures()), placed(random_pictures())
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-5)


def test_modules_that_stay_whole_exist(model):
    found = {type(module).__name__ for module in model.modules()}
    assert set(DrmmForObjectDetection._no_split_modules) <= found


class NoFloat64(TorchDispatchMode):
    """Fail at the first operation that gives a float64 tensor, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), function
        return result


def test_no_float64_tensor_is_made(model):
    processor = DrmmImageProcessor()
    with NoFloat64():
        outputs = model.train()(random_pictures(), labels=random_labels(3, 0))
        outputs.loss.backward()
        with torch.no_grad():
            outputs = model.eval()(random_pictures(), torch.ones(2, 64, 96, dtype=torch.int64))
        sizes = torch.tensor([[100, 150], [64, 96]])
        for target_sizes in (sizes, sizes.tolist(), None):
            processor.post_process_object_detection(outputs, 0.0, target_sizes, clip=True)
        if outputs.box_scales is not None:
            processor.post_process_object_detection(outputs, 0.0, sizes, interval=0.9)


def test_the_watch_for_float64_sees_one():
    with NoFloat64(), pytest.raises(AssertionError):
        torch.ones(2, dtype=torch.float64)
