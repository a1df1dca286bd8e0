"""Operations are those that formulas by hand give, and the paper's figures follow from them."""

import json
from pathlib import Path

import pytest
import torch

from conftest import tiny_config
from drmm_cli import main
from drmm_hf import DrmmConfig, DrmmForObjectDetection
from drmm_hf.benchmarks.cost import hollow_model, measured_cost, model_cost
from drmm_hf.training.arguments import load_recipe


RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
# Of `tiny_config` at 64 x 96: queries, width, feed-forward, dynamic size, cells of a region, classes, stages.
K, D, F, INNER, CELLS, C, S = 12, 16, 32, 4, 49, 3, 2
# (height, width, channels) of the four maps: widths 8, 16, 24, 32.
MAPS = [(16, 24, 8), (8, 12, 16), (4, 6, 24), (2, 3, 32)]


def backbone():
    """A 7x7 stem, then per stage two 3x3 convolutions, and a 1x1 shortcut where the map shrinks."""
    total = 32 * 48 * 3 * 8 * 49
    before = 8
    for height, width, channels in MAPS:
        total += height * width * 9 * (before * channels + channels * channels)
        total += height * width * before * channels if before != channels else 0
        before = channels
    return total


def neck(decoder):
    laterals = sum(height * width * channels for height, width, channels in MAPS)
    outputs = 9 * sum(height * width for height, width, _ in MAPS) if decoder == "sparse_rcnn" else 0
    return laterals * WIDTH[decoder] + outputs * WIDTH[decoder] ** 2


WIDTH = {"sparse_rcnn": D, "adamixer": 32}  # the norm of AdaMixer's neck has 32 groups


def attention(width):
    return S * (K * width * 4 * width + 2 * K * K * width)


def heads(head, width, box_layers):
    outputs = C + 4 + (5 if head == "mixture" else 0)
    return S * K * width * ((1 + box_layers) * width + outputs)


@pytest.mark.parametrize("head", ["mixture", "box"])
def test_sparse_rcnn_by_hand(head):
    cost = model_cost(hollow_model(tiny_config(head_type=head)), 64, 96)
    dynamic = K * D * 2 * D * INNER + K * CELLS * D * D  # generator and projection
    linear = S * (dynamic + 2 * K * D * F) + heads(head, D, 3)
    products = S * 2 * K * CELLS * D * INNER
    assert cost["parts"]["backbone"]["multiply_adds"] == backbone()
    assert cost["parts"]["neck"]["multiply_adds"] == neck("sparse_rcnn")
    assert cost["parts"]["heads"]["multiply_adds"] == heads(head, D, 3)
    assert cost["operations"] == {
        "convolutions": backbone() + neck("sparse_rcnn"),
        "linear_layers": linear,
        "attention": attention(D),
        "other_products": products,
    }
    assert cost["sampling"] == S * K * CELLS * 4 * 2**2 * D  # 2 x 2 samples a cell, 4 neighbours each
    assert cost["multiply_adds"] == sum(cost["operations"].values()) == cost["flops"] // 2
    assert cost["multiply_adds"] == sum(part["multiply_adds"] for part in cost["parts"].values())


def test_adamixer_by_hand():
    width, groups, points, mixed = 32, 4, 8, 16
    config = tiny_config(
        decoder_type="adamixer", hidden_size=width, num_sampling_points=points, num_mixing_points=mixed
    )
    cost = model_cost(hollow_model(config), 64, 96)
    channels = width // groups
    generator = K * width * groups * (channels**2 + points * mixed)
    mixing = K * groups * (points * channels**2 + points * mixed * channels)
    linear = S * (generator + K * mixed * width * width + K * width * groups * points * 3 + 2 * K * width * F)
    assert cost["parts"]["neck"]["multiply_adds"] == neck("adamixer")
    assert cost["operations"] == {
        "convolutions": backbone() + neck("adamixer"),
        "linear_layers": linear + heads("mixture", width, 1),
        "attention": attention(width),
        "other_products": S * mixing,
    }
    assert cost["sampling"] == S * K * groups * points * 4 * 4 * channels  # 4 neighbours on 4 levels


