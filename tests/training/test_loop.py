import itertools
import json
import math
import os
import re
import shutil
import signal
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, tracking
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from drmm_hf import DrmmForObjectDetection
from drmm_hf.data.coco import categories, save_coco
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation.origin import weights_digest
from drmm_hf.training import loop, run_log
from drmm_hf.training.build import build_model, load_split, training_loader
from drmm_hf.training.loop import accumulate_gradients, train


TIMES = {"seconds", "images_per_second", "training_seconds"}


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def figures(folder):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(folder)]


def weights(folder):
    return AutoModelForObjectDetection.from_pretrained(folder).state_dict()


@pytest.fixture
def parts(tiny_recipe):
    """Model, processor and the pictures of one training batch of 4, one of them without objects."""
    recipe = tiny_recipe(dropout=0.0, batch_size=4, augmentation="none")
    dataset, _ = load_split(recipe.data, "train")
    label_map = LabelMap.from_categories(categories(dataset))
    torch.manual_seed(0)
    model, processor = build_model(recipe, label_map)
    model.train()
    batch = next(iter(training_loader(dataset, label_map, processor, recipe)))
    batch["labels"][2]["boxes"] = torch.zeros(0, 4)
    batch["labels"][2]["class_labels"] = torch.zeros(0, dtype=torch.int64)
    return model, processor, batch


def test_a_few_steps_lower_the_loss_on_one_batch(parts):
    model, _, batch = parts
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        terms, images = accumulate_gradients(Accelerator(cpu=True), model, [batch])
        losses.append(float(terms[0]["loss"]))
        optimizer.step()
        optimizer.zero_grad()
    assert images == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.98 * losses[0]


@pytest.fixture
def box_parts(parts):
    """The same with the baseline's head, and groups, copies and fewer queries than ground truths."""
    options = {"head_type": "box", "box_delta_unit": "pixels", "num_query_groups": 2, "num_ground_truth_copies": 3}
    torch.manual_seed(0)
    config = type(parts[0].config).from_dict(parts[0].config.to_dict(), **options)
    return DrmmForObjectDetection(config).train(), *parts[1:]


@pytest.mark.parametrize("criterion", ["nll_mcm", "focal_l1_giou"])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 1, 1, 1), (3, 1), (1, 3)])
def test_accumulation_is_one_large_batch(request, criterion, sizes):
    model, _, batch = request.getfixturevalue("parts" if criterion == "nll_mcm" else "box_parts")
    assert model.config.criterion == criterion
    model = model.double()
    batch = {**batch, "pixel_values": batch["pixel_values"].double()}

    def gradient(batches):
        model.zero_grad()
        accumulate_gradients(Accelerator(cpu=True), model, batches)
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])

    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    parts_of_batch = [
        {name: values[start : start + size] for name, values in batch.items()}
        for start, size in zip(starts, sizes, strict=True)
    ]
    whole = gradient([batch])
    torch.testing.assert_close(gradient(parts_of_batch), whole, rtol=0, atol=1e-9 * float(whole.abs().max()))


def test_a_run_is_not_resumed_with_another_model(tiny_recipe, tmp_path):
    train(tiny_recipe(output_dir=str(tmp_path / "run"), max_steps=1))
    with pytest.raises(ValueError, match="holds a run of another model: dropout was .* and is 0.25"):
        train(tiny_recipe(output_dir=str(tmp_path / "run"), max_steps=2, resume=True, dropout=0.25))


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


