"""Initial query boxes against the recorded ones."""

import pytest

from drmm_hf.modeling.queries import initial_query_boxes
from parity.conftest import Case, cases, error


@pytest.mark.parametrize("path", cases("proposal_init*.safetensors"))
def test_initial_boxes_equal_the_recorded_ones(path):
    case = Case(path)
    assert case.info["cases"]
    for name, options in case.info["cases"].items():
        recorded = [value for key, value in case.tensors.items() if key.startswith(name)]
        grid = options["preset_arange"] if options["init"] == "preset" else None
        boxes = initial_query_boxes(options["num"], grid, options.get("preset_size", 0.5))
        assert len(recorded) == 1 and error(boxes, recorded[0]) < 1e-6
