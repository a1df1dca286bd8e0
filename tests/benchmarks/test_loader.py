import math

import pytest
import torch

from drmm_hf.benchmarks import loader
from drmm_hf.benchmarks.loader import benchmark_loader
from drmm_hf.benchmarks.measuring import Seconds
from drmm_hf.data.coco import categories
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.labels import LabelMap


@pytest.fixture(scope="module")
def shapes():
    return generate_shapes(7, seed=0, image_size=(48, 64))


@pytest.fixture(scope="module")
def label_map(shapes):
    return LabelMap.from_categories(categories(shapes))


@pytest.fixture
def batches(monkeypatch):
    """Collect what each contestant read, in the order of their turns."""
    turns = []

    def timed(work, device):
        work()
        return Seconds(wall=2.0 ** len(turns), processor=10.0 ** len(turns))

    monkeypatch.setattr(loader, "timed", timed)
    monkeypatch.setattr(loader, "_read", lambda build: turns.append(list(build())))
    return turns


def test_both_loaders_do_the_same_work_in_turns(shapes, label_map, batches):
    size = {"shortest_edge": 64, "longest_edge": 96}
    figures = benchmark_loader(shapes, label_map, batch_size=3, num_pictures=5, repetitions=2, **size)
    assert len(batches) == 9
    for ours, theirs, pictures in zip(*(batches[start::3] for start in range(3)), strict=True):
        assert [len(batch["labels"]) for batch in ours] == [len(batch["labels"]) for batch in theirs] == [3, 2]
        assert len(pictures) == 5
        for mine, other in zip(ours, theirs, strict=True):
            height, width = other["pixel_values"].shape[-2:]
            assert mine["pixel_mask"].sum() == other["pixel_mask"].sum() == len(mine["labels"]) * 64 * 85
            # The sizes are a multiple of 32 here, and at most a byte of 0.224 lies between two resizings.
            difference = mine["pixel_values"][..., :height, :width] - other["pixel_values"]
            assert difference.abs().max() <= 1.01 / 255 / 0.224
            for one, two in zip(mine["labels"], other["labels"], strict=True):
                assert torch.equal(one["class_labels"], two["class_labels"])
                assert torch.equal(one["image_id"], two["image_id"])
    # Turns 1 to 3 do not count; one of a contestant takes 1000 times as long as the one before.
    core = figures["loaders"]["drmm_hf"]["pictures_per_core_second"]
    assert core == pytest.approx({"min": 5 / 10**7, "max": 5 / 10**4, "median": (5 / 10**7 + 5 / 10**4) / 2})
    assert figures["loaders"]["transformers"]["pictures_per_second"]["max"] == 5 / 2**5
    assert figures["ratio"] == pytest.approx({"min": 10, "median": 10, "max": 10})


def test_the_workers_of_a_loader_end_with_its_reading():
    """Their processor time is known only then."""
    calls = []

    def build():
        try:
            calls.append("build")
            yield from (1, 2)
        finally:
            calls.append("close")

    loader._read(build)
    assert calls == ["build", "close"]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_figures(shapes, label_map, num_workers):
    threads = torch.get_num_threads()
    figures = benchmark_loader(
        shapes, label_map, num_workers=num_workers, repetitions=1, shortest_edge=64, longest_edge=96
    )
    assert torch.get_num_threads() == threads
    assert figures["num_pictures"] == 7
    for summary in (figures["ratio"], *(s for rates in figures["loaders"].values() for s in rates.values())):
        assert 0 < summary["min"] <= summary["median"] <= summary["max"] < math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, must be at least 1"),
        ({"num_workers": -1}, "num_workers is -1, must be at least 0"),
        ({"num_pictures": 0}, "num_pictures is 0"),
        ({"repetitions": 0}, "repetitions is 0"),
    ],
)
def test_numbers_out_of_range(shapes, label_map, arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark_loader(shapes, label_map, **arguments)


def test_no_pictures(shapes, label_map):
    with pytest.raises(ValueError, match="dataset is empty"):
        benchmark_loader(shapes.select([]), label_map)