def test_elementwise_layers_by_hand():
    cost = model_cost(hollow_model(tiny_config()), 64, 96)
    cells = [height * width * channels for height, width, channels in MAPS]
    stem = 32 * 48 * 8
    # A norm behind each convolution; the first stage has no shortcut.
    norms = stem + 2 * sum(cells) + sum(cells[1:])
    layer_norms = S * (3 * K * D + K * CELLS * (INNER + D) + K * D + 4 * K * D)
    activations = stem + 2 * sum(cells) + S * (K * F + 4 * K * D)
    assert cost["elementwise"] == {
        "norms": 2 * (norms + layer_norms),
        "activations": activations,
        "pooling": stem,
        "biases": 2 * sum(height * width * D for height, width, _ in MAPS),
    }


@pytest.mark.parametrize(
    ("name", "published", "products"), [("drmm_sparse_rcnn_r50", 165.5, 2.890), ("adamixer_r50", 124.6, 2.831)]
)
def test_the_papers_figures_are_those_of_layers(name, published, products):
    """Table 11's FLOPs leave out attention and products of activations, and count norms and activations."""
    cost = model_cost(hollow_model(DrmmConfig(**load_recipe(RECIPES / f"{name}.yaml").model)), 800, 1280)
    assert round(cost["layer_operations"] / 1e9, 1) == published
    assert cost["operations"]["other_products"] / 1e9 == pytest.approx(products, abs=5e-4)
    assert cost["operations"]["attention"] == 6 * (300 * 256 * 4 * 256 + 2 * 300 * 300 * 256)
    rest = cost["operations"]["attention"] + cost["operations"]["other_products"] - sum(cost["elementwise"].values())
    assert cost["multiply_adds"] - cost["layer_operations"] == rest


def test_a_model_with_weights_costs_the_same_and_is_left_as_it_was():
    model = DrmmForObjectDetection(tiny_config()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model_cost(model, 64, 96) == model_cost(hollow_model(tiny_config()), 64, 96)
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parameters_by_part_add_up():
    model = hollow_model(tiny_config(freeze_backbone_stages=1))
    cost = model_cost(model, 64, 64)
    for name in ("total_parameters", "trainable_parameters"):
        assert cost[name] == sum(part[name] for part in cost["parts"].values())
    assert cost["parts"]["backbone"]["trainable_parameters"] < cost["parts"]["backbone"]["total_parameters"]


def test_groups_and_copies_cost_nothing_at_inference():
    plain, groups = (
        model_cost(hollow_model(tiny_config(head_type="box", num_query_groups=count)), 64, 64) for count in (1, 3)
    )
    assert plain["multiply_adds"] == groups["multiply_adds"]
    assert groups["total_parameters"] > plain["total_parameters"]


def test_speed_is_measured_and_memory_on_a_cpu_is_not():
    measured = measured_cost(DrmmForObjectDetection(tiny_config()), 64, 64, repetitions=1)
    assert measured["pictures_per_second"] > 0 and measured["device"].startswith("CPU")
    assert measured["training_memory"] is None


def test_the_command_prints_and_writes_them_with_the_recipe(tmp_path, capsys):
    recipe, output = Path(__file__).parents[1] / "training" / "tiny.yaml", tmp_path / "new" / "cost.json"
    words = ["benchmark", "cost", str(recipe), "--size", "64", "96", "--speed", "--device", "cpu"]
    assert main([*words, "--top-k-ratio", "0.5", "--output", str(output)]) == 0
    cost = json.loads(output.read_text())
    assert cost["size"] == [64, 96] and cost["pictures_per_second"] > 0
    stored = load_recipe(output.parent / "recipe.yaml").model
    assert (stored["top_k_ratio"], stored["top_k_last_stage"]) == (0.5, False)
    assert cost["multiply_adds"] == model_cost(hollow_model(DrmmConfig(**stored)), 64, 96)["multiply_adds"]
    printed = capsys.readouterr().out
    assert f"{cost['layer_operations'] / 1e9:.2f}" in printed and "training memory: not run" in printed


def test_a_size_below_the_coarsest_stride_is_refused():
    with pytest.raises(ValueError, match="size is 16 x 64; the rule is sides of at least 32"):
        model_cost(hollow_model(tiny_config()), 16, 64)
