import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ResNetConfig,
    SwinConfig,
    SwinForImageClassification,
    TimmBackboneConfig,
    ViTImageProcessor,
)

from conftest import STAGES, tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.conversion.backbone_weights import load_backbone_weights


def resnet_detector():
    return DrmmForObjectDetection(tiny_config())


def trained(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return weights of the network's shapes that no initialisation gives."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(value.shape, generator=generator) + 0.5 if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }


@pytest.fixture
def weights():
    return trained(resnet_detector().model.backbone.network)


def written(weights, folder):
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def test_every_tensor_is_loaded_statistics_included_and_the_rest_reported(weights, tmp_path):
    model = resnet_detector()
    report = load_backbone_weights(model, written(weights | {"classifier.weight": torch.ones(3)}, tmp_path))
    loaded = model.model.backbone.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert sorted(report.loaded) == sorted(weights) and report.left_over == ["classifier.weight"]
    assert "1 left over (classifier.weight)" in str(report)


@pytest.mark.parametrize("prefix", ["resnet.", "backbone.", "model."])
def test_a_prefix_of_all_names_is_seen_through(weights, tmp_path, prefix):
    model = resnet_detector()
    path = written({prefix + name: value for name, value in weights.items()}, tmp_path)
    assert len(load_backbone_weights(model.model, path).loaded) == len(weights)
    name = "embedder.embedder.convolution.weight"
    assert torch.equal(model.model.backbone.network.state_dict()[name], weights[name])


def test_torchvision_names_become_those_of_transformers(tmp_path):
    from torchvision.models import resnet18

    theirs = trained(resnet18())
    backbone = ResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = DrmmForObjectDetection(tiny_config(backbone_config=backbone))
    network = resnet18()
    network.load_state_dict(theirs)
    load_backbone_weights(model, written(theirs, tmp_path))
    picture = torch.rand(1, 3, 64, 64) / 100
    with torch.no_grad():
        ours = model.model.backbone.eval()(picture)[0]
        x = network.eval().maxpool(network.relu(network.bn1(network.conv1(picture))))
        torch.testing.assert_close(ours, network.layer1(x), rtol=1e-4, atol=1e-4)


def test_untrained_statistics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="statistics of all 13 batch norms are 0 and 1|batch norms are 0 and 1"):
        load_backbone_weights(
            resnet_detector(), written(resnet_detector().model.backbone.network.state_dict(), tmp_path)
        )


def test_a_missing_tensor_another_shape_and_another_network_are_errors(weights, tmp_path):
    name = "encoder.stages.0.layers.0.layer.0.convolution.weight"
    untouched = resnet_detector()
    before = {key: value.clone() for key, value in untouched.state_dict().items()}
    with pytest.raises(ValueError, match="lacks weights for 1 of the backbone's .*, the first .*stages.0"):
        load_backbone_weights(untouched, written({k: v for k, v in weights.items() if k != name}, tmp_path))
    with pytest.raises(ValueError, match=r"wrong shape: .*stages.0.*\(2, 2\) instead of \(8, 8, 3, 3\)"):
        load_backbone_weights(untouched, written(weights | {name: torch.ones(2, 2)}, tmp_path))
    with pytest.raises(ValueError, match="another architecture"):
        load_backbone_weights(untouched, written({"x.y": torch.ones(1)}, tmp_path))
    with pytest.raises(FileNotFoundError, match="backbone_weights 'nowhere.safetensors' does not exist"):
        load_backbone_weights(untouched, "nowhere.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in untouched.state_dict().items())


def test_torchvision_s_own_file_is_read_and_what_is_no_file_of_tensors_is_named(weights, tmp_path):
    model = resnet_detector()
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "resnet.pth")
    load_backbone_weights(model, tmp_path / "resnet.pth")
    loaded = model.model.backbone.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="pointer.safetensors is a git-LFS pointer .*git lfs pull"):
        load_backbone_weights(model, tmp_path / "pointer.safetensors")
    path = written(weights, tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"cut short, {path.stat().st_size} of {path.stat().st_size + 8} bytes"):
        load_backbone_weights(model, path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no file or folder here and no model on the Hub that can be read: "):
        load_backbone_weights(model, tmp_path)


def test_a_timm_backbone_gives_its_own_normalisation_to_the_processor(tmp_path):
    backbone = TimmBackboneConfig(backbone="tf_efficientnet_lite0", out_indices=(1, 2, 3, 4))
    model = DrmmForObjectDetection(tiny_config(backbone_config=backbone))
    processor = DrmmImageProcessor()
    weights = trained(model.model.backbone.network._backbone)
    report = load_backbone_weights(model, written(weights, tmp_path), processor)
    assert processor.image_mean == processor.image_std == report.mean == report.std == [0.5, 0.5, 0.5]
    loaded = model.model.backbone.network._backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    model.save_pretrained(tmp_path / "model")
    again = DrmmForObjectDetection.from_pretrained(tmp_path / "model").model.backbone.network._backbone.state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_classifiers_of_transformers_fit_but_for_the_norms_of_the_maps(family, tmp_path):
    if family == "swin":
        classifier, config = SwinForImageClassification(SwinConfig(**SWIN)), SwinConfig(**SWIN, out_features=STAGES)
    else:
        classifier = ConvNextModel(ConvNextConfig(**CONVNEXT))
        config = ConvNextConfig(**CONVNEXT, out_features=STAGES)
    classifier.load_state_dict(trained(classifier))
    classifier.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    model, processor = DrmmForObjectDetection(tiny_config(backbone_config=config)), DrmmImageProcessor()
    report = load_backbone_weights(model, str(tmp_path), processor)
    network = model.model.backbone.network.state_dict()
    assert sorted(report.loaded + report.new) == sorted(network)
    assert report.left_over == ([] if family == "swin" else ["layernorm.bias", "layernorm.weight"])
    assert report.new == [name for name in sorted(network) if name.startswith("hidden_states_norms.")]
    assert len(report.new) == 8 and "8 norms of maps are new" in str(report)
    for name, value in classifier.base_model.state_dict().items():
        assert name in report.left_over or torch.equal(network[f"swin.{name}" if family == "swin" else name], value)
    assert processor.image_mean == [0.1, 0.2, 0.3]
