import pytest
import torch

from drmm_hf.conversion.public_names import DETECTOR_NAMES, RESNET_NAMES, convert_state_dict


def test_rows_of_joint_layers_are_split():
    weight = torch.arange(12.0).reshape(4, 3)
    converted = convert_state_dict({"roi_head.bbox_head.2.fc_cls.weight": weight}, DETECTOR_NAMES)
    assert torch.equal(converted["decoder.layers.2.head.objectness.weight"], weight[:1])
    assert torch.equal(converted["decoder.layers.2.head.classifier.weight"], weight[1:])
    bias = torch.arange(8.0)
    converted = convert_state_dict({"roi_head.bbox_head.0.fc_reg.bias": bias}, DETECTOR_NAMES)
    assert torch.equal(converted["decoder.layers.0.head.box_delta.bias"], bias[:4])
    assert torch.equal(converted["decoder.layers.0.head.box_scale.bias"], bias[4:])


def test_stage_numbers_count_from_zero():
    converted = convert_state_dict({"layer3.1.conv2.weight": torch.ones(1)}, RESNET_NAMES)
    assert list(converted) == ["encoder.stages.2.layers.1.layer.1.convolution.weight"]


def test_unknown_names_are_errors_that_name_them():
    with pytest.raises(ValueError, match="1 names fit no pattern: 'optimizer.state'"):
        convert_state_dict({"optimizer.state": torch.ones(1)}, DETECTOR_NAMES)


def test_two_names_for_one_tensor_are_an_error():
    with pytest.raises(ValueError, match="which another tensor became before"):
        convert_state_dict({"a": torch.ones(1), "b": torch.ones(1)}, {"[ab]": "c"})
