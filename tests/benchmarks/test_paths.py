"""Each fast path gives what the plain way gives, and what is left out is really not used."""

import pytest
import torch

from conftest import random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection
from drmm_hf.benchmarks import pooling
from drmm_hf.benchmarks.paths import OF_DECODER, PATHS, benchmark_paths, paths_of, training_paths_of, without
from drmm_hf.benchmarks.tables import paths_table
from drmm_hf.modeling import adamixer_stage, component_sums, roi_pooling, sparse_rcnn_stage
from drmm_hf.modeling.backbone import FoldingConvLayer


CONFIGS = {
    "sparse_rcnn": {"roi_size": pooling.SIZE},
    "adamixer": {"decoder_type": "adamixer", "hidden_size": 32, "num_attention_heads": 4, "proposal_grid": None},
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = DrmmForObjectDetection(tiny_config(**CONFIGS[request.param])).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.is_floating_point():
                value += 0.05 * torch.randn_like(value)
    return model


@torch.inference_mode()
def test_every_path_gives_the_same_detections(model):
    pictures = random_pictures(2, 128, 160)
    expected = model(pictures)
    contestants = paths_of(model.config)
    assert set(contestants) == {"nothing", "all of these", *PATHS} - (
        {*OF_DECODER.values()} - {OF_DECODER[model.config.decoder_type]}
    )
    for name, paths in contestants.items():
        with without(model, paths):
            found = model(pictures)
        for field in ("pred_boxes", "box_scales", "logits"):
            difference = (found[field] - expected[field]).abs().max() / expected[field].abs().max()
            assert difference < 1e-5, (name, field)
            assert name == "nothing" or name in ("channels last", "one table for all stages") or difference > 0, name
    assert torch.equal(model(pictures).logits, expected.logits)  # all is as before


@torch.inference_mode()
def test_what_is_left_out_is_not_used(model, monkeypatch):
    """Each fast path is made to fail: only the pass without it goes through."""
    calls = []

    def used(name, of):
        def call(*args, **kwargs):
            calls.append(name)
            return of(*args, **kwargs)

        return call

    pictures = random_pictures(1, 64, 96)
    monkeypatch.setattr(FoldingConvLayer, "forward", used("norms in convolutions", FoldingConvLayer.forward))
    for module, function in ((sparse_rcnn_stage, "pool_regions"), (adamixer_stage, "sample_maps")):
        name = "one sum a region" if function == "pool_regions" else "one sum a point"
        monkeypatch.setattr(module, function, used(name, getattr(module, function)))
    tables, layouts = [], []
    build = roi_pooling.FeatureMaps.__init__
    monkeypatch.setattr(roi_pooling.FeatureMaps, "__init__", lambda *args: tables.append(1) or build(*args))
    embedder = model.model.backbone.network.embedder
    embedder.register_forward_pre_hook(lambda _, args: layouts.append(args[0].is_contiguous()))

    def observed(paths):
        for one in (calls, tables, layouts):
            one.clear()
        with without(model, paths):
            model(pictures)
        return set(calls), len(tables), layouts[0]

    own = OF_DECODER[model.config.decoder_type]
    assert observed(()) == ({"norms in convolutions", own}, 1, False)
    assert observed(("norms in convolutions",)) == ({own}, 1, False)
    assert observed(("channels last",)) == ({"norms in convolutions", own}, 1, True)
    assert observed(("one table for all stages",)) == ({"norms in convolutions", own}, 2, False)
    assert observed((own,)) == ({"norms in convolutions"}, 0, False)


def test_every_path_of_a_training_step_gives_the_same_gradients(model, monkeypatch):
    model.train()
    pictures, labels = random_pictures(2, 128, 160), random_labels(3, 1)
    summed = []
    forward = component_sums._ComponentSums.forward
    monkeypatch.setattr(component_sums._ComponentSums, "forward", lambda *args: summed.append(1) or forward(*args))

    def gradients(paths):
        summed.clear()
        model.zero_grad()
        with without(model, paths):
            model(pictures, labels=labels).loss.backward()
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    expected = gradients(())
    assert summed
    contestants = training_paths_of(model, "no")
    assert set(contestants) == {
        *("one table for all stages", "loss without a matrix", OF_DECODER[model.config.decoder_type], "all of these")
    }
    for name, paths in contestants.items():
        found = gradients(paths)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        assert bool(summed) == ("loss without a matrix" not in paths)


def test_every_path_of_a_training_step_runs_under_autocast(model):
    model.train()
    for paths in training_paths_of(model, "bf16").values():
        with without(model, paths), torch.autocast("cpu", torch.bfloat16):
            loss = model(random_pictures(2, 128, 160), labels=random_labels(3, 1)).loss
        loss.backward()
        assert loss.isfinite()


def test_training_in_half_precision_keeps_channels_last():
    model = DrmmForObjectDetection(tiny_config()).train()
    backbone, pictures = model.model.backbone, random_pictures(2, 128, 160)
    path = training_paths_of(model, "bf16")["channels last"]

    def in_layout(maps):
        return [one.is_contiguous(memory_format=torch.channels_last) for one in maps]

    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(pictures)
        with without(model, path):
            plain = backbone(pictures)
    assert all(in_layout(found)) and not any(in_layout(plain))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_depthwise_convolutions_are_left_to_autocast():
    backbone = {"model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0", "out_indices": [1, 2, 3, 4]}
    model = DrmmForObjectDetection(tiny_config(backbone_config=backbone)).train()
    assert "depthwise in float32" not in training_paths_of(model, "no")
    path = training_paths_of(model, "bf16")["depthwise in float32"]
    convolution = next(one for one in model.model.backbone.modules() if getattr(one, "groups", 1) > 1)
    pictures = torch.rand(1, convolution.in_channels, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolution(pictures).dtype == torch.float32
        with without(model, path):
            assert convolution(pictures).dtype == torch.bfloat16
        assert convolution(pictures).dtype == torch.float32


def test_figures_and_their_table():
    figures = benchmark_paths({"tiny": tiny_config()}, height=64, width=96, repetitions=2)
    rows = figures["detectors"]["tiny"]
    assert rows["nothing"]["ratio"] == {"median": 1, "min": 1, "max": 1}
    for row in rows.values():
        assert 0 < sum(row[part]["min"] for part in ("backbone", "neck", "decoder")) <= row["cost"]["max"]
    table = paths_table(figures)
    assert all(any(line.startswith(name) for line in table.splitlines()) for name in rows)
    with pytest.raises(ValueError, match="repetitions is 0"):
        benchmark_paths({}, repetitions=0)
