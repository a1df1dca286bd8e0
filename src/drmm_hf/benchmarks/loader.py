"""Throughput of the loader beside that of transformers' DETR processor, in one run.

The machine is shared and its clock moves, so contestants take turns, each repetition gives one ratio, and what counts
is the processor time of all processes: pictures per second of one core, whoever else is running.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import DetrImageProcessor

from ..data.labels import LabelMap
from ..data.loading import DetectionDataset, data_loader, read_image
from ..modeling.image_processing_drmm import DrmmImageProcessor


def benchmark_loader(
    dataset: datasets.Dataset,
    label_map: LabelMap,
    *,
    batch_size: int = 4,
    num_workers: int = 0,
    num_pictures: int = 64,
    repetitions: int = 5,
    shortest_edge: int = 800,
    longest_edge: int = 1333,
) -> dict[str, Any]:
    """Measure pictures a second: decode, resize, normalise, pad, collate and make labels, without augmentation.

    Args:
        dataset (`datasets.Dataset`): Canonical rows.
        label_map (`LabelMap`): From their category ids to class labels.
        batch_size (`int`): Pictures in a batch.
        num_workers (`int`): Processes of each loader; 0 reads in this one.
        num_pictures (`int`): How many pictures a repetition reads, spread over the data set.
        repetitions (`int`): Turns of each contestant, after one that does not count.
        shortest_edge (`int`): Shorter side of the resized picture, pixels.
        longest_edge (`int`): Upper bound of its longer side, pixels.

    Returns:
        `dict`: The settings; `loaders`: for `drmm_hf`, `transformers` and `decoding` (the floor: our decoder alone, in
        this process) `pictures_per_second` of wall clock and `pictures_per_core_second`; `ratio`: of the latter,
        `drmm_hf` over `transformers`. Each a dict of `median`, `min` and `max` over repetitions.

    Raises:
        ValueError: If a number is out of range or there are no pictures.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
        ("num_pictures", num_pictures, 1),
        ("repetitions", repetitions, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    if not len(dataset):
        raise ValueError("dataset is empty: a benchmark needs pictures")
    count = min(num_pictures, len(dataset))
    dataset = dataset.select([index * len(dataset) // count for index in range(count)])
    size = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
    ours = DetectionDataset(dataset, label_map)
    contestants = {
        "drmm_hf": lambda: data_loader(
            ours, DrmmImageProcessor(size=size), batch_size, shuffle=False, num_workers=num_workers
        ),
        "transformers": lambda: _transformers_loader(
            dataset, label_map, DetrImageProcessor(size=size), batch_size, num_workers
        ),
        "decoding": lambda: map(read_image, ours.dataset),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {name: [] for name in contestants}
        for _ in range(repetitions + 1):
            for name, build in contestants.items():
                seconds[name].append(_seconds(build))
    finally:
        torch.set_num_threads(threads)
    wall, core = (
        {name: [measured[clock] for measured in turns[1:]] for name, turns in seconds.items()} for clock in (0, 1)
    )
    ratios = [theirs / mine for theirs, mine in zip(core["transformers"], core["drmm_hf"], strict=True)]
    return {
        "num_pictures": count,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "repetitions": repetitions,
        "size": size,
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "datasets", "pillow")},
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "loaders": {
            name: {
                "pictures_per_second": _summary([count / value for value in wall[name]]),
                "pictures_per_core_second": _summary([count / value for value in core[name]]),
            }
            for name in contestants
        },
        "ratio": _summary(ratios),
    }


def _transformers_loader(
    dataset: datasets.Dataset,
    label_map: LabelMap,
    processor: DetrImageProcessor,
    batch_size: int,
    num_workers: int,
) -> DataLoader:
    """Return a loader as transformers' examples build it: `datasets` decodes, the processor does the rest."""
    decoded = dataset.cast_column("image", datasets.Image(decode=True))
    collate = partial(_transformers_batch, processor, label_map)
    return DataLoader(decoded, batch_size, collate_fn=collate, num_workers=num_workers)


def _transformers_batch(
    processor: DetrImageProcessor, label_map: LabelMap, rows: list[Mapping[str, Any]]
) -> Mapping[str, Any]:
    annotations = [
        {
            "image_id": row["image_id"],
            "annotations": [item | {"category_id": label_map.label(item["category_id"])} for item in row["objects"]],
        }
        for row in rows
    ]
    images = [row["image"].convert("RGB") for row in rows]
    return processor(images=images, annotations=annotations, return_tensors="pt")


def _seconds(build: Callable[[], Iterable[Any]]) -> tuple[float, float]:
    """Build a loader, read it to the end and close it; return seconds of wall clock and of processors."""
    start, used = time.perf_counter(), _processor_seconds()
    loader = build()
    for _ in loader:
        pass
    del loader  # ends its workers, whose time is known only then
    return time.perf_counter() - start, _processor_seconds() - used


def _processor_seconds() -> float:
    """Return what this process and those that it has waited for have used."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}
