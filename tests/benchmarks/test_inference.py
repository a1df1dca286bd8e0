"""What is timed is a whole pass of each detector, and what grows is what is said to grow."""

import pytest
import torch

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection
from drmm_hf.benchmarks import inference
from drmm_hf.benchmarks.inference import AXES, Pass, benchmark_inference, most_square_grid, slope
from drmm_hf.benchmarks.tables import inference_table
from drmm_hf.visualization.cost_diagram import cost_diagram


@pytest.fixture(scope="module")
def figures():
    """Measure tiny detectors, one of them in the place of a peer."""

    def tiny_peer(name, num_labels):
        return DrmmForObjectDetection(tiny_config(num_labels=num_labels))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "build_peer", tiny_peer)
        return measured()


def measured():
    return benchmark_inference(
        {"ours": tiny_config(), "other": tiny_config(num_stages=1)},
        height=64,
        width=96,
        dtypes=["float32", "bfloat16"],
        peers=["detr"],
        repetitions=2,
        growing={"height": [32, 64], "batch_size": [1, 3], "num_queries": [4, 9], "num_stages": [1, 2]},
    )


def test_every_contestant_is_held_against_the_first_and_the_roofline_of_its_type(figures):
    names = [(one["name"], one["dtype"]) for one in figures["contestants"]]
    assert names == [(name, dtype) for dtype in ("float32", "bfloat16") for name in ("ours", "other", "DETR R50")]
    first = figures["contestants"][0]
    assert first["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert set(first["parts"]) == {"backbone", "neck", "decoder", "rest"}
    assert sum(share["median"] for share in first["parts"].values()) == pytest.approx(1, abs=0.2)
    assert all(one["flops"] == first["flops"] for one in figures["contestants"] if one["name"] == "ours")
    for one in figures["contestants"]:
        rate = figures["matmul"][one["dtype"]]
        bounds = (one["flops"] / one["processor_seconds"][a] / rate[b] for a, b in (("max", "max"), ("min", "min")))
        low, high = bounds
        if figures["device"] == "cpu":
            assert 0.99 * low <= one["roofline_share"]["median"] <= 1.01 * high


def test_curves_change_one_thing(figures):
    curves = figures["curves"]
    assert {axis: [point["value"] for point in points] for axis, points in curves.items()} == {
        "height": [32, 64],
        "batch_size": [1, 3],
        "num_queries": [4, 9],
        "num_stages": [1, 2],
    }
    ours = figures["contestants"][0]["flops"]
    assert curves["height"][1]["flops"] == curves["batch_size"][0]["flops"] == ours
    assert curves["batch_size"][1]["flops"] == 3 * ours
    for points in curves.values():
        assert points[0]["flops"] < points[1]["flops"]


def test_table_and_picture_show_every_contestant_and_curve(figures, tmp_path):
    table = inference_table(figures)
    for one in figures["contestants"]:
        assert f"{one['name']}" in table and one["dtype"] in table
    assert table.count("more for each") == len(AXES)
    assert cost_diagram(figures, tmp_path / "cost.png").stat().st_size > 10_000
    without = {**figures, "curves": {}}
    assert "more for each" not in inference_table(without)
    assert cost_diagram(without, tmp_path / "bars.png").exists()


def test_a_pass_is_that_of_the_model():
    torch.manual_seed(0)
    model = DrmmForObjectDetection(tiny_config())
    one = Pass(model, "float32", torch.device("cpu"), 2, 64, 96)
    outputs = []
    one.run = lambda **inputs: outputs.append(model(**inputs))
    one()
    with torch.no_grad():
        expected = model(one.pixel_values)
    assert torch.equal(outputs[0].pred_boxes, expected.pred_boxes) and len(outputs[0].pred_boxes) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
        ({"growing": {"num_queries": [0]}}, "growing num_queries is 0"),
        ({"growing": {"num_classes": [1]}}, "axis is 'num_classes', must be one of height"),
        ({"peers": ["yolo"]}, "peer is 'yolo', must be one of"),
        ({"dtypes": ["int8"]}, "dtype is 'int8', must be one of"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        benchmark_inference({"ours": tiny_config()}, **options)


@pytest.mark.parametrize(("number", "grid"), [(300, [15, 20]), (7, [1, 7]), (1, [1, 1]), (100, [10, 10])])
def test_grids(number, grid):
    assert most_square_grid(number) == grid


def test_slope_of_a_line():
    assert slope([(1, 5.0), (2, 7.0), (4, 11.0)]) == pytest.approx((3, 2))
