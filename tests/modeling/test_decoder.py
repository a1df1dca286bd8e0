"""The refinement loop: what is detached, what is kept, what is recomputed."""

import pytest
import torch

from conftest import tiny_config
from drmm_hf.modeling.criteria import nll_mcm, pad_targets, reduce_terms
from drmm_hf.modeling.decoder import DrmmDecoder


def build(**overrides):
    torch.manual_seed(0)
    config = tiny_config(num_stages=3, **overrides)
    config._attn_implementation = "sdpa"
    decoder = DrmmDecoder(config).eval()
    for layer in decoder.layers:
        if getattr(layer.stage, "iof_scale", None) is not None:  # only a whole model initialises it
            torch.nn.init.uniform_(layer.stage.iof_scale)
    return config, decoder


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 16, 64 // s, 96 // s, generator=generator).requires_grad_() for s in (4, 8, 16, 32)]
    corners = 60 * torch.rand(2, 12, 2, 2, generator=generator).sort(dim=2).values
    features = torch.randn(2, 12, 16, generator=generator)
    return maps, corners.flatten(2).requires_grad_(), features.requires_grad_()


def loss_of(config, mixtures):
    labels = [
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.5]])}
    ]
    targets = pad_targets(labels * 2, torch.tensor([[64, 96]] * 2), torch.float32)
    return reduce_terms(nll_mcm(mixtures, targets, config), targets, config)[0]


def reaches(output, *tensors):
    found = torch.autograd.grad(output, tensors, allow_unused=True, retain_graph=True)
    return [gradient is not None and bool(gradient.any()) for gradient in found]


def test_boxes_are_detached_between_stages_and_features_are_not():
    _, decoder = build()
    maps, boxes, features = inputs()
    last, mixtures = decoder(maps, boxes, features)
    heads = [layer.head for layer in decoder.layers]
    deltas = [head.box_delta.weight for head in heads]
    assert reaches(mixtures[0].boxes.sum(), boxes, deltas[0]) == [True, True]
    for stage in (1, 2):
        locations = mixtures[stage].boxes.sum()
        assert reaches(locations, boxes, *deltas) == [False, *(index == stage for index in range(3))]
        assert reaches(locations, features, maps[0], decoder.layers[0].stage.attention.in_proj.weight) == [True] * 3
    assert reaches(last.sum(), boxes, *deltas) == [False] * 4
    # The boxes are a sum, so the initial ones learn with factor one through the first stage.
    assert torch.equal(torch.autograd.grad(mixtures[0].boxes.sum(), boxes)[0], torch.ones_like(boxes))


def test_each_stage_starts_from_the_boxes_of_the_one_before():
    _, decoder = build()
    maps, boxes, features = inputs()
    last, mixtures = decoder(maps, boxes, features)
    for layer, mixture in zip(decoder.layers, mixtures, strict=True):
        features = layer.stage(maps, boxes, features)
        expected = layer.head(features, boxes)
        for ours, value in zip(mixture, expected, strict=True):
            torch.testing.assert_close(ours, value)
        boxes = expected.boxes
    torch.testing.assert_close(last, features)


@pytest.mark.parametrize("decoder_type", ["sparse_rcnn", "adamixer"])
def test_all_stages_read_one_table_and_a_plain_list_gives_the_same(decoder_type):
    _, decoder = build(decoder_type=decoder_type, neck_type="fpn")
    maps, boxes, features = inputs()
    seen = []
    for layer in decoder.layers:
        layer.stage.register_forward_hook(lambda _, arguments, output: seen.append((*arguments, output)))
    decoder(maps, boxes, features)
    assert len({id(arguments[0].table) for arguments in seen}) == 1 and len(seen) == 3
    for layer, (given, *arguments, output) in zip(decoder.layers, tuple(seen), strict=True):
        assert all(ours is value for ours, value in zip(given, maps, strict=True))
        torch.testing.assert_close(layer.stage(maps, *arguments), output)


class TestSelection:
    @pytest.mark.parametrize(("last_stage", "counts"), [(True, [7, 4, 2]), (False, [7, 4, 4])])
    def test_number_of_queries_after_each_stage(self, last_stage, counts):
        config, decoder = build(top_k_ratio=0.6, top_k_last_stage=last_stage)
        last, mixtures = decoder(*inputs())
        assert config.queries_per_stage == counts
        assert [mixture.boxes.shape for mixture in mixtures] == [(2, count, 4) for count in counts]
        assert last.shape == (2, counts[-1], 16)

    def test_the_ratio_may_be_set_on_a_model_that_is_there(self):
        config, decoder = build()
        config.top_k_ratio = 0.6
        assert [mixture.boxes.shape[1] for mixture in decoder(*inputs())[1]] == [7, 4, 2]

    def test_keeps_the_highest_objectness_in_order_and_the_mixing_of_before(self):
        _, everything = build()
        _, decoder = build(top_k_ratio=0.6)
        maps, boxes, features = inputs()
        _, (mixture, *_) = everything(maps, boxes, features)
        _, (selected, *_) = decoder(maps, boxes, features)
        for image in range(2):
            order = sorted(range(12), key=lambda k, image=image: -mixture.objectness_logits[image, k].item())[:7]
            for ours, value in zip(selected, mixture, strict=True):
                torch.testing.assert_close(ours[image], value[image, order])
        assert (selected.log_mixing.exp().sum(-1) < 0.95).all()

    def test_the_loss_of_shrinking_stages_is_the_sum_of_each(self):
        config, decoder = build(top_k_ratio=0.6)
        _, mixtures = decoder(*inputs())
        alone = sum(loss_of(config, [mixture]) for mixture in mixtures)
        torch.testing.assert_close(loss_of(config, mixtures), alone)

    def test_ratio_one_keeps_all(self):
        for ours, value in zip(build(top_k_ratio=1)[1](*inputs())[1], build()[1](*inputs())[1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, value, strict=True))


def test_every_parameter_gets_a_gradient():
    """Distributed training need not look for unused parameters."""
    config, decoder = build()
    maps, boxes, features = inputs()
    loss_of(config, decoder(maps, boxes, features)[1]).backward()
    assert not [name for name, parameter in decoder.named_parameters() if parameter.grad is None]
    assert boxes.grad.any() and features.grad.any() and all(m.grad is not None for m in maps)