@pytest.mark.parametrize(("killed_at", "num_workers"), [(1, 0), (3, 1), (4, 0)])
def test_a_killed_run_resumes_bit_by_bit(tiny_recipe, tmp_path, monkeypatch, killed_at, num_workers):
    """3 steps an epoch: killed inside one, at its end and at the start of the next; dropout, flips and EMA are on."""
    options = {"save_every_steps": 1, "ema_decay": 0.9, "num_workers": num_workers, "evaluate_every": 1}
    whole = train(tiny_recipe(output_dir=str(tmp_path / "whole"), **options))

    def save_then_kill(accelerator, output_dir, model, processor, progress, keep_last, raw_model):
        save_checkpoint(accelerator, output_dir, model, processor, progress, keep_last, raw_model)
        if progress.step == killed_at:
            with (output_dir / "log.jsonl").open("a") as file:  # what the dead run logged after its checkpoint
                file.write(json.dumps({"step": killed_at + 1, "loss": 0.0}) + '\n{"step": ')
            raise Killed

    save_checkpoint = loop.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save_then_kill)
        with pytest.raises(Killed):
            train(tiny_recipe(**options))
    torch.manual_seed(12345)
    resumed = train(tiny_recipe(resume=True, **options))

    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
    for folder in ("last", "best"):
        expected, got = weights(tmp_path / "whole" / folder), weights(tmp_path / "run" / folder)
        assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    timeless = [{k: v for k, v in summary.items() if not k.endswith("seconds")} for summary in (whole, resumed)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_evaluation_that_was_cut_short_is_made_up_for(tiny_recipe, tmp_path, monkeypatch, when):
    """Killed before an evaluation, it is measured when the run goes on; killed right after one, it is not repeated."""
    options = {"evaluate_every": 1, "dropout": 0.0}
    train(tiny_recipe(output_dir=str(tmp_path / "whole"), **options))
    evaluate_model, write_evaluation, calls = loop.evaluate_model, run_log.Log.write_evaluation, []

    def evaluate_or_die(*args):
        calls.append(args)
        if when == "before":
            raise Killed
        return evaluate_model(*args)

    def write_and_die(log, metrics):
        write_evaluation(log, metrics)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_model", evaluate_or_die)
        patch.setattr(run_log.Log, "write_evaluation", write_and_die)
        with pytest.raises(Killed):
            train(tiny_recipe(**options))
    assert len(calls) == 1
    monkeypatch.setattr(loop, "evaluate_model", lambda *args: calls.append(args) or evaluate_model(*args))
    train(tiny_recipe(resume=True, **options))
    assert len(calls) == (3 if when == "before" else 2)  # of two evaluations
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_patience_ends_a_run(tiny_recipe, tmp_path, monkeypatch):
    values = iter([0.5, 0.25, 0.5, 0.75, 0.7, 0.6, 0.5])
    evaluate_model = loop.evaluate_model

    def next_value(*args):
        metrics, detections = evaluate_model(*args)
        return {**metrics, "AP": next(values)}, detections

    monkeypatch.setattr(loop, "evaluate_model", next_value)
    summary = train(tiny_recipe(epochs=7, evaluate_every=1, patience=3))
    assert (summary["epochs"], summary["best_step"]) == (7, 12)
    values = iter([0.5, 0.25, 0.5, 0.75])
    summary = train(tiny_recipe(output_dir=str(tmp_path / "short"), epochs=7, evaluate_every=1, patience=2))
    assert (summary["epochs"], summary["best_step"]) == (3, 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(tiny_recipe, tmp_path, monkeypatch, capsys, number, code):
    """In the middle of the second step of an epoch; the run then goes on as if nothing had happened."""
    options = {"evaluate_every": 1, "ema_decay": 0.9}
    train(tiny_recipe(output_dir=str(tmp_path / "whole"), **options))

    def accumulate_and_signal(*args):
        steps.append(args)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return accumulate_gradients(*args)

    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", accumulate_and_signal)
        with pytest.raises(SystemExit) as stopped:
            train(tiny_recipe(**options))
    assert stopped.value.code == code and len(steps) == 2
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().out
    assert signal.getsignal(number) is not None and "StopRequest" not in repr(signal.getsignal(number))
    train(tiny_recipe(resume=True, **options))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_signal_during_an_evaluation_leaves_at_once(tiny_recipe, tmp_path, monkeypatch):
    options = {"evaluate_every": 1}
    train(tiny_recipe(output_dir=str(tmp_path / "whole"), **options))

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still evaluating")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_model", interrupted)
        with pytest.raises(SystemExit):
            train(tiny_recipe(**options))
    train(tiny_recipe(resume=True, **options))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_what_changed_is_said(tiny_recipe, tmp_path, capsys):
    train(tiny_recipe(max_steps=1, resume=True))
    assert "nothing to resume" in capsys.readouterr().out
    train(tiny_recipe(max_steps=2, resume=True, horizontal_flip=0.25))
    said = capsys.readouterr().out
    assert "training.max_steps was 1 and is now 2: the learning rate follows the new length" in said
    assert "data.horizontal_flip was 0.5 and is now 0.25" in said


def test_the_effective_batch_is_told_with_advice(tiny_recipe):
    training = tiny_recipe(learning_rate=1e-3, learning_rate_batch_size=4).training
    assert loop.describe_batch(training, 1).count("\n") == 0
    first, second = loop.describe_batch(training, 4).splitlines()
    assert first.startswith("effective batch 16: 2 pictures x 2 accumulation steps x 4 processes")
    assert second.endswith("effective batch of 4; try 0.002 to 0.004")
    assert loop.describe_batch(tiny_recipe(learning_rate_batch_size=None).training, 4).count("\n") == 0


def test_gradient_checkpointing_changes_nothing(tiny_recipe, tmp_path):
    options = {"epochs": 1, "dropout": 0.0}
    train(tiny_recipe(output_dir=str(tmp_path / "plain"), **options))
    train(tiny_recipe(output_dir=str(tmp_path / "again"), gradient_checkpointing=True, **options))
    plain, again = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("plain", "again"))
    assert again == pytest.approx(plain, rel=1e-5)


