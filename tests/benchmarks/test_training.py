"""The step that is measured is the step that trains."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conftest import random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection
from drmm_hf.benchmarks import training
from drmm_hf.benchmarks.peers import PEERS, build_peer
from drmm_hf.benchmarks.tables import training_table
from drmm_hf.benchmarks.training import PARTS, Trainee, benchmark_training, drawn_pictures
from drmm_hf.training.arguments import TrainingArguments, load_recipe
from drmm_hf.training.ema import averaged_model
from drmm_hf.training.loop import accumulate_gradients
from drmm_hf.training.optimizer import build_optimizer, schedule_factor, set_learning_rate


TINY = Path(__file__).parents[1] / "training" / "tiny.yaml"


@pytest.fixture
def tiny_peer(monkeypatch):
    """Put a tiny detector in the place of each peer."""
    monkeypatch.setattr(
        training, "build_peer", lambda name, num_labels: DrmmForObjectDetection(tiny_config(num_labels=num_labels))
    )


def tiny_recipe(**overrides):
    return load_recipe(TINY, drawn_pictures(64, 96, num_pictures=4) | overrides)


def make_model():
    torch.manual_seed(0)
    return DrmmForObjectDetection(tiny_config())


def test_a_step_equals_the_loop_s():
    arguments = TrainingArguments(max_steps=9, ema_decay=0.9, learning_rate=0.1, warmup_start_factor=0.5)
    batch = {
        "pixel_values": random_pictures(),
        "pixel_mask": torch.ones(2, 64, 96, dtype=torch.int64),
        "labels": random_labels(3, 1),
    }
    accelerator, model = Accelerator(), make_model()
    trainee = Trainee(accelerator, model, model.model.backbone, arguments, output_auxiliary=False)
    for _ in range(2):
        trainee.step(batch)

    other = make_model()
    optimizer = build_optimizer(other, other.model.backbone, arguments)
    average = averaged_model(other, 0.9)
    set_learning_rate(optimizer, schedule_factor(arguments, 0, 0.0))
    other, optimizer = accelerator.prepare(other.train(), optimizer)
    for _ in range(2):
        accumulate_gradients(accelerator, other, [batch])
        accelerator.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(other)
    start = make_model()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    for mine, theirs in ((model, other), (trainee.average.module, average.module)):
        for one, two in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, two)

    # Weights and their average, two moments and a step count of each trained tensor; buffers too.
    trained = [p for p in model.parameters() if p.requires_grad]
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    counters = trainee.average.n_averaged.nbytes
    assert trainee.state_bytes() == 2 * held + counters + sum(2 * p.nbytes + 4 for p in trained)


def test_figures(tiny_peer):
    figures = benchmark_training(tiny_recipe(), repetitions=2, peers=["detr"])
    assert figures["padded_size"] == [64, 96] and figures["batch_size"] == 2 and figures["dtype"] == "no"
    assert list(figures["parts"]) == list(PARTS)
    for clock in ("share", "processor_share"):
        assert sum(part[clock]["min"] for part in figures["parts"].values()) <= 1 + 1e-6
        assert sum(part[clock]["max"] for part in figures["parts"].values()) >= 1 - 1e-6
    assert list(figures["models"]) == ["drmm", "detr"]
    for model in figures["models"].values():
        for name in ("seconds", "processor_seconds", "roofline_share", "ratio"):
            assert 0 < model[name]["min"] <= model[name]["median"] <= model[name]["max"] < math.inf
        assert model["flops"] > 1e6 and model["state_bytes"] > 4 * model["num_parameters"]
        assert model["step_bytes"] is None or model["step_bytes"] >= 0
    assert figures["models"]["drmm"]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}


def test_steps_without_fast_paths_stand_beside():
    figures = benchmark_training(tiny_recipe(), repetitions=2, paths=True)
    table = training_table(figures)
    assert "all of these" in figures["without"] and "loss without a matrix" in figures["without"]
    for name, step in figures["without"].items():
        assert 0 < step["ratio"]["min"] <= step["ratio"]["max"] < math.inf
        assert f"without {name} " in table
    assert benchmark_training(tiny_recipe(), repetitions=1)["without"] == {}


def test_the_roofline_is_that_of_its_own_turn(monkeypatch):
    """A machine that slows down slows both, and the share stays."""
    from drmm_hf.benchmarks.measuring import Seconds

    turns = iter(range(1, 100))

    def slower_and_slower(self, batch):
        self.turn = next(turns)
        return Seconds(wall=1.0, processor=float(self.turn))

    rates = iter(range(1, 100))
    monkeypatch.setattr(Trainee, "timed_step", slower_and_slower)
    monkeypatch.setattr(training, "matmul_rate", lambda *_: Seconds(1.0, 1e9 / next(rates)))
    monkeypatch.setattr(training, "count_flops", lambda work: work() or 5 * 10**8)
    figures = benchmark_training(tiny_recipe(), repetitions=3)
    share = figures["models"]["drmm"]["roofline_share"]
    assert share == pytest.approx({"median": 0.5, "min": 0.5, "max": 0.5})
    assert figures["models"]["drmm"]["processor_seconds"] == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_bfloat16_is_measured_against_its_own_roof(monkeypatch):
    dtypes = []
    rate = training.matmul_rate
    monkeypatch.setattr(
        training, "matmul_rate", lambda dtype, device: dtypes.append(dtype) or rate(dtype, device, 0.001)
    )
    assert benchmark_training(tiny_recipe(mixed_precision="bf16"), repetitions=1)["dtype"] == "bf16"
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repetitions": 0}, "repetitions is 0, must be at least 1"),
        ({"recipe": {"compile": True}, "paths": True}, "paths and compile are both set"),
        ({"peers": ["yolo"]}, "peer is 'yolo', must be one of deformable_detr, detr"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark_training(tiny_recipe(**arguments.pop("recipe", {})), **arguments)


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_built_without_weights_from_anywhere(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with torch.device("meta"):
        model = build_peer(name, num_labels=7)
    assert model.config.num_labels == 7 and model.config.auxiliary_loss
    assert sum(p.numel() for p in training._backbone(model).parameters()) > 1e6
