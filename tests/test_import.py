"""What `import drmm_hf` costs and what it leaves alone, measured in processes of its own."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[1] / "src"
PROGRAM = """
import sys, time, json
sys.path.insert(0, sys.argv[1])
from transformers import AutoModelForObjectDetection, PreTrainedModel
before, start = set(sys.modules), time.process_time()
import drmm_hf
seconds = time.process_time() - start
brought = sorted({name.split(".")[0] for name in sys.modules} - {name.split(".")[0] for name in before})
names = [name for name in drmm_hf.__all__ if hasattr(drmm_hf, name)]
print(json.dumps({"seconds": seconds, "brought": brought, "names": names}))
"""


@pytest.fixture(scope="module")
def measured():
    """Return the results of three fresh processes."""
    command = [sys.executable, "-c", PROGRAM, str(SOURCE)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    return [json.loads(run.stdout.splitlines()[-1]) for run in runs]


def test_brings_no_optional_package_beyond_those_of_transformers(measured):
    optional = {"matplotlib", "tensorboard", "supervision", "timm", "scipy", "datasets", "accelerate", "pycocotools"}
    assert "drmm_hf" in measured[0]["brought"]
    assert not optional & set(measured[0]["brought"])


def test_costs_little_more_than_transformers(measured):
    """The promise is 0.3 s; the bound is generous because a busy machine measures worse."""
    assert statistics.median(run["seconds"] for run in measured) < 1.5


def test_public_names(measured):
    assert {"DrmmConfig", "DrmmForObjectDetection", "DrmmImageProcessor", "DrmmModel"} <= set(measured[0]["names"])
