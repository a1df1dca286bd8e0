"""The study's claims are judged by their rule, from files as runs leave them."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import study  # noqa: E402


BINS = {"ece": 0.0, "bin_edges": [0, 1], "bin_confidence": [0.5], "bin_accuracy": [0.5], "bin_count": [2]}
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "ECE", "ECE_0.1")


def write_run(run, ap, nms, shares):
    run.mkdir(parents=True)
    figures = dict.fromkeys(NAMES, ap) | {"reliability": BINS}
    counts = {"num_images": 2, "num_ground_truths": 3, "num_crowds": 0, "AP_per_class": {}}
    swept = [figures | {"AP": value, "iou_threshold": iou} for iou, value in ((0.5, 0.0), (0.7, nms))]
    files = {
        "metrics": figures | counts,
        "duplicates": {"none": figures, "nms": swept, "wta": swept, "best_iou_threshold": 0.7},
        "likelihood": {"all": {"nll": [1.0, 2.0], "share": shares}},
        "summary": {"steps": 100, "training_seconds": 120.0},
    }
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 3.0, 4.0], "holds"),
        ([-2.0, -3.0, -4.0], "does not hold"),
        ([-1.0, 3.0, 4.0], "cannot be told: within twice the standard error"),
        ([5.0], "cannot be told: 1 seed"),
        ([], "cannot be told: 0 seeds"),
    ],
)
def test_the_verdict_is_twice_the_standard_error(values, expected):
    assert study.verdict(values) == expected


def test_from_runs_to_the_lines_of_a_page(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs" / study.MCM / f"seed{seed}", 0.5 + seed / 100, 0.5 + seed / 100, [0.8, 0.9])
        write_run(tmp_path / "runs" / study.NLL / f"seed{seed}", 0.3, 0.4, [0.8, 0.6])
    write_run(tmp_path / "runs" / study.BOX / "seed0", 0.9, 0.9, [0.8, 0.6])
    for name in ("duplicates", "likelihood"):  # not measured
        (tmp_path / "runs" / study.NLL / "seed0" / f"{name}.json").unlink()
    runs = study.collect(tmp_path / "runs")
    assert runs[study.NLL]["seed1"] == {
        **{"AP": 0.3, "AP50": 0.3, "AP75": 0.3, "AR": 0.3, "ECE": 0.3, "ECE_0.1": 0.3, "NMS": 0.4, "WTA": 0.4},
        **{"nll": [1.0, 2.0], "shares": [0.8, 0.6], "steps": 100, "minutes": 2.0},
    }
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- study cells -->\nstale figures\n<!-- end of study cells -->\n\nafter\n")
    study.rewrite(page, "cells", study.report(runs))
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "stale" not in text
    assert "| MCM raises AP | 47.0 - 35.6 = 11.4 | +20.50 ± 0.50 | holds |" in text
    assert "| and more than it does with MCM | 7.1 - 0 (Fig. 7) | +10.00 | cannot be told: 1 seed |" in text
    assert "| cannot be told: 1 seed |" in text and "| cannot be told: 0 seeds |" in text
    assert f"| {study.MCM} | 2 | 50.50 ± 0.50 |" in text and "0.800 0.900 | 100 | 2 |" in text
    with pytest.raises(ValueError, match="has no lines"):
        study.rewrite(page, "bccd", [])


def test_figures_of_runs_that_are_gone_stay_in_the_file(tmp_path):
    write_run(tmp_path / "first" / study.MCM / "seed0", 0.5, 0.5, [0.8, 0.9])
    write_run(tmp_path / "second" / study.MCM / "seed1", 0.6, 0.6, [0.8, 0.9])
    write_run(tmp_path / "third" / study.MCM / "seed0", 0.7, 0.7, [0.8, 0.9])
    file = tmp_path / "study" / "cells.json"
    for folder in ("first", "second", "third"):
        runs = study.add(tmp_path / folder, file)
    assert {seed: figures["AP"] for seed, figures in runs[study.MCM].items()} == {"seed0": 0.7, "seed1": 0.6}
    assert json.loads(file.read_text()) == runs
