import csv
import json
import math

import pytest
import torch
from accelerate import Accelerator

from drmm_hf.training.arguments import TrainingArguments
from drmm_hf.training.checkpoint import Progress
from drmm_hf.training.run_log import Clock, Log


def rows(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def batches_of(num_objects, image_ids):
    """Labels of batches with the given objects and ids a picture."""
    return [
        {
            "labels": [
                {
                    "boxes": torch.zeros(count, 4),
                    "class_labels": torch.zeros(count, dtype=torch.int64),
                    "size": torch.tensor([3, 4]),
                    "image_id": torch.tensor([image_id]),
                }
                for count, image_id in zip(counts, ids, strict=True)
            ]
        }
        for counts, ids in zip(num_objects, image_ids, strict=True)
    ]


def optimizer():
    return torch.optim.AdamW([{"name": "head", "params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.5}])


def log_of(tmp_path, terms, num_objects, image_ids):
    """Log one optimiser step of batches with the given loss terms, objects and ids a picture."""
    progress = Progress()
    log = Log(Accelerator(cpu=True), tmp_path, progress, 10)
    progress.step = 1
    log.add(batches_of(num_objects, image_ids), terms, torch.tensor(2.0))
    log.write_training(optimizer())
    return rows(tmp_path)[-1]


def test_the_last_stage_is_the_one_shown(tmp_path, capsys):
    terms = [{"loss": torch.tensor(1.0), **{f"giou.stage{s}": torch.tensor(float(s)) for s in range(11)}}]
    log_of(tmp_path, terms, [[1]], [[1]])
    shown = capsys.readouterr().out
    assert shown.startswith("[0.0 min, about ") and shown.endswith("  last stage: giou 10\n")
    assert "giou.stage" not in shown


def test_terms_are_logged_per_ground_truth(tmp_path):
    """Terms come as sums over ground truths divided by pictures: here 3 + 1 objects on 2 pictures, then 2 on 1."""
    terms = [
        {"loss": torch.tensor(10.0), "nll.stage0": torch.tensor(8.0), "mcm.stage0": torch.tensor(1.0)},
        {"loss": torch.tensor(4.0), "nll.stage0": torch.tensor(2.0), "mcm.stage0": torch.tensor(4.0)},
    ]
    row = log_of(tmp_path, terms, [[3, 1], [2]], [[1, 2], [3]])
    assert row["loss"] == pytest.approx((10 * 2 + 4) / 3)
    assert row["nll.stage0"] == pytest.approx((8 * 2 + 2) / 6)
    assert row["mcm.stage0"] == pytest.approx((1 * 2 + 4) / 6)
    assert row["leading_share.stage0"] == pytest.approx(math.exp(-1))
    assert (row["grad_norm"], row["learning_rate"]) == (2.0, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_left_out_and_written_down(tmp_path, capsys, value):
    log = Log(Accelerator(cpu=True), tmp_path, Progress(), 10)
    steps = [([1.0, 1.0], 2.0), ([1.0, value], math.nan), ([4.0, 5.0], math.inf), ([5.0, 7.0], 4.0)]
    for losses, norm in steps:
        log.progress.step += 1
        terms = [{"loss": torch.tensor(loss), "nll.stage0": torch.tensor(loss / 2)} for loss in losses]
        log.add(batches_of([[1], [3, 1]], [[5], [41, 7]]), terms, torch.tensor(norm))
    log.write_training(optimizer())
    line = rows(tmp_path)[-1]
    assert line["loss"] == pytest.approx((1 + 2 * 1 + 5 + 2 * 7) / 6)
    assert line["nll.stage0"] == pytest.approx((0.5 + 2 * 0.5 + 2.5 + 2 * 3.5) / 10)
    assert (line["grad_norm"], line["skipped_steps"]) == (3.0, 2.0)
    assert (log.progress.skipped_steps, log.progress.skipped_in_a_row) == (2, 0)
    files = sorted((tmp_path / "skipped_steps").iterdir())
    assert [file.name for file in files] == [f"step-0000000{step}-process-0.json" for step in (2, 3)]
    step = json.loads(files[0].read_text())
    assert [image["image_id"] for image in step["images"]] == [5, 41, 7]
    assert [len(image["boxes"]) for image in step["images"]] == [1, 3, 1]
    assert step["terms"][1]["loss"] == step["terms"][1]["nll.stage0"] == str(value)
    said = capsys.readouterr().out
    assert said.count("image_id [5, 41, 7]") == 2 and str(files[0]) in said


def test_so_many_in_a_row_stop_the_run(tmp_path):
    """Across log lines: two at the end of one, the third at the start of the next."""
    log = Log(Accelerator(cpu=True), tmp_path, Progress(), 10)
    for losses in ([1.0, math.nan, math.nan], [math.nan, 1.0]):
        for loss in losses:
            log.progress.step += 1
            log.add(batches_of([[1]], [[log.progress.step]]), [{"loss": torch.tensor(loss)}], torch.tensor(loss))
        if len(losses) == 3:
            log.write_training(optimizer())
    with pytest.raises(FloatingPointError, match=r"step 4: .*image_id \[4\].*number 3 in a row"):
        log.write_training(optimizer())


def test_a_line_of_steps_that_were_all_skipped_is_not_written(tmp_path):
    log = Log(Accelerator(cpu=True), tmp_path, Progress(step=1), 10)
    log.add(batches_of([[1]], [[3]]), [{"loss": torch.tensor(math.nan)}], torch.tensor(1.0))
    log.write_training(optimizer())
    assert rows(tmp_path) == [] and log.progress.skipped_steps == 1


def test_results_are_a_table_with_a_line_an_evaluation(tmp_path):
    log = Log(Accelerator(cpu=True), tmp_path, Progress(), 10)
    for step, ap in ((1, 0.25), (2, 0.5)):
        log.progress.step = step
        log.add(batches_of([[1]], [[3]]), [{"loss": torch.tensor(8.0 / step)}], torch.tensor(1.0))
        log.write_training(optimizer())
        log.write_evaluation({"AP": ap, "ECE": 0.1, "per_class": {}})
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["step"], row["loss"], row["AP"]) for row in table] == [("1", "8.0", "0.25"), ("2", "4.0", "0.5")]
    assert log.evaluation_at(2)["AP"] == 0.5
    assert log.evaluation_at(3) is None


def test_printed_lines_tell_the_minutes_left_and_per_cent(tmp_path, capsys):
    """At the pace since this part of the run began, or by the clock where that comes first."""
    for max_minutes, left in ((None, "6.0"), (5, "2.0")):
        log = Log(Accelerator(cpu=True), tmp_path, Progress(step=10, seconds=60), 50, max_minutes=max_minutes)
        log.progress.step, log.progress.seconds = 20, 180.0
        log.write_evaluation({"AP": 0.5512, "AP50": None, "ECE": 0.01})
        said = capsys.readouterr().out
        assert said == f"[3.0 min, about {left} left] epoch 0 step 20  validation in per cent: AP 55.12  ECE 1.00\n"
    assert rows(tmp_path)[-1]["AP"] == 0.5512


@pytest.mark.parametrize(("minutes", "seconds"), [(10, 30), (20, 60), (600, 60)])
def test_the_pace_is_known_after_a_twentieth_of_the_time_and_a_minute_at_most(minutes, seconds):
    progress = Progress()
    clock = Clock(Accelerator(cpu=True), progress, TrainingArguments(max_steps=9, max_minutes=minutes))
    progress.step, progress.seconds = 3, seconds - 1
    assert clock.expected_steps() == math.inf
    progress.seconds = seconds
    assert clock.expected_steps() == pytest.approx(minutes * 60 / seconds * 3)
    progress.step = 2
    assert clock.expected_steps() == math.inf


def test_a_first_line_comes_after_ten_seconds(tmp_path, capsys):
    log = Log(Accelerator(cpu=True), tmp_path, Progress(), 100)
    for log.progress.step, log.progress.seconds in ((1, 6.0), (2, 12.0), (3, 18.0)):
        log.add(batches_of([[1]], [[3]]), [{"loss": torch.tensor(1.0)}], torch.tensor(1.0))
    assert capsys.readouterr().out == "[0.2 min, about 9.8 left] epoch 0 step 2\n"
    assert rows(tmp_path) == []


@pytest.mark.parametrize("line", ["[1,2]", "5", "{", '{"loss": 1}', '{"step": "1"}', "\\xff"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line.encode().replace(b"\\xff", b"\xff") + b"\n")
    with pytest.raises(ValueError, match=r"log.jsonl, line 2, is no line of a log.* move the file away to go on"):
        Log(Accelerator(cpu=True), tmp_path, Progress(step=3), 10)


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    Log(Accelerator(cpu=True), tmp_path, Progress(step=3), 10)
    assert rows(tmp_path) == [{"step": 1}]
