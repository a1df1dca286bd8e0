import json
import os

import pytest

from drmm_hf import DrmmConfig
from drmm_hf.evaluation.origin import weights_digest
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
