"""A folder of an evaluation is of one evaluation at every moment, also when the run that writes it is killed."""

import os

import pytest

from drmm_hf.evaluation import output_folder
from drmm_hf.evaluation.files import read_json, write_json
from drmm_hf.evaluation.output_folder import write_figures


class Killed(BaseException):
    """End a call where a kill would, with nothing after it."""


@pytest.mark.parametrize("first", [True, False])
def test_where_there_are_figures_the_rest_is_of_them(first, tmp_path, monkeypatch):
    """Killed after any number of files: metrics.json is never beside what it is not of."""
    replace = os.replace
    for survived in range(3):
        folder = tmp_path / str(survived)
        if not first:
            write_figures({"AP": 0.1}, [{"score": 0.1}], folder, {"model": "before"})
            write_json({"of": "before"}, folder / "breakdown.json")
        moved = []

        def stop(source, target, moved=moved, survived=survived, folder=folder):
            if target.parent == folder:
                if len(moved) == survived:
                    raise Killed
                moved.append(target.name)
            replace(source, target)

        monkeypatch.setattr(output_folder.os, "replace", stop)
        with pytest.raises(Killed):
            write_figures({"AP": 0.2}, [{"score": 0.2}], folder, {"model": "now"})
        monkeypatch.setattr(output_folder.os, "replace", replace)
        assert not (folder / "metrics.json").exists() and not (folder / "breakdown.json").exists()
        write_figures({"AP": 0.2}, [{"score": 0.2}], folder, {"model": "now"})
        files = {path.name: read_json(path) for path in folder.iterdir()}
        assert files == {
            "metrics.json": {"AP": 0.2},
            "detections.json": [{"score": 0.2}],
            "evaluation.json": {"model": "now"},
        }


def test_reports_on_the_same_figures_stay(tmp_path):
    for model in ("first", "second"):
        write_figures({"AP": 0.1}, [{"score": 0.1}], tmp_path, {"model": model})
        write_json({}, tmp_path / "breakdown.json")
    write_figures({"AP": 0.1}, [{"score": 0.1}], tmp_path)
    assert (tmp_path / "breakdown.json").exists()
    assert read_json(tmp_path / "evaluation.json") == {"model": "second"}
