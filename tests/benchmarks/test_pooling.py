"""Both poolings see the same boxes and give the same regions."""

import pytest

from drmm_hf.benchmarks.pooling import benchmark_pooling
from drmm_hf.benchmarks.tables import pooling_table


def test_both_pool_the_same_and_the_table_shows_it():
    figures = benchmark_pooling(height=96, width=130, batch_size=2, num_boxes=30, channels=5, repetitions=2)
    assert figures["difference"] < 1e-4
    assert figures["size"] == [96, 130] and figures["num_boxes"] == 30
    for part in ("forward", "backward"):
        assert min(figures[name][part]["min"] for name in ("drmm", "torchvision")) > 0
        low, high = figures["ratio"][part]["min"], figures["ratio"][part]["max"]
        assert low <= figures["ratio"][part]["median"] <= high
    lines = pooling_table(figures).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["forward", "backward", "MiB"]


@pytest.mark.parametrize("name", ["num_boxes", "channels", "repetitions"])
def test_wrong_numbers_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is 0, must be at least 1"):
        benchmark_pooling(**{name: 0})
