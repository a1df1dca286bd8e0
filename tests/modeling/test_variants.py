"""Both decoders with both heads, as transformers models."""

import math

import pytest
import torch
from torch import nn

from conftest import random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection
from drmm_hf.modeling.adamixer_stage import initial_offset_bias


VARIANTS = {
    "mixture on Sparse R-CNN": {},
    "mixture on AdaMixer": {"decoder_type": "adamixer"},
    "box on Sparse R-CNN": {"head_type": "box"},
    "box on AdaMixer": {"decoder_type": "adamixer", "head_type": "box"},
}
SIZES = {"hidden_size": 32, "num_sampling_points": 5, "num_mixing_points": 6}
MIXTURE_ONLY = ("box_scales", "objectness_logits", "class_logits")


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def build(seed=0, disturbance=0.1, **overrides):
    """Return a model in which nothing is trivially 0 or 1, or, without disturbance, a fresh one."""
    torch.manual_seed(seed)
    model = DrmmForObjectDetection(tiny_config(**(SIZES | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if disturbance and name != "model.queries.boxes":
                parameter.add_(disturbance * torch.randn_like(parameter))
    return model


def test_outputs(variant):
    model = build(**variant)
    outputs = model(random_pictures(), labels=random_labels(3, 1))
    assert outputs.logits.shape == (2, 12, 3) and outputs.pred_boxes.shape == (2, 12, 4)
    assert outputs.last_hidden_state.shape == (2, 12, 32)
    for name in MIXTURE_ONLY:
        assert (getattr(outputs, name) is None) == (model.config.head_type == "box")
    if model.config.head_type == "box":
        assert torch.equal(outputs.logits, model.model(random_pictures()).stages[-1].class_logits)
        assert set(outputs.loss_dict) == {f"{term}.stage{s}" for term in ("class", "bbox", "giou") for s in (0, 1)}
    names = {"logits", "pred_boxes", *(MIXTURE_ONLY if model.config.head_type == "mixture" else ())}
    assert [set(stage) for stage in outputs.auxiliary_outputs] == [names]


def test_weights_come_back_bit_for_bit_with_what_is_frozen(variant, tmp_path):
    model = build(**variant)
    model.save_pretrained(tmp_path)
    again, report = DrmmForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    fixed = [name for name, parameter in again.named_parameters() if not parameter.requires_grad]
    assert fixed == (["model.queries.boxes"] if model.config.decoder_type == "adamixer" else [])
    with torch.no_grad():
        assert torch.equal(again(random_pictures()).logits, model(random_pictures()).logits)


@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (14, 2)])
def test_every_trainable_parameter_has_a_gradient(variant, counts):
    """Also without any object, and with more objects than queries."""
    model = build(min_scale_ratio=0, **variant).train()
    loss = model(random_pictures(), labels=random_labels(*counts)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert loss.isfinite() and all(
        gradient is not None and gradient.isfinite().all() for gradient in gradients.values()
    )
    if any(counts):
        assert not [name for name, gradient in gradients.items() if "decoder" in name and not gradient.any()]


def test_checkpointing_recomputes_the_same(variant):
    model, pictures, labels = build(**variant).train(), random_pictures(), random_labels(3, 1)
    model(pictures, labels=labels).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(pictures, labels=labels).loss.backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_and_loss_of_a_half_model_are_float32(variant, dtype, tmp_path):
    build(**variant).save_pretrained(tmp_path)
    model = DrmmForObjectDetection.from_pretrained(tmp_path, dtype=dtype).train()
    outputs = model(random_pictures().to(dtype), labels=random_labels(3, 0))
    assert {outputs[name].dtype for name in ("logits", "pred_boxes", "loss")} == {torch.float32}
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_attention_implementations_agree(variant):
    results = []
    for implementation in ("sdpa", "eager"):
        model = build(**variant)
        model.set_attn_implementation({"": implementation})
        results.append(model(random_pictures()))
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0].pred_boxes, results[1].pred_boxes, rtol=1e-4, atol=1e-4)