def test_a_finished_run_is_neither_overwritten_nor_repeated(tiny_recipe, tmp_path):
    first = train(tiny_recipe(epochs=1))
    with pytest.raises(ValueError, match="--resume"):
        train(tiny_recipe(epochs=1))
    lines = rows(tmp_path / "run")
    again = train(tiny_recipe(epochs=1, resume=True))
    assert rows(tmp_path / "run") == lines
    assert (again["AP"], again["steps"]) == (first["AP"], 3)
    longer = train(tiny_recipe(epochs=2, resume=True))
    assert longer["steps"] == 6
    assert longer["seconds"] > longer["training_seconds"] > again["training_seconds"]


def test_a_run_may_go_on_with_larger_batches(tiny_recipe, tmp_path):
    train(tiny_recipe(max_steps=2))
    summary = train(tiny_recipe(resume=True, batch_size=10, epochs=None, max_steps=3))
    assert (summary["steps"], summary["epochs"], summary["images"]) == (3, 2, 18)


def test_what_a_run_leaves_behind(tiny_recipe, tmp_path):
    summary = train(tiny_recipe(trackers=["tensorboard"], ema_decay=0.5))
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert (summary["steps"], summary["epochs"], summary["images"], summary["num_images"]) == (6, 2, 20, 3)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {name: metrics[name] for name in ("AP", "AP50", "ECE")} == {
        name: summary[name] for name in ("AP", "AP50", "ECE")
    }
    assert metrics["AP"] == [row for row in rows(run) if "AP" in row][-1]["AP"]
    about = json.loads((run / "evaluation.json").read_text())
    assert (about["weights"], about["step"]) == (weights_digest(run / "best"), summary["best_step"])
    assert list((run / "tensorboard").rglob("events.*"))
    with Image.open(run / "first_batches.jpg") as picture:
        assert picture.width > 64
    (manifest,) = json.loads((run / "manifest.json").read_text())
    assert (manifest["step"], manifest["processes"], manifest["data"]["train"]["num_images"]) == (0, 1, 10)
    for name in ("best", "last"):
        model = AutoModelForObjectDetection.from_pretrained(run / name)
        processor = AutoImageProcessor.from_pretrained(run / name)
        assert (model.config.category_ids, model.config.id2label[2]) == ([2, 3, 7], "triangle")
        assert dict(processor.size) == {"shortest_edge": 64, "longest_edge": 64}
    average = torch.load(run / "last" / "training_state" / "custom_checkpoint_1.pkl")
    trained = torch.load(run / "last" / "training_state" / "optimizer.bin")
    assert int(average["n_averaged"]) == 6 == int(trained["state"][0]["step"])
    assert all(torch.equal(tensor, average["module." + name]) for name, tensor in weights(run / "last").items())


