"""Throughput of the loader beside that of transformers' DETR processor, in one run.

What counts is the processor time of all processes: pictures per second of one core, whoever else is running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import DetrImageProcessor

from ..data.labels import LabelMap
from ..data.loading import DetectionDataset, data_loader, read_image
from ..modeling.image_processing_drmm import DrmmImageProcessor
from .measuring import check_least, environment, summary, take_turns, threads, timed


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
    check_least(
        {
            "batch_size": (batch_size, 1),
            "num_workers": (num_workers, 0),
            "num_pictures": (num_pictures, 1),
            "repetitions": (repetitions, 1),
        }
    )
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
    device = torch.device("cpu")
    with threads(1):
        where = environment(device, "torchvision", "transformers", "datasets", "pillow")
        turns = {name: partial(timed, partial(_read, build), device) for name, build in contestants.items()}
        seconds = take_turns(turns, repetitions, title="loader")
    wall, core = ({name: [one[clock] for one in taken] for name, taken in seconds.items()} for clock in (0, 1))
    ratios = [theirs / mine for theirs, mine in zip(core["transformers"], core["drmm_hf"], strict=True)]
    return {
        "num_pictures": count,
        "batch_size": batch_size,
        "num_workers": num_workers,
        "repetitions": repetitions,
        "size": size,
        **where,
        "loaders": {
            name: {
                "pictures_per_second": summary([count / value for value in wall[name]]),
                "pictures_per_core_second": summary([count / value for value in core[name]]),
            }
            for name in contestants
        },
        "ratio": summary(ratios),
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


def _read(build: Callable[[], Iterable[Any]]) -> None:
    """Build a loader, read it to the end and close it: the time of its workers is known only then."""
    for _ in build():
        pass
