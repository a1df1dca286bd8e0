import json
import os
import shlex

import pytest

from drmm_cli import main
from drmm_hf import DrmmConfig
from drmm_hf.evaluation.origin import input_settings, weights_digest
from drmm_hf.hub.results import find_evaluations, find_training
from trained_run import HOME, HOST, make_evaluation, make_run


@pytest.fixture
def best(tmp_path):
    return make_run(tmp_path / "cells")


def find(best, **options):
    return find_evaluations(best, DrmmConfig.from_pretrained(best), **options)


def test_evaluations_beside_the_model_and_the_run_s_own(best):
    run = best.parent
    make_evaluation(run, best, split=None)
    expected = make_evaluation(run / "test", best)
    (test, own), left_out = find(best)
    assert (test.data, test.split, test.chose, test.place) == ("cells", "test", False, "results/cells_test")
    assert (own.data, own.split, own.chose) == ("cells", "val", True)
    assert test.metrics == json.loads(json.dumps(expected)) and not left_out
    # Own figures are those of the best checkpoint, not of the last.
    os.rename(best, run / "last")
    found, left_out = find(run / "last")
    assert not found and [*left_out] == [run / "test"]  # it is of "best"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "runs/other/best"}, "of the model 'runs/other/best'"),
        ({"model": None}, "of which model"),
        ({"top_k": 300}, "with top_k 300"),
        ({"dtype": "bfloat16"}, "with dtype bfloat16"),
        ({"top_k_ratio": 0.9}, "with top_k_ratio 0.9"),
        ({"deduplication": {"method": "nms", "iou_threshold": 0.5}}, "with NMS"),
        ({"calibration": {"scale_factor": 2.0}}, "another calibration"),
        ({"input": {"size": {"shortest_edge": 99}}}, "size {'shortest_edge': 99} instead of {"),
        ({"AP_per_class": {"cat": 0.5}}, "classes"),
    ],
)
def test_figures_of_something_else_are_left_out_and_refused_when_named(best, changes, reason):
    place = best.parent / "test"
    make_evaluation(place, best, **changes)
    found, left_out = find(best)
    assert not found and reason in left_out[place.resolve()]
    with pytest.raises(ValueError, match=reason):
        find(best, given=[place])


def test_a_model_that_moved_is_known_by_its_last_names(best):
    make_evaluation(best.parent / "test", f"{HOME}/runs/cells/best")
    make_evaluation(best.parent / "val", "best", split="val")
    assert len(find(best)[0]) == 2


def test_figures_older_than_the_weights_have_to_be_named(best):
    place = best.parent / "test"
    make_evaluation(place, best)
    os.utime(place / "metrics.json", (1, 1))
    found, left_out = find(best)
    assert not found and "older than the weights" in left_out[place.resolve()]
    assert len(find(best, given=[place])[0]) == 1


def test_figures_of_other_weights_are_never_published(best):
    place = best.parent / "test"
    make_evaluation(place, best)
    about = json.loads((place / "evaluation.json").read_text())
    (place / "evaluation.json").write_text(json.dumps(about | {"weights": weights_digest(best)}))
    os.utime(place / "metrics.json", (1, 1))  # copied folders have other times
    assert len(find(best)[0]) == 1
    (place / "evaluation.json").write_text(json.dumps(about | {"weights": "0" * 64}))
    found, left_out = find(best)
    assert not found and "of other weights" in left_out[place.resolve()]
    with pytest.raises(ValueError, match="of other weights"):
        find(best, given=[place])


def test_what_brings_dropped_figures_back_is_said(best, monkeypatch):
    monkeypatch.chdir(best.parent.parent)
    make_evaluation(best.parent / "test", best, calibration={"scale_factor": 2.0}, data="my cells")
    for name in ("coverage", "thresholds"):
        (best.parent / "test" / f"{name}.json").write_text('{"not_measured": "nothing"}')
    make_evaluation(best.parent, best, split=None)
    found, left_out = find(best, calibration={"scale_factor": 3.0})
    test, own = (reason.partition("; measure again: ")[2] for reason in left_out.values())
    assert not found and own == f"drmm evaluate cells/best {HOME}/data/cells --split val --output cells/val"
    assert test == ("drmm evaluate cells/best 'my cells' --split test --output cells/test --coverage --thresholds")
    assert main(["evaluate", *shlex.split(test)[2:], "--freedom", "0"]) == 2  # understood: it is for --detections


def test_calibration_and_thresholds_are_no_input(best):
    """What `drmm calibrate` changes makes the figures of another calibration, not of another input."""
    make_evaluation(best.parent / "test", best, input=input_settings(best))
    settings = json.loads((best / "preprocessor_config.json").read_text())
    assert input_settings(best)["size"] == settings["size"]
    (best / "preprocessor_config.json").write_text(json.dumps(settings | {"score_threshold": 0.2}))
    assert len(find(best)[0]) == 1
    (best / "preprocessor_config.json").write_text(json.dumps(settings | {"size_divisor": 64}))
    assert "size_divisor 32 instead of 64" in find(best)[1][(best.parent / "test").resolve()]


def test_the_pictures_that_chose_the_checkpoint_are_known_when_they_are_measured_again(best):
    make_evaluation(best.parent, best, split="val", step=7)
    make_evaluation(best.parent / "again", best, split="val")
    make_evaluation(best.parent / "test", best, ground_truth="0" * 64)
    test, again = find(best)[0]
    assert (test.split, test.chose) == ("test", False)
    assert (again.folder.name, again.chose) == ("again", True)


def test_of_one_split_the_newest_figures_stand(best):
    first, second = best.parent / "a", best.parent / "b"
    for time, place in ((2_000_000_000, second), (2_100_000_000, first)):
        make_evaluation(place, best)
        os.utime(place / "metrics.json", (time, time))
    (one,), left_out = find(best)
    assert one.folder.name == "a" and "newer" in left_out[second.resolve()]


@pytest.mark.parametrize("spoilt", [{"AP": 61.0}, {"AP50": "0.6"}, {"ECE": float("nan")}, {"num_images": None}])
def test_spoilt_figures_are_refused(best, spoilt):
    make_evaluation(best.parent / "test", best, **spoilt)
    with pytest.raises(ValueError, match=f"{next(iter(spoilt))} missing or out of range"):
        find(best)


def test_overfit_runs_have_no_figures_of_their_own(best):
    make_evaluation(best.parent, best, split=None)
    recipe = best.parent / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("overfit: null", "overfit: 8"))
    found, left_out = find(best)
    assert not found and "overfit" in left_out[best.parent.resolve()]


def test_records_of_training_have_names_and_no_places(best):
    record = find_training(best)
    text = json.dumps([record.recipe, record.manifest, record.summary])
    assert "jane" not in text and HOST not in text and str(best.parent.parent) not in text
    assert record.recipe["data"]["source"] == "cells"
    assert record.manifest[0]["command"] == "drmm train r.yaml --data cells --tracker=t"
    assert record.manifest[0]["data"]["train"]["num_images"] == 205 and "working_directory" not in record.manifest[0]
    assert find_training(best.parent) is None