def test_last_epoch_may_end_in_a_smaller_step(tiny_recipe, tmp_path):
    train(tiny_recipe(epochs=1))
    assert [row["images"] for row in rows(tmp_path / "run") if "loss" in row] == [4, 8, 10]


def test_log_windows_add_up(tiny_recipe, tmp_path):
    """Two steps a line: the loss is the mean over the pictures of both, whatever the size of the batches."""
    train(tiny_recipe(output_dir=str(tmp_path / "one"), epochs=1, dropout=0.0))
    train(tiny_recipe(output_dir=str(tmp_path / "two"), epochs=1, dropout=0.0, log_every=2))
    single, double = ([row for row in rows(tmp_path / name) if "loss" in row] for name in ("one", "two"))
    assert [row["step"] for row in double] == [2, 3]
    assert double[0]["loss"] == pytest.approx((single[0]["loss"] + single[1]["loss"]) / 2, rel=1e-6)
    assert double[1]["loss"] == pytest.approx(single[2]["loss"], rel=1e-6)
    assert double[0]["grad_norm"] == pytest.approx((single[0]["grad_norm"] + single[1]["grad_norm"]) / 2, rel=1e-6)


def test_a_gradient_that_is_not_finite_stops_the_run_and_spares_the_weights(tiny_recipe, tmp_path, monkeypatch):
    models = []

    def break_second_gradient(accelerator, model, batches, channels_last):
        result = accumulate_gradients(accelerator, model, batches, channels_last)
        models.append(model)
        if len(models) == 2:
            next(model.parameters()).grad[0] = math.nan
        return result

    monkeypatch.setattr(loop, "accumulate_gradients", break_second_gradient)
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        train(tiny_recipe(log_every=50, max_skipped_steps=1))
    assert len(models) == 3  # found at the end of the epoch, before the checkpoint
    assert not (tmp_path / "run" / "last").exists()
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())


def test_time_ends_the_run_and_drives_the_schedule(tiny_recipe, tmp_path, monkeypatch):
    """On a clock that advances a tenth of a second whenever it is read, in a run of two seconds."""
    ticks = itertools.count()
    for module in (loop, run_log):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))
    options = {"epochs": None, "max_minutes": 2 / 60, "schedule_by": "time", "schedule": "cosine", "warmup_steps": 0}
    summary = train(tiny_recipe(**options))
    lines = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert len(lines) >= 3
    for before, row in zip(lines, lines[1:], strict=False):
        assert before["seconds"] < 2
        assert row["learning_rate"] == pytest.approx(1e-3 * math.cos(math.pi * before["seconds"] / 4) ** 2, abs=1e-12)
    assert 2 <= lines[-1]["seconds"] <= summary["training_seconds"] < summary["seconds"]


def test_the_first_bound_ends_the_run(tiny_recipe, tmp_path):
    assert train(tiny_recipe(max_steps=2, epochs=50))["steps"] == 2
    lines = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["learning_rate"] for row in lines] == pytest.approx([1e-6, 5.005e-4])


@pytest.mark.parametrize("options", [{"mixed_precision": "bf16"}, {"channels_last": True}])
def test_other_number_formats_train_alike(tiny_recipe, tmp_path, options):
    train(tiny_recipe(output_dir=str(tmp_path / "plain"), epochs=1, dropout=0.0))
    AcceleratorState._reset_state(reset_partial_state=True)
    train(tiny_recipe(epochs=1, dropout=0.0, ema_decay=0.9, **options))
    plain, other = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("plain", "run"))
    assert other == pytest.approx(plain, rel=0.02)
    assert all(
        tensor.dtype == torch.float32
        for tensor in weights(tmp_path / "run" / "best").values()
        if tensor.is_floating_point()
    )


