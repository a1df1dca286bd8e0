"""The detector as a transformers model: outputs, types, frames, weights, gradients, and what users get wrong."""

import copy
import io
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForObjectDetection, SwinConfig, TimmBackboneConfig
from transformers.utils import logging

from conftest import STAGES, random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmModel
from drmm_hf.modeling.boxes import cxcywh_to_xyxy
from drmm_hf.modeling.queries import initial_query_boxes
from drmm_hf.modeling.sparse_rcnn_stage import SparseRcnnStage


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    return DrmmForObjectDetection(tiny_config(**overrides)).eval()


def disturbed(seed=0, **overrides):
    """Return a model in which nothing is trivially 0 or 1 and every prediction differs from the next."""
    model = build(seed, **overrides)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.1 * torch.rand_like(tensor))
            if ".head." in name and tensor.dim() == 2:
                tensor.mul_(3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    disturbed(freeze_backbone_stages=1, backbone_norm="frozen").save_pretrained(path)
    return path


PREDICTIONS = {
    "logits": (2, 12, 3),
    "pred_boxes": (2, 12, 4),
    "box_scales": (2, 12, 4),
    "objectness_logits": (2, 12),
    "class_logits": (2, 12, 3),
}


class TestOutputs:
    def test_shapes_and_types(self):
        model, pictures, labels = disturbed(), random_pictures(), random_labels(3, 1)
        outputs = model(pictures, labels=labels)
        for name, shape in PREDICTIONS.items():
            assert outputs[name].shape == shape and outputs[name].dtype == torch.float32
        assert outputs.last_hidden_state.shape == (2, 12, 16)
        assert len(outputs.auxiliary_outputs) == 1
        assert {name: tuple(value.shape) for name, value in outputs.auxiliary_outputs[0].items()} == PREDICTIONS

    def test_logits_are_the_log_odds_of_class_times_objectness(self):
        outputs = disturbed()(random_pictures())
        product = outputs.class_logits.softmax(-1) * outputs.objectness_logits.sigmoid()[..., None]
        torch.testing.assert_close(outputs.logits.sigmoid(), product)

    def test_boxes_and_scales_are_in_the_frame_of_the_unpadded_picture(self):
        model = disturbed()
        mask = torch.zeros(2, 64, 96, dtype=torch.int64)
        mask[0, :40, :80], mask[1] = 1, 1
        outputs = model(random_pictures(), mask)
        inside = model.model(random_pictures(), mask)
        assert inside.image_sizes.tolist() == [[40, 80], [64, 96]]
        frame = torch.tensor([[80.0, 40, 80, 40], [96, 64, 96, 64]])[:, None]
        last = inside.stages[-1]
        torch.testing.assert_close(cxcywh_to_xyxy(outputs.pred_boxes) * frame, last.boxes)
        corners = last.boxes
        sides = torch.stack([corners[..., 2] - corners[..., 0], corners[..., 3] - corners[..., 1]] * 2, dim=-1)
        floored = torch.maximum(last.scales, 0.04 * sides)
        assert (floored != last.scales).any()
        torch.testing.assert_close(outputs.box_scales * frame, floored)

    def test_auxiliary_outputs_on_request_or_with_labels(self):
        model, pictures, labels = disturbed(num_stages=3), random_pictures(), random_labels(1, 1)
        assert model(pictures).auxiliary_outputs is None
        assert model(pictures, labels=labels, output_auxiliary=False).auxiliary_outputs is None
        asked = model(pictures, output_auxiliary=True).auxiliary_outputs
        assert len(asked) == 2 and len(model(pictures, labels=labels).auxiliary_outputs) == 2
        mixtures = model.model(pictures).stages
        for stage, predictions in enumerate(asked):
            assert torch.equal(predictions["class_logits"], mixtures[stage].class_logits)

    def test_loss_is_the_weighted_sum_of_its_named_terms(self):
        model = disturbed(num_stages=3, mcm_weight=0.3, loss_weight=2)
        outputs = model(random_pictures(), labels=random_labels(3, 1))
        assert list(outputs.loss_dict) == [f"{term}.stage{stage}" for term in ("nll", "mcm") for stage in range(3)]
        terms = outputs.loss_dict
        expected = 2 * sum(terms[f"nll.stage{s}"] + 0.3 * terms[f"mcm.stage{s}"] for s in range(3))
        torch.testing.assert_close(outputs.loss.detach(), expected)
        assert outputs.loss.dim() == 0 and not any(term.requires_grad for term in terms.values())
        assert model(random_pictures()).loss is None and model(random_pictures()).loss_dict is None

    def test_as_a_tuple(self):
        model, pictures, labels = disturbed(), random_pictures(), random_labels(3, 1)
        outputs = model(pictures, labels=labels)
        for found, expected in zip(model(pictures, labels=labels, return_dict=False), outputs.to_tuple(), strict=True):
            if torch.is_tensor(expected):
                assert torch.equal(found, expected)
        assert len(model.model(pictures, return_dict=False)) == 3
        assert type(outputs)().logits is None  # every field has a default: pipelines rebuild outputs from dicts

    def test_selection_of_queries(self):
        outputs = disturbed(top_k_ratio=0.6)(random_pictures(), labels=random_labels(3, 9))
        assert outputs.logits.shape == (2, 4, 3) and outputs.auxiliary_outputs[0]["logits"].shape == (2, 7, 3)
        outputs = disturbed(top_k_ratio=0.6, top_k_last_stage=False)(random_pictures())
        assert outputs.logits.shape == (2, 7, 3) and outputs.last_hidden_state.shape == (2, 7, 16)

    def test_another_criterion_can_be_assigned(self):
        class Constant(nn.Module):
            def forward(self, stages, targets, config):
                return {name: torch.ones(len(stages), *targets.mask.shape) for name in ("nll", "mcm")}

        for criterion in (Constant(), Constant().forward):
            model = build()
            before = model(random_pictures(), labels=random_labels(2, 2)).loss
            model.loss_function = criterion
            loss = model(random_pictures(), labels=random_labels(2, 2)).loss
            assert loss.item() == pytest.approx(2 * 2 * (1 + 0.5)) and loss != before


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_predictions_and_loss_of_a_half_model_are_float32(self, folder, dtype):
        model = DrmmForObjectDetection.from_pretrained(folder, dtype=dtype).train()
        outputs = model(random_pictures().to(dtype), labels=random_labels(3, 0))
        stages = [outputs, *outputs.auxiliary_outputs]
        assert {stage[name].dtype for stage in stages for name in PREDICTIONS} == {torch.float32}
        assert outputs.loss.dtype == torch.float32 and outputs.last_hidden_state.dtype == dtype
        assert {term.dtype for term in outputs.loss_dict.values()} == {torch.float32}
        outputs.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_under_autocast(self, dtype):
        model = build().train()
        exact = model(random_pictures(), labels=random_labels(3, 0))
        with torch.autocast("cpu", dtype):
            outputs = model(random_pictures(), labels=random_labels(3, 0))
        assert {outputs[name].dtype for name in (*PREDICTIONS, "loss")} == {torch.float32}
        assert (96 * (outputs.pred_boxes - exact.pred_boxes)).abs().max() < 1
        torch.testing.assert_close(outputs.loss, exact.loss, rtol=0.05, atol=0)

    def test_float64_stays(self, folder):
        model = DrmmForObjectDetection.from_pretrained(folder, dtype=torch.float64)
        outputs = model(random_pictures().double(), labels=random_labels(3, 0))
        assert {outputs[name].dtype for name in (*PREDICTIONS, "loss")} == {torch.float64}

    @pytest.mark.parametrize(
        ("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2]
    )
    def test_query_boxes_of_a_new_model_are_float32_at_least(self, dtype, kept):
        model = AutoModelForObjectDetection.from_config(tiny_config(), dtype=dtype)
        assert model.model.queries.boxes.dtype == kept and model.model.queries.features.dtype == dtype

    def test_bfloat16_keeps_pixels(self, folder):
        """Query boxes stay float32, so that only the rounding of features moves a box."""
        exact = DrmmForObjectDetection.from_pretrained(folder)
        rounded = DrmmForObjectDetection.from_pretrained(folder, dtype=torch.bfloat16)
        assert {p.dtype for n, p in rounded.named_parameters() if n != "model.queries.boxes"} == {torch.bfloat16}
        assert torch.equal(rounded.model.queries.boxes, exact.model.queries.boxes)
        pictures = random_pictures(1, 64, 1024)
        sizes = torch.tensor([1024, 64, 1024, 64])
        moved = [model(pictures.to(model.dtype)).pred_boxes for model in (exact, rounded)]
        assert ((moved[0] - moved[1]) * sizes).abs().max() < 1
        for model in (exact, rounded):
            for layer in model.model.decoder.layers:
                nn.init.zeros_(layer.head.box_delta.weight)
                nn.init.zeros_(layer.head.box_delta.bias)
        still = [model(pictures.to(model.dtype)).pred_boxes for model in (exact, rounded)]
        assert torch.equal(*still)


class TestFrames:
    def stub_features(self, model, monkeypatch):
        """Let the picture show the same to every query, so that only the mathematics of the frame is left."""
        channels = torch.linspace(-1, 1, 16)[:, None, None]

        def flat_maps(pixel_values):
            sizes = [tuple(math.ceil(side / stride) for side in pixel_values.shape[-2:]) for stride in (4, 8, 16, 32)]
            return [channels.expand(len(pixel_values), 16, *size) for size in sizes]

        monkeypatch.setattr(model.model.backbone, "forward", flat_maps)
        monkeypatch.setattr(model.model.neck, "forward", lambda maps: maps)

    def test_padding_changes_neither_boxes_nor_loss(self, monkeypatch):
        model = disturbed(proposal_size=0.2, num_stages=1)
        self.stub_features(model, monkeypatch)
        labels, results = random_labels(4), []
        for height, width in ((64, 96), (96, 96), (64, 160), (128, 128)):
            mask = torch.zeros(1, height, width, dtype=torch.int64)
            mask[:, :64, :96] = 1
            outputs = model(torch.zeros(1, 3, height, width), mask, labels=labels)
            results.append((outputs.pred_boxes, outputs.box_scales, outputs.logits, outputs.loss))
        plain = model(torch.zeros(1, 3, 64, 96), labels=labels)
        results.append((plain.pred_boxes, plain.box_scales, plain.logits, plain.loss))
        for found in results[1:]:
            for value, expected in zip(found, results[0], strict=True):
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)

    def test_a_picture_alone_and_in_any_batch_of_its_size(self):
        model = disturbed()
        pictures, mask = random_pictures(4), torch.zeros(4, 64, 96, dtype=torch.int64)
        for index, (height, width) in enumerate([(64, 96), (40, 96), (64, 50), (33, 47)]):
            mask[index, :height, :width] = 1
        pictures = pictures * mask[:, None]
        together = model(pictures, mask)
        for index in range(4):
            alone = model(pictures[index : index + 1], mask[index : index + 1])
            for name in PREDICTIONS:
                torch.testing.assert_close(alone[name][0], together[name][index], rtol=1e-4, atol=1e-5)

    def test_masks_of_every_type(self):
        model, expected = disturbed(), None
        for dtype in (torch.int64, torch.bool, torch.float32, torch.uint8):
            mask = torch.zeros(2, 64, 96)
            mask[:, :40, :80] = 1
            boxes = model(random_pictures(), mask.to(dtype)).pred_boxes
            expected = boxes if expected is None else expected
            assert torch.equal(boxes, expected)


class TestWeights:
    BACKBONES = {
        "resnet": {},
        "swin": {
            "backbone_config": SwinConfig(
                embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES
            )
        },
        "timm": {
            "backbone_config": TimmBackboneConfig(backbone="tf_efficientnet_lite0", out_indices=(1, 2, 3, 4)),
            "hidden_size": 8,
        },
    }

    @pytest.mark.parametrize("family", BACKBONES)
    def test_come_back_bit_for_bit_with_what_is_frozen(self, family, tmp_path):
        model = disturbed(freeze_backbone_stages=2, backbone_norm="frozen", **self.BACKBONES[family])
        model.save_pretrained(tmp_path)
        assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict())
        again, report = DrmmForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        for name, value in model.named_buffers():  # those that are not stored too
            assert torch.equal(again.get_buffer(name), value), name
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        assert {name: parameter.requires_grad for name, parameter in again.named_parameters()} == flags
        assert 0 < sum(flags.values()) < len(flags)
        assert not again.training
        with torch.no_grad():
            assert torch.equal(again(random_pictures()).logits, model(random_pictures()).logits)

    def test_nothing_is_a_buffer_that_is_not_stored(self):
        model = build()
        assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()

    def test_base_model_and_detector_share_a_checkpoint(self, folder, tmp_path):
        detector = DrmmForObjectDetection.from_pretrained(folder)
        base = DrmmModel.from_pretrained(folder)
        for name, value in base.state_dict().items():
            assert torch.equal(value, detector.model.state_dict()[name])
        base.save_pretrained(tmp_path)
        again = DrmmForObjectDetection.from_pretrained(tmp_path)
        assert all(torch.equal(again.state_dict()[name], value) for name, value in detector.state_dict().items())

    @pytest.mark.parametrize(("old", "new"), [(80, 3), (1, 2), (3, 1)])
    def test_a_new_set_of_classes_re_initialises_the_classifier_alone(self, old, new, tmp_path):
        model = disturbed(num_labels=old, category_ids=list(range(old)))
        model.save_pretrained(tmp_path)
        swapped, report = DrmmForObjectDetection.from_pretrained(
            tmp_path, num_labels=new, ignore_mismatched_sizes=True, output_loading_info=True
        )
        classifiers = {f"model.decoder.layers.{s}.head.classifier.{p}" for s in (0, 1) for p in ("weight", "bias")}
        assert {entry[0] for entry in report["mismatched_keys"]} == classifiers and not report["missing_keys"]
        weights = swapped.state_dict()
        for name, value in model.state_dict().items():
            if name not in classifiers:
                assert torch.equal(weights[name], value), name
        bound = math.sqrt(6 / (16 + 1 + new))
        for name in classifiers:
            assert len(weights[name]) == new
            assert weights[name].abs().max() <= (bound if name.endswith("weight") else 0)
            assert weights[name].any() or name.endswith("bias")
        assert swapped(random_pictures()).logits.shape == (2, 12, new)
        assert swapped.config.category_ids is None
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            DrmmForObjectDetection.from_pretrained(tmp_path, num_labels=new)

    def test_a_copy_is_frozen_on_its_own(self):
        model = build(freeze_backbone_stages=1, backbone_norm="train")
        twin = copy.deepcopy(model).train()
        model.eval()
        assert not twin.model.backbone.network.encoder.stages[0].training
        assert twin.model.backbone.network.encoder.stages[1].training