def test_a_picture_alone_and_in_a_batch_of_its_size(variant):
    model, pictures = build(**variant), random_pictures(3)
    mask = torch.zeros(3, 64, 96, dtype=torch.int64)
    for index, (height, width) in enumerate([(64, 96), (40, 96), (33, 47)]):
        mask[index, :height, :width] = 1
    together = model(pictures, mask)
    for index in range(3):
        alone = model(pictures[index : index + 1], mask[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.pred_boxes[0], together.pred_boxes[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", ["sparse_rcnn", "adamixer"])
class TestGroupsOfQueries:
    def grouped(self, decoder, groups=3, same=True):
        model = build(decoder_type=decoder, head_type="box", num_query_groups=groups)
        with torch.no_grad():
            features = model.model.queries.features
            if same:
                features.copy_(features[:12].repeat(groups, 1))
        single = build(decoder_type=decoder, head_type="box")
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        for name in ("model.queries.boxes", "model.queries.features"):
            weights[name] = weights[name][:12]
        single.load_state_dict(weights)
        return model, single

    def test_equal_groups_train_as_one(self, decoder):
        model, single = self.grouped(decoder)
        labels = random_labels(3, 1)
        ours = model.train()(random_pictures(), labels=labels)
        alone = single.train()(random_pictures(), labels=labels)
        torch.testing.assert_close(ours.loss, alone.loss)
        torch.testing.assert_close(ours.logits, alone.logits)
        assert ours.pred_boxes.shape == (2, 12, 4) and ours.last_hidden_state.shape == (2, 12, 32)

    def test_groups_do_not_see_each_other(self, decoder):
        model, single = self.grouped(decoder, same=False)
        first = model.train().model(random_pictures()).stages[-1]
        alone = single.train().model(random_pictures()).stages[-1]
        assert len(first.boxes) == 6
        torch.testing.assert_close(first.boxes[::3], alone.boxes)
        torch.testing.assert_close(first.class_logits[::3], alone.class_logits)

    def test_inference_uses_and_computes_the_first_only(self, decoder):
        model, single = self.grouped(decoder, same=False)
        assert len(model.eval().model(random_pictures()).stages[-1].boxes) == 2
        assert torch.equal(model(random_pictures()).logits, single.eval()(random_pictures()).logits)


class TestInitialisation:
    @pytest.fixture(scope="class", params=["mixture", "box"])
    def model(self, request):
        return build(
            disturbance=0, decoder_type="adamixer", head_type=request.param, num_stages=3, num_labels=80
        ).model

    def test_stages(self, model):
        for layer in model.decoder.layers:
            stage = layer.stage
            assert not stage.sampling_offset.weight.any() and not stage.mixing.generator.weight.any()
            offsets = stage.sampling_offset.bias.view(4, 5, 3)
            assert (offsets[..., 2] == -1).all() and 0.2 < offsets[..., :2].abs().max() <= 0.5
            assert 0 < stage.mixing.generator.bias.abs().max() <= 1 / math.sqrt(32)
            assert 0 < stage.attention.out_proj.bias.abs().max() <= 1 / math.sqrt(32)
            assert not stage.attention.in_proj.bias.any()
            assert stage.attention.in_proj.weight.abs().max() <= math.sqrt(6 / (32 + 96))
            assert stage.iof_scale.min() >= 0 and stage.iof_scale.max() <= 4
            bound = math.sqrt(6 / (6 * 32 + 32))
            assert 0.9 * bound < stage.mixing.projection.weight.abs().max() <= bound
        assert torch.cat([layer.stage.iof_scale for layer in model.decoder.layers]).std() > 0.3

    def test_a_square_number_of_points_starts_on_the_grid(self):
        stage = build(disturbance=0, decoder_type="adamixer", num_sampling_points=9).model.decoder.layers[0].stage
        assert torch.equal(stage.sampling_offset.bias, initial_offset_bias(9, 4).flatten())

    def test_heads(self, model):
        for layer in model.decoder.layers:
            head = layer.head
            assert not head.box_delta.weight.any() and not head.box_delta.bias.any()
            if model.config.head_type == "box":
                torch.testing.assert_close(head.classifier.bias.sigmoid(), torch.full((80,), 0.01))
            else:
                assert not head.classifier.bias.any() and head.box_scale.weight.any()
            for linear in (m for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == 32):
                assert 0 < linear.bias.abs().max() <= 1 / math.sqrt(32)

    def test_neck_and_first_boxes(self, model):
        for convolution in model.neck.projections:
            bound = math.sqrt(6 / (convolution.in_channels + 32))
            assert 0.8 * bound < convolution.weight.abs().max() <= bound and not convolution.bias.any()
        stages = model(random_pictures()).stages
        for stage in stages:  # nothing moves yet
            torch.testing.assert_close(stage.boxes, stages[0].boxes, rtol=1e-4, atol=1e-3)


def test_sparse_rcnns_box_head_starts_with_small_scores():
    model = build(disturbance=0, head_type="box", num_labels=80)
    for layer in model.model.decoder.layers:
        torch.testing.assert_close(layer.head.classifier.bias.sigmoid(), torch.full((80,), 0.01))
        assert layer.head.box_delta.weight.any() and not layer.head.box_delta.bias.any()
