"""The benchmark of the evaluation measures what it says."""

import json

import pytest

from drmm_cli import main
from drmm_hf.benchmarks.evaluation import benchmark_evaluation, made_up_detections


def test_every_step_is_timed_and_printed(tmp_path, capsys):
    path = tmp_path / "eval.json"
    assert main(["benchmark", "eval", "--num-pictures", "3", "--output", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["num_images"] == 3 and figures["num_detections"] == 300
    names = ["save", "load", "AP", "thresholds", "confusion", "calibration", "breakdown and errors", "sweep"]
    assert list(figures["steps"]) == names
    assert all(step["core_seconds"] >= 0 and step["seconds"] > 0 for step in figures["steps"].values())
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in names)


def test_detections_are_repeatable_and_have_something_to_match():
    (truth, found), (again, same) = (made_up_detections(20, 5, seed=1) for _ in range(2))
    assert truth == again and all((found[one]["boxes"] == same[one]["boxes"]).all() for one in found)
    assert 80 < len(truth["annotations"]) < 220 and len(found) == 20 and found.num_boxes == 2000
    with pytest.raises(ValueError, match="num_images is 0"):
        benchmark_evaluation(0)