class TestInitialisation:
    """Reference rules: Xavier uniform matrices, zero or default biases, norms 1 and 0, N(0, 1) features, the grid."""

    SIZES = {"hidden_size": 32, "num_stages": 3, "num_labels": 80, "num_queries": 48, "proposal_grid": [6, 8]}

    @pytest.fixture(scope="class", params=["constructor", "detector", "meta device"])
    def model(self, request):
        torch.manual_seed(0)
        config = tiny_config(**self.SIZES)
        if request.param == "constructor":
            return DrmmModel(config)
        if request.param == "detector":
            return DrmmForObjectDetection(config).model
        return DrmmModel.from_pretrained(None, config=config, state_dict={})

    def check_uniform(self, values, bound):
        values = torch.cat([value.flatten() for value in values])
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.9 * bound
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1 if len(values) > 500 else 0.25)
        assert values.mean().abs() < 4 * bound / math.sqrt(3 * len(values))

    def test_stages(self, model):
        for layer in model.decoder.layers:
            stage = layer.stage
            # The attention's input projection is one (3 ch, ch) matrix.
            matrices = {
                stage.attention.in_proj: math.sqrt(6 / (32 + 96)),
                stage.attention.out_proj: math.sqrt(6 / 64),
                stage.dynamic_conv.generator: math.sqrt(6 / (32 + 2 * 32 * 4)),
                stage.dynamic_conv.projection: math.sqrt(6 / (32 * 49 + 32)),
                stage.feed_forward[0]: math.sqrt(6 / 64),
                stage.feed_forward[3]: math.sqrt(6 / 64),
            }
            for linear, bound in matrices.items():
                self.check_uniform([linear.weight], bound)
            assert not stage.attention.in_proj.bias.any() and not stage.attention.out_proj.bias.any()
        stages = [layer.stage for layer in model.decoder.layers]
        for pick in (
            lambda s: s.dynamic_conv.generator,
            lambda s: s.dynamic_conv.projection,
            lambda s: s.feed_forward[0],
            lambda s: s.feed_forward[3],
        ):
            self.check_uniform([pick(s).bias for s in stages], 1 / math.sqrt(pick(stages[0]).in_features))

    def test_heads(self, model):
        heads = [layer.head for layer in model.decoder.layers]
        for head in heads:
            for linear in (m for m in head.modules() if isinstance(m, nn.Linear) and m.out_features == 32):
                self.check_uniform([linear.weight], math.sqrt(6 / 64))
                assert linear.bias is None
            for linear in (head.objectness, head.classifier, head.box_delta, head.box_scale):
                assert not linear.bias.any()
        # Objectness and classes are one matrix in the public code, deltas and scales another.
        combined = math.sqrt(6 / (32 + 81))
        self.check_uniform([head.classifier.weight for head in heads], combined)
        self.check_uniform([head.objectness.weight for head in heads], combined)
        for name in ("box_delta", "box_scale"):
            self.check_uniform([getattr(head, name).weight for head in heads], math.sqrt(6 / (32 + 8)))

    def test_norms_neck_and_queries(self, model):
        norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))]
        assert len(norms) > 20
        for norm in norms:
            assert (norm.weight == 1).all() and not norm.bias.any()
            if isinstance(norm, nn.BatchNorm2d):
                assert (norm.running_var == 1).all() and not norm.running_mean.any()
        for convolution in (m for m in model.neck.modules() if isinstance(m, nn.Conv2d)):
            area = convolution.kernel_size[0] * convolution.kernel_size[1]
            fans = area * (convolution.in_channels + convolution.out_channels)
            self.check_uniform([convolution.weight], math.sqrt(6 / fans))
            assert not convolution.bias.any()
        assert torch.equal(model.queries.boxes, initial_query_boxes(48, [6, 8], 0.5))
        features = model.queries.features
        assert features.mean().abs() < 0.1 and features.std().item() == pytest.approx(1, rel=0.05)

    def test_first_predictions(self, model):
        """Objectness near a half and scales near softplus(0), as zero biases promise."""
        first = model.eval()(random_pictures()).stages[0]
        assert 0.3 < first.objectness_logits.sigmoid().mean() < 0.7
        assert 0.4 < first.scales.mean() < 1.3

    def test_all_weights_are_on_a_real_device_and_finite(self, model):
        assert all(value.device.type == "cpu" and value.isfinite().all() for value in model.state_dict().values())


