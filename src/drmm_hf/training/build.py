"""From a recipe to what the loop turns: the two splits, the model with its image processor, the loader."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from ..conversion.model_source import find_source
from ..data.augmentation import build_augmentation
from ..data.canonical import canonical_stream
from ..data.coco import coco_paths, left_out, load_detection_dataset
from ..data.generated import generate_shapes
from ..data.labels import LabelMap
from ..data.loading import DetectionDataset, data_loader
from ..data.problems import Problems
from ..data.stream import StreamLoader
from ..evaluation.coco_metrics import ground_truth, load_annotations
from ..evaluation.predict import check_reachable, readable_settings
from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection
from .arguments import DataArguments, Recipe, TrainingArguments
from .stop_request import end_workers_at_exit, ignore_signals


def load_split(
    data: DataArguments, split: str, problems: Problems | None = None
) -> tuple[datasets.Dataset | datasets.IterableDataset, Mapping[str, Any] | None]:
    """Load the pictures of a split and its untouched annotations.

    Args:
        data (`DataArguments`): Says where they are.
        split (`str`): `train` or `val`, whatever the data set calls it.
        problems (`Problems`, *optional*): Where a stream records what it leaves out.

    Returns:
        `tuple`: The dataset in the canonical schema, `train` as a stream with `data.streaming`, and of `val` its COCO
        annotations: the content of the file if there is one and nothing in it was left out, else built from the
        dataset.

    Raises:
        ValueError: If the recipe does not say where the data are, or if there are no pictures.
    """
    if data.overfit is not None:
        dataset, _ = load_split(dataclasses.replace(data, overfit=None), "train")
        return first_rich_pictures(dataset, data.overfit)
    if data.holdout is not None:
        dataset, _ = load_split(dataclasses.replace(data, holdout=None), "train")
        kept = [_is_held_out(image_id, data.holdout) == (split == "val") for image_id in dataset["image_id"]]
        dataset = dataset.select(np.flatnonzero(kept))
        if not len(dataset):
            raise ValueError(f"data.holdout is {data.holdout}, which leaves no pictures for {split}")
        return dataset, ground_truth(dataset)
    if data.source == "generated":
        count, seed = {"train": (data.num_train_images, 0), "val": (data.num_val_images, 1)}[split]
        dataset = generate_shapes(count, seed, image_size=tuple(data.image_size))
        if data.streaming and split == "train":
            return canonical_stream(dataset), None
        return dataset, ground_truth(dataset)
    name, images, annotations = (getattr(data, f"{split}_{what}") for what in ("split", "images", "annotations"))
    source = data.source or annotations
    if source is None:
        raise ValueError(f"no {split} data: give --data, or {split}_images and {split}_annotations")
    dataset = load_detection_dataset(
        source,
        name,
        images=images,
        annotations=annotations,
        bbox_format=data.bbox_format,
        invalid=data.invalid_data,
        streaming=data.streaming and split == "train",
        problems=problems,
        alone=data.streaming,
    )
    if isinstance(dataset, datasets.IterableDataset):
        return dataset, None
    if not len(dataset):
        raise ValueError(f"split {name!r} of {source} has no pictures")
    if split == "train" and not _has_objects(dataset):
        raise ValueError(f"split {name!r} of {source} has no boxes, crowds aside: nothing can be learnt from it")
    if split == "train":
        return dataset, None
    paths = coco_paths(source, name, images=images, annotations=annotations)
    if paths is None or left_out(dataset):
        return dataset, ground_truth(dataset)
    return dataset, load_annotations(paths[0])


def first_rich_pictures(dataset: datasets.Dataset, count: int) -> tuple[datasets.Dataset, Mapping[str, Any]]:
    """Choose the first pictures by id with at least 5 boxes.

    Args:
        dataset (`datasets.Dataset`): Training pictures.
        count (`int`): How many.

    Returns:
        `tuple`: The pictures and their COCO annotations.

    Raises:
        ValueError: If there are not as many.
    """
    ids, objects = dataset["image_id"], dataset["objects"]
    rich = [index for index, boxes in enumerate(objects) if sum(not box["iscrowd"] for box in boxes) >= 5]
    chosen = sorted(rich, key=lambda index: ids[index])[:count]
    if len(chosen) < count:
        raise ValueError(f"data.overfit is {count}, but only {len(chosen)} pictures have 5 boxes or more")
    dataset = dataset.select(chosen)
    return dataset, ground_truth(dataset)


def check_pretrained(training: TrainingArguments) -> None:
    """Ask the Hub once, before any work, for what a run starts from.

    Args:
        training (`TrainingArguments`): `init_from` and `backbone_weights`; for folders and files nobody is asked.

    Raises:
        ValueError: If the Hub cannot be reached, or must not be; the message names the argument.
        FileNotFoundError: If it is a path and does not exist.
    """
    if training.init_from is not None:
        check_reachable(find_source(training.init_from, "init_from"), "init_from")
    weights = training.backbone_weights
    if weights in (None, "none") or os.path.isfile(os.path.expanduser(weights)):
        return
    weights, repository = find_source(weights, "backbone_weights"), None
    if "/" not in weights:  # a name of timm's, which knows where it lies
        import timm

        known = timm.get_pretrained_cfg(weights) if timm.is_model(weights.partition(".")[0]) else None
        repository = known and known.hf_hub_id
    check_reachable(weights, "backbone_weights", repository)


def build_model(recipe: Recipe, label_map: LabelMap) -> tuple[DrmmForObjectDetection, DrmmImageProcessor]:
    """Build the model and its image processor, from scratch or from a checkpoint.

    Args:
        recipe (`Recipe`): `model` fields, input size, `init_from`, `backbone_weights`.
        label_map (`LabelMap`): The classes to learn.

    Returns:
        `tuple`: Model in float32, and processor.

    Raises:
        ValueError: If the fields do not fit together, or the checkpoint's.
    """
    training = recipe.training
    size = {"shortest_edge": recipe.data.shortest_edge, "longest_edge": recipe.data.longest_edge}
    classes = {
        "id2label": label_map.id2label,
        "label2id": label_map.label2id,
        "category_ids": list(label_map.category_ids),
    }
    if training.init_from is None:
        model = DrmmForObjectDetection(DrmmConfig(**recipe.model, **classes))
        processor = DrmmImageProcessor(size=size)
    else:
        training.init_from = find_source(training.init_from, "init_from")
        try:
            model, loaded = DrmmForObjectDetection.from_pretrained(
                training.init_from,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **recipe.model,
                **classes,
            )
        except StrictDataclassError as error:
            raise ValueError(f"model, with what {training.init_from!r} has: {error}") from error
        except (OSError, SafetensorError) as error:
            raise ValueError(f"init_from is {training.init_from!r}, which holds no whole model: {error}") from error
        for name, stored, wanted in sorted(loaded["mismatched_keys"]):
            print(f"starts afresh: {name}, {tuple(stored)} in {training.init_from} and {tuple(wanted)} here")
        if loaded["missing_keys"]:
            missing = sorted(loaded["missing_keys"])
            print(f"starts afresh: {len(missing)} tensors that {training.init_from} does not have, as {missing[0]}")
        # What was fitted to the predictions of those weights does not hold for others.
        fresh = {"calibration": None, "score_threshold": None}
        with readable_settings(training.init_from, "init_from"):
            processor = DrmmImageProcessor.from_pretrained(training.init_from, size=size, **fresh)
    if training.backbone_weights not in (None, "none"):
        from ..conversion.backbone_weights import load_backbone_weights

        print(load_backbone_weights(model, training.backbone_weights, processor))
    elif training.init_from is None:
        frozen = model.config.freeze_backbone_stages
        print(f"the backbone starts from random weights{f', {frozen} stages of it frozen' if frozen else ''}")
    return model, processor


def training_loader(
    dataset: datasets.Dataset | datasets.IterableDataset,
    label_map: LabelMap,
    processor: DrmmImageProcessor,
    recipe: Recipe,
    problems: Problems | None = None,
) -> DataLoader | StreamLoader:
    """Build the loader of augmented training batches.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Training pictures.
        label_map (`LabelMap`): Category ids to labels.
        processor (`DrmmImageProcessor`): Makes pixel values and labels.
        recipe (`Recipe`): Augmentation, workers, batch size and seed.
        problems (`Problems`, *optional*): That of `load_split`.

    Returns:
        `DataLoader`, or this process's `StreamLoader`: Batches of `pixel_values`, `pixel_mask` and `labels`.
    """
    end_workers_at_exit()
    data, training = recipe.data, recipe.training
    augmentation = build_augmentation(
        data.augmentation,
        horizontal_flip=data.horizontal_flip,
        vertical_flip=data.vertical_flip,
        short_edges=data.short_edges or [data.shortest_edge],
        max_long_edge=data.longest_edge,
        crop_short_edges=data.crop_short_edges,
        crop_sizes=data.crop_sizes,
        colour_distortion=data.colour_distortion,
    )
    if isinstance(dataset, datasets.IterableDataset):
        processes = PartialState()
        return StreamLoader(
            dataset,
            label_map,
            processor,
            training.batch_size,
            augmentation=augmentation,
            seed=training.seed,
            shuffle_buffer=data.shuffle_buffer,
            group_by_aspect_ratio=data.group_by_aspect_ratio,
            num_workers=data.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=ignore_signals,
            rank=processes.process_index,
            num_ranks=processes.num_processes,
            problems=problems if data.invalid_data == "skip" else None,
        )
    loader = data_loader(
        DetectionDataset(dataset, label_map, augmentation, training.seed),
        processor,
        training.batch_size,
        num_workers=data.num_workers,
        pin_memory=torch.cuda.is_available(),
        group_by_aspect_ratio=data.group_by_aspect_ratio,
    )
    loader.worker_init_fn = ignore_signals
    loader.generator = torch.Generator()  # its own: starting an epoch must not draw from the model's
    return loader


def _has_objects(dataset: datasets.Dataset) -> bool:
    """Tell whether any picture has an object that is no crowd."""
    rows = dataset.select_columns(["objects"]).with_format("arrow").iter(1000)
    crowds = (pc.struct_field(pc.list_flatten(table["objects"]), "iscrowd") for table in rows)
    return any(pc.any(pc.equal(one, 0)).as_py() for one in crowds)


def _is_held_out(image_id: int, share: float) -> bool:
    """Decide by the id alone, so that pictures that are added later change nothing for those that were there."""
    return int.from_bytes(hashlib.sha256(str(image_id).encode()).digest()[:8], "big") < share * 2**64