class RecordingTracker(GeneralTracker):
    """Stands for a tracker whose package is not here."""

    name, requires_logging_directory, made = "wandb", False, []

    def __init__(self, run_name, **_):
        super().__init__()
        self.lines = {}
        self.made.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        """Take none."""

    def log(self, values, step=None, **_):
        self.lines.setdefault(step, {}).update(values)


def test_a_tracker_gets_the_figures_of_the_log(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(RecordingTracker, "made", made := [])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", RecordingTracker)
    monkeypatch.setattr(tracking, "_available_trackers", [*tracking.get_available_trackers(), LoggerType.WANDB])
    train(tiny_recipe(trackers=["wandb"], epochs=1))
    heads = {"step", "epoch", "images", "seconds"}
    for step in (1, 2, 3):
        logged = {}
        for row in rows(tmp_path / "run"):
            if row["step"] == step:
                logged |= {name: value for name, value in row.items() if name not in heads}
        assert made[0].lines[step] == logged and "loss" in logged
    assert "AP" in logged and len(made) == 1


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_trackers_that_are_missing_or_unknown_are_said(tiny_recipe, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    train(tiny_recipe(trackers=["trackio"], max_steps=1))
    assert "tracker 'trackio' is left out: its package is not installed" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="training.trackers has 'wandbb', unknown to accelerate; did you mean 'wandb'"
    ):
        tiny_recipe(trackers=["wandbb"])


def test_a_compiled_model_trains_alike_and_resumes(tiny_recipe, tmp_path, monkeypatch):
    """Through dynamo, with a backend that runs what it traced: the compilers of others are not ours to test."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda f, _compile=torch.compile, **k: compiled.append(k) or _compile(f, **k)
    )
    options = {"epochs": 1, "dropout": 0.0, "accumulation_steps": 1, "num_train_images": 4, "ema_decay": 0.5}
    train(tiny_recipe(output_dir=str(tmp_path / "plain"), **options))
    assert not compiled
    train(tiny_recipe(compile=True, **options | {"max_steps": 1}))
    train(tiny_recipe(compile=True, resume=True, **options | {"max_steps": 2}))
    assert compiled == [{"backend": "eager"}] * 2
    plain, found = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("plain", "run"))
    assert found == pytest.approx(plain, rel=1e-5) and len(plain) == 2


def test_validation_classes_must_be_those_of_training(tiny_recipe, tmp_path):
    for split in ("train", "val"):
        save_coco(generate_shapes(2, 0, (64, 64)), tmp_path / "shapes", split)
    file = tmp_path / "shapes" / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"triangle"', '"star"'))
    with pytest.raises(ValueError, match="star"):
        train(tiny_recipe(source=str(tmp_path / "shapes")))


def test_the_length_of_a_run_is_told_and_that_it_is_too_short_for_its_warm_up(tiny_recipe, capsys):
    """3 steps an epoch; by the clock, which nobody knows beforehand, it is said at the end."""
    training = tiny_recipe(warmup_steps=5, max_minutes=20, log_every=7).training
    expected = "at most 6 steps or 20 minutes, 3 steps an epoch, warm-up of 5 steps; a line every 7 steps and at each "
    expected += "checkpoint"
    assert loop.describe_length(training, 3, 6) == expected
    assert loop.describe_length(training, math.inf, math.inf).startswith("at most 2 epochs or 20 minutes, warm-up")
    by_time = tiny_recipe(warmup_steps=5, max_minutes=20, schedule_by="time", epochs=None).training
    assert "20 minutes, warm-up of 5 steps or 2 minutes, whichever is shorter; a" in loop.describe_length(
        by_time, math.inf, math.inf
    )
    assert "warning" not in loop.describe_length(by_time, 3, 5)
    warning = "warning: the run's 3 steps end within the warm-up, warmup_steps 4: the learning rate never reaches "
    train(tiny_recipe(max_steps=3, warmup_steps=4))
    said = capsys.readouterr().out
    assert said.count(warning) == said.count("warning") == 1 and said.index(warning) < said.index("step 1 ")
    train(
        tiny_recipe(
            max_minutes=1e-9, epochs=None, warmup_steps=9, schedule_by="time", output_dir=f"{training.output_dir}2"
        )
    )
    said = capsys.readouterr().out
    assert said.count("the run's 1 steps end within the warm-up") == 1 and said.index("step 1 ") < said.index(
        "warning"
    )
    train(tiny_recipe(warmup_steps=5, output_dir=f"{training.output_dir}3"))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("warmup_steps", "warns"), [(60, True), (10, False)])
def test_a_run_too_short_for_its_warm_up_by_the_clock_is_told_once_its_pace_is_known(
    tiny_recipe, tmp_path, capsys, monkeypatch, warmup_steps, warns
):
    """On a clock that advances a tenth of a second whenever it is read, in a run of five seconds."""
    ticks = itertools.count()
    for module in (loop, run_log):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))
    options = {"epochs": None, "max_steps": 1000, "max_minutes": 5 / 60, "warmup_steps": warmup_steps}
    summary = train(tiny_recipe(**options))
    assert (summary["steps"] < warmup_steps) == warns
    said = capsys.readouterr().out
    assert said.count("warning") == 2 * warns  # the second one, at the end, has the true number of steps
    if warns:
        found = re.search(r"about (\d+) steps fit into max_minutes 0.083\d*, fewer than warmup_steps 60", said)
        assert abs(int(found[1]) - summary["steps"]) <= 0.3 * summary["steps"]
        assert said.index("warning") < said.index(f"step {summary['steps'] // 2} ")


def test_a_warm_up_by_the_clock_ends_before_the_run_does(tiny_recipe, tmp_path, capsys, monkeypatch):
    """On the same clock; steps alone would be a warm-up without end."""
    ticks = itertools.count()
    for module in (loop, run_log):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))
    options = {"epochs": None, "max_minutes": 5 / 60, "schedule_by": "time", "schedule": "constant", "log_every": 1}
    train(tiny_recipe(**options, warmup_steps=10_000))
    rates = [row["learning_rate"] for row in rows(tmp_path / "run") if "loss" in row]
    assert rates[0] < 1e-3 == rates[-1] and rates == sorted(rates) and rates.count(1e-3) > len(rates) / 2
    assert "warning" not in capsys.readouterr().out


def test_a_new_best_checkpoint_replaces_the_figures_of_the_one_before_without_a_word(
    tiny_recipe, tmp_path, capsys, monkeypatch
):
    """Reports that somebody made of the earlier figures go, and are named."""
    measured = iter([0.1, 0.2, 0.3])

    def better(*arguments):
        metrics, detections = evaluate_model(*arguments)
        metrics["AP"] = next(measured)
        if metrics["AP"] == 0.3:
            (tmp_path / "run" / "breakdown.json").write_text("{}")
        return metrics, detections

    evaluate_model = loop.evaluate_model
    monkeypatch.setattr(loop, "evaluate_model", better)
    assert train(tiny_recipe(epochs=3, evaluate_every=1))["best_step"] == 9
    said = capsys.readouterr().out
    assert said.count("held another evaluation") == 1
    assert "held another evaluation; its reports are removed: breakdown.json\n" in said


@pytest.mark.parametrize("name", ["best", "metrics.json", "detections.json"])
def test_a_best_checkpoint_that_was_deleted_is_replaced_by_the_newest(tiny_recipe, tmp_path, capsys, name):
    """In a finished run, where it is not the best one; the log stays as it was."""
    first = train(tiny_recipe(evaluate_every=1, save_every_steps=1))
    path, lines = tmp_path / "run" / name, rows(tmp_path / "run")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = train(tiny_recipe(evaluate_every=1, save_every_steps=1, resume=True))
    said = capsys.readouterr().out
    assert f"missing of the best checkpoint (step {first['best_step']}): {name}; that of step 6 is evaluated" in said
    assert (again["steps"], again["best_step"]) == (6, 6) and path.exists()
    assert again["AP"] == lines[-1]["AP"] and rows(tmp_path / "run") == lines
    best, last = weights(tmp_path / "run" / "best"), weights(tmp_path / "run" / "last")
    assert all(torch.equal(tensor, last[name]) for name, tensor in best.items())


def test_a_resumed_run_has_the_learning_rate_and_decay_that_it_says(tiny_recipe, tmp_path, monkeypatch):
    options = {"max_steps": 3, "epochs": None, "warmup_steps": 0, "schedule": "constant"}
    train(tiny_recipe(**options))
    decays, step = [], torch.optim.AdamW.step

    def watched(optimizer, *arguments, **settings):
        decays.append({group["weight_decay"] for group in optimizer.param_groups})
        return step(optimizer, *arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(tiny_recipe(**options | {"max_steps": 5, "learning_rate": 0.02, "weight_decay": 0.5, "resume": True}))
    rates = [row["learning_rate"] for row in rows(tmp_path / "run") if "learning_rate" in row]
    assert rates == [1e-3] * 3 + [0.02] * 2 and decays == [{0.5, 0.0}] * 2


def test_a_best_checkpoint_of_a_later_step_stays_until_an_evaluation_is_better(tiny_recipe, tmp_path, capsys):
    """Where the newest checkpoints were taken away: what the run says is what lies in its folder."""
    run = tmp_path / "run"
    options = {"evaluate_every": 1, "save_every_steps": 1, "keep_last": 9, "best_metric": "AP50"}
    first = train(tiny_recipe(**options))
    metrics = json.loads((run / "metrics.json").read_text()) | {"AP50": 0.9}
    (run / "metrics.json").write_text(json.dumps(metrics))
    about = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(about | {"step": 6}))
    for name in ("last", "step-00000005", "step-00000004"):
        shutil.rmtree(run / name)
    best = (run / "best" / "model.safetensors").read_bytes()
    again = train(tiny_recipe(**options, resume=True))
    assert "best/ is of step 6; it stays until an evaluation is better" in capsys.readouterr().out
    assert (again["steps"], again["best_step"], again["AP50"]) == (first["steps"], 6, 0.9)
    assert (run / "best" / "model.safetensors").read_bytes() == best


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("evaluation.json", {"step": None}, "are not those of the best checkpoint"),
        ("evaluation.json", {"weights": "0" * 64}, "are not those of the best checkpoint"),
        ("metrics.json", {"deduplication": {"method": "nms"}}, "are not those of the best checkpoint"),
        ("metrics.json", {"AP": 7}, "damaged of the best checkpoint"),
        ("best/config.json", None, "damaged of the best checkpoint"),
    ],
)
def test_figures_that_are_not_the_best_checkpoints_are_measured_anew(
    tiny_recipe, tmp_path, capsys, file, change, said
):
    train(tiny_recipe())
    path = tmp_path / "run" / file
    content = None if change is None else json.loads(path.read_text()) | change
    path.write_text(json.dumps(content))
    train(tiny_recipe(resume=True))
    printed = capsys.readouterr().out
    assert said in printed and "that of step 6 is evaluated in its place" in printed
    about, metrics = (json.loads((tmp_path / "run" / f"{one}.json").read_text()) for one in ("evaluation", "metrics"))
    assert (about["weights"], about["step"]) == (weights_digest(tmp_path / "run" / "best"), 6)
    assert metrics["deduplication"] is None and (metrics["AP"] or 0) <= 1


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_best_value_on_other_validation_data_is_forgotten(tiny_recipe, tmp_path, capsys, monkeypatch, is_killed):
    """In a finished run; also where the first process that saw the other data was killed before it had evaluated."""
    options = {"evaluate_every": 1, "save_every_steps": 1}
    train(tiny_recipe(**options))
    lines, said = rows(tmp_path / "run"), capsys.readouterr().out
    assert "data changed" not in said
    if is_killed:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop, "evaluate_model", lambda *_: (_ for _ in ()).throw(Killed))
            train(tiny_recipe(**options, resume=True, num_val_images=4))
        AcceleratorState._reset_state(reset_partial_state=True)
    again = train(tiny_recipe(**options, resume=True, num_val_images=4))
    said = capsys.readouterr().out
    assert re.search(r"val data changed: 3 pictures with \d+ objects before, 4 pictures with \d+ objects now", said)
    assert "measured on other validation data; that of step 6 is evaluated in its place" in said
    assert (again["steps"], again["best_step"], again["num_images"]) == (6, 6, 4)
    assert rows(tmp_path / "run")[:-1] == lines and rows(tmp_path / "run")[-1]["AP"] == again["AP"]
    train(tiny_recipe(**options, resume=True, num_val_images=4, epochs=3))
    assert "training.epochs was 2" in (said := capsys.readouterr().out)
    train(tiny_recipe(**options, resume=True, num_val_images=4, epochs=3))
    assert "data changed" not in capsys.readouterr().out


def test_training_data_that_changed_are_said(tiny_recipe, tmp_path, capsys):
    train(tiny_recipe(max_steps=2))
    summary = train(tiny_recipe(max_steps=3, resume=True, num_train_images=12))
    said = capsys.readouterr().out
    assert re.search(r"train data changed: 10 pictures with \d+ objects before, 12 pictures with \d+ objects", said)
    assert "step 3 of the epoch in progress has other pictures than it would have had" in said
    assert "val data changed" not in said and summary["steps"] == 3


def test_a_damaged_manifest_is_put_aside(tiny_recipe, tmp_path, capsys):
    train(tiny_recipe(max_steps=1))
    for content in ("[{", "{}", '["a"]', '[{"step": "one"}]', '[{"step": 0, "data": {"val": 3}}]'):
        (tmp_path / "run" / "manifest.json").write_text(content)
        train(tiny_recipe(max_steps=1, resume=True))
        assert "manifest.json is damaged" in capsys.readouterr().out
        assert (tmp_path / "run" / "manifest.json.damaged").read_text() == content
        assert len(json.loads((tmp_path / "run" / "manifest.json").read_text())) == 1


def test_a_run_that_lost_its_recipe_is_not_resumed_with_another_model(tiny_recipe, tmp_path):
    """Nor with other classes, which no recipe names; a class may get another name."""
    shapes = generate_shapes(4, 0, (64, 64))
    for split in ("train", "val"):
        save_coco(shapes, tmp_path / "shapes", split)
    options = {"source": str(tmp_path / "shapes"), "max_steps": 1}
    train(tiny_recipe(**options))
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="holds a run of another model: num_queries was 16 and is 9; name another"):
        train(tiny_recipe(**options, resume=True, num_queries=9, proposal_grid=[3, 3]))
    annotations = [tmp_path / "shapes" / "annotations" / f"instances_{split}.json" for split in ("train", "val")]
    for file in annotations:
        file.write_text(file.read_text().replace('"triangle"', '"wedge"'))
    assert train(tiny_recipe(**options, resume=True))["steps"] == 1
    for file in annotations:
        content = json.loads(file.read_text())
        content["categories"].append({"id": 99, "name": "star"})
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"another model: category_ids was \[2, 3, 7\] and is \[2, 3, 7, 99\]"):
        train(tiny_recipe(**options, resume=True))


def test_a_batch_size_that_was_found_is_asked_for_where_the_recipe_is_lost(tiny_recipe, tmp_path):
    train(tiny_recipe(max_steps=1))
    (tmp_path / "run" / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="lost its recipe.yaml.* give that as batch_size and accumulation_steps"):
        train(tiny_recipe(max_steps=2, find_batch_size=True, resume=True))