class TestGradients:
    @pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
    @pytest.mark.parametrize("options", [{}, {"top_k_ratio": 0.6}, {"box_delta_unit": "box"}], ids=str)
    def test_every_trainable_parameter_has_one(self, counts, options):
        """Distributed training need not look for unused parameters, even in a batch without any object."""
        model = disturbed(min_scale_ratio=0, **options).train()  # where the floor holds, scales have no gradient
        loss = model(random_pictures(), labels=random_labels(*counts)).loss
        loss.backward()
        parameters = dict(model.named_parameters())
        assert not [name for name, value in parameters.items() if value.grad is None]
        norms = {name: value.grad.norm().item() for name, value in parameters.items()}
        if any(counts):
            assert all(norm > 0 for name, norm in norms.items() if "decoder" in name or "queries" in name), norms
        else:
            assert loss.item() == 0 and not any(norms.values())

    @pytest.mark.parametrize("arguments", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
    def test_checkpointing_recomputes_the_same(self, arguments, monkeypatch):
        calls, forward = [], SparseRcnnStage.forward
        monkeypatch.setattr(SparseRcnnStage, "forward", lambda *args: calls.append(1) or forward(*args))
        model, pictures, labels = disturbed().train(), random_pictures(), random_labels(3, 1)
        model(pictures, labels=labels).loss.backward()
        plain = {name: value.grad.clone() for name, value in model.named_parameters()}
        assert len(calls) == 2
        model.zero_grad()
        model.gradient_checkpointing_enable(arguments)
        model(pictures, labels=labels).loss.backward()
        assert len(calls) == 6
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.grad, plain[name], rtol=1e-5, atol=1e-7)

    def test_hidden_states_and_attentions_are_given_on_request(self):
        model, pictures = disturbed(), random_pictures()
        model.set_attn_implementation("eager")
        plain = model(pictures)
        assert plain.hidden_states is None and plain.attentions is None
        outputs = model(pictures, output_hidden_states=True, output_attentions=True)
        assert [states.shape for states in outputs.hidden_states] == [(2, 12, 16)] * 3
        initial = model.model.queries.features.expand(2, -1, -1)
        torch.testing.assert_close(outputs.hidden_states[0], initial)
        assert torch.equal(outputs.hidden_states[-1], plain.last_hidden_state)
        assert [weights.shape for weights in outputs.attentions] == [(2, 2, 12, 12)] * 2
        for weights in outputs.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 12))
        assert torch.equal(outputs.pred_boxes, plain.pred_boxes)

    def test_attention_implementations_agree(self):
        model, pictures = disturbed(), random_pictures()
        assert model.config._attn_implementation == "sdpa"
        fused = model(pictures)
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        plain = model(pictures)
        for name in PREDICTIONS:
            torch.testing.assert_close(fused[name], plain[name], rtol=1e-4, atol=1e-5)

    def test_a_few_steps_reduce_the_loss(self):
        model, labels = build(box_delta_unit="box", backbone_norm="train").train(), random_labels(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        losses = []
        for _ in range(25):
            loss = model(random_pictures(), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]


class TestLikelihood:
    @pytest.mark.parametrize(
        ("overrides", "family"),
        [
            ({"class_exponent": 0.5, "likelihood_epsilon": 1e-3, "mcm_weight": 0}, stats.cauchy()),
            ({"coordinate_distribution": "gaussian", "min_scale_ratio": 0.3}, stats.norm()),
            (
                {"coordinate_distribution": "student_t", "student_t_freedom": 3.5, "box_delta_unit": "box"},
                stats.t(3.5),
            ),
            ({"decoder_type": "adamixer", "neck_type": "fpn"}, stats.cauchy()),
        ],
    )
    def test_it_is_the_density_that_the_outputs_describe(self, overrides, family):
        """By scipy from the outside frame, one ground truth after another; a padded picture, and one without any."""
        model = disturbed(**overrides).double()
        pictures, labels = random_pictures(3).double(), random_labels(3, 0, 1, dtype=torch.float64)
        labels[0]["boxes"][0, 0] = 0.02  # over the border
        mask = torch.ones(3, 64, 96, dtype=torch.int64)
        mask[2, :, 70:] = mask[2, 50:] = 0
        found = model.log_likelihood(pictures, labels, mask)
        assert [tuple(one.shape) for one in found] == [(3,), (0,), (1,)]
        assert not any(one.requires_grad for one in found)
        with torch.no_grad():
            outputs = model(pictures, mask)
        for index, frame in ((0, (96, 64)), (2, (70, 50))):
            frame = np.array(frame * 2, dtype=float)
            objectness = outputs.objectness_logits[index].sigmoid().numpy()
            scales = outputs.box_scales[index].numpy() * frame
            location = cxcywh_to_xyxy(outputs.pred_boxes[index]).numpy() * frame
            boxes = cxcywh_to_xyxy(labels[index]["boxes"]).numpy() * frame
            for box, label, value in zip(boxes, labels[index]["class_labels"], found[index], strict=True):
                sides = family.pdf((box - location) / scales) / scales
                probability = outputs.class_logits[index].softmax(-1)[:, label].numpy()
                density = (objectness / objectness.sum() * sides.prod(axis=1) * probability).sum()
                assert value.item() == pytest.approx(math.log(density), rel=1e-10)

    def test_it_is_the_loss_without_what_training_adds(self):
        model, labels = disturbed(likelihood_epsilon=0, scale_mixing_by_num_objects=False), random_labels(4, 2)
        pictures = random_pictures()
        found = model.log_likelihood(pictures, labels)
        loss = model(pictures, labels=labels).loss_dict["nll.stage1"]
        assert -torch.cat(found).sum() / 2 == pytest.approx(loss.item(), rel=1e-5)

    def test_box_heads_have_none(self):
        model = disturbed(head_type="box", criterion="focal_l1_giou")
        assert model(random_pictures()).scale_freedom is None
        with pytest.raises(ValueError, match="head_type is 'box', which has no density; it must be 'mixture'"):
            model.log_likelihood(random_pictures(), random_labels(1, 1))

    def test_bad_labels_are_refused(self):
        with pytest.raises(ValueError, match="labels holds 1 entries for 2 images"):
            disturbed().log_likelihood(random_pictures(), random_labels(1))
        with pytest.raises(ValueError, match=r"class_labels from 3 to 3; they must lie in \[0, num_labels=3\)"):
            labels = [{"class_labels": torch.tensor([3]), "boxes": torch.full((1, 4), 0.5)}]
            disturbed().log_likelihood(random_pictures(1), labels)

    @pytest.mark.parametrize("labels", [None, {"boxes": 1, "class_labels": 2}, [{"boxes": torch.zeros(0, 4)}]])
    def test_what_are_no_labels_is_said(self, labels):
        with pytest.raises(ValueError, match="must be a list with a dict of class_labels and boxes for each picture"):
            disturbed().log_likelihood(random_pictures(1), labels)

    @pytest.mark.parametrize("factor", [96.0, 5.0, -5.0])
    def test_boxes_in_pixels_are_refused_and_those_over_the_border_are_not(self, factor):
        labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[1.1, -0.1, 0.5, 0.5]])}]
        assert disturbed().log_likelihood(random_pictures(1), labels)[0].isfinite().all()
        labels[0]["boxes"][:, :2] *= factor
        with pytest.raises(ValueError, match=r"labels\[0\] has boxes from .* as fractions of the unpadded picture"):
            disturbed().log_likelihood(random_pictures(1), labels)

    @pytest.mark.parametrize(
        ("overrides", "freedom"),
        [
            ({}, 1.0),
            ({"coordinate_distribution": "gaussian"}, math.inf),
            ({"coordinate_distribution": "student_t", "student_t_freedom": 4}, 4.0),
        ],
    )
    def test_the_output_names_the_family_of_its_scales(self, overrides, freedom):
        assert build(**overrides)(random_pictures()).scale_freedom.tolist() == [freedom] * 2


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_work_is_batched_over_pictures():
    """The number of tensor operations of a forward pass does not depend on the number of pictures."""
    model, counts = build(), []
    for size in (2, 5):
        with CountOperations() as operations:
            model(random_pictures(size))
        counts.append(operations.count)
    assert counts[0] == counts[1] > 100


class TestUnusualInputs:
    @pytest.mark.parametrize("size", [(1, 1), (33, 47), (5, 300), (31, 31)])
    def test_pictures_of_any_size(self, size):
        outputs = build()(random_pictures(2, *size), labels=random_labels(3, 1))
        assert outputs.loss.isfinite() and outputs.pred_boxes.isfinite().all()

    @pytest.mark.parametrize(
        "options",
        [{"num_queries": 1, "proposal_grid": [1, 1]}, {"num_labels": 1}, {"num_stages": 1}, {"proposal_grid": None}],
        ids=str,
    )
    def test_smallest_detectors(self, options):
        model = build(**options)
        labels = random_labels(20, 1, num_labels=model.config.num_labels)  # more objects than queries
        outputs = model(random_pictures(), labels=labels)
        outputs.loss.backward()
        assert outputs.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())

    def test_pictures_that_are_not_numbers_end_in_a_loss_that_is_not_a_number(self):
        """Not in an index outside the maps, which on an accelerator would take the process down."""
        for value in (math.nan, math.inf, 1e30):
            outputs = build()(value * random_pictures(), labels=random_labels(3, 1))
            assert not outputs.loss.isfinite()

    def test_labels_may_carry_more_and_other_types(self):
        model, labels = build(), random_labels(3, 0)
        expected = model(random_pictures(), labels=labels).loss
        for label in labels:
            label["boxes"], label["class_labels"] = label["boxes"].double(), label["class_labels"].int()
            label |= {"image_id": torch.tensor([1]), "orig_size": torch.tensor([64, 96])}
        torch.testing.assert_close(model(random_pictures(), labels=labels).loss, expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"class_labels": torch.tensor([0, 3])}, r"class_labels from 0 to 3; .*\[0, num_labels=3\)"),
            ({"class_labels": torch.tensor([0, -1])}, "class_labels from -1 to 0"),
            ({"class_labels": torch.tensor([0.0, 1.0])}, "class_labels of type torch.float32; .*integers"),
            ({"class_labels": torch.tensor([[0], [1]])}, r"boxes of shape .* must be \(N, 4\) and \(N,\)"),
            ({"boxes": torch.rand(3, 4)}, r"boxes of shape \(3, 4\) and class_labels of shape \(2,\)"),
            ({"boxes": torch.full((2, 4), math.nan)}, "boxes .*nan.* must be finite"),
            ({"boxes": torch.full((2, 4), math.inf)}, "boxes .*inf.* must be finite"),
        ],
    )
    def test_bad_labels_are_refused_in_words(self, change, message):
        with pytest.raises(ValueError, match=rf"labels\[0\] has {message}"):
            build()(random_pictures(), labels=[random_labels(2)[0] | change, random_labels(1)[0]])

    def test_bad_masks_and_numbers_of_labels_are_refused_in_words(self):
        model, pictures = build(), random_pictures()
        for shape in ((2, 16, 24), (2, 1, 64, 96), (1, 64, 96)):
            with pytest.raises(ValueError, match=r"pixel_mask has shape .* it must be \(B, H, W\)"):
                model(pictures, torch.ones(shape))
        with pytest.raises(ValueError, match="labels holds 1 entries for 2 images"):
            model(pictures, labels=random_labels(1))


@pytest.mark.parametrize("on_terminal", [True, False])
def test_weights_are_loaded_and_saved_with_bars_on_terminals_only(tmp_path, monkeypatch, on_terminal):
    """Bars of transformers, which other models and its own settings keep."""
    stream, drawn = io.StringIO(), logging.is_progress_bar_enabled()
    stream.isatty = lambda: on_terminal
    logging.enable_progress_bar()
    try:
        model = DrmmForObjectDetection(tiny_config())
        monkeypatch.setattr(sys, "stderr", stream)
        model.save_pretrained(tmp_path)
        DrmmForObjectDetection.from_pretrained(tmp_path)
        assert ("Loading weights" in stream.getvalue()) == on_terminal
        assert on_terminal or stream.getvalue() == ""
        hook = logging.set_tqdm_hook(None)
        assert hook is None and logging.is_progress_bar_enabled()
    finally:
        drawn or logging.disable_progress_bar()
