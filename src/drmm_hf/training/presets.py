"""`drmm train --data FOLDER` and nothing else: choose a recipe from the data, and say what was chosen and why."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from ..conversion.model_source import find_source
from ..data.coco import find_splits
from ..evaluation.predict import check_reachable, readable_settings
from ..modeling.image_processing_drmm import DrmmImageProcessor
from .arguments import DataArguments, Recipe, TrainingArguments, make_recipe, parse_value
from .build import load_split
from .optimizer import LONGEST_WARMUP


# Queries -> rows and columns of the grid that their boxes start from (Appendix C.2 has those from 100 to 2000).
GRIDS = {100: [10, 10], 300: [15, 20], 500: [20, 25], 1000: [25, 40]}
# Training pictures up to which the compact detector is chosen, and what it was measured on.
FEW = 2000
HOLDOUT = 0.1
# Minutes of a CPU, and the shorter side of the input that was measured with them (docs/results.md).
MEASURED_MINUTES, MEASURED_EDGE = 55, 240


def choose_recipe(source: str, overrides: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """Choose a recipe for a data set from its number and size of pictures and its most crowded picture.

    Args:
        source (`str`): Folder or Hub id of the data.
        overrides (`Mapping`): Fields that the user set, which win: name -> yaml text or value.

    Returns:
        `tuple[Recipe, list[str]]`: The recipe, and a line for each choice with its reason.

    Raises:
        ValueError: If the data have no training split, or as `make_recipe`.

    Source: Up to 2000 pictures, and for minutes on a CPU, the numbers of
        `scripts/recipes/bccd_adamixer_lite0_cpu.yaml`, measured on 205; above, those of Appendix B for Sparse R-CNN.
        The numbers of epochs in between are judgement.
    """
    overrides = {name.replace("-", "_"): parse_value(name, value) for name, value in overrides.items()}
    if overrides.get("streaming") and source != "generated" and not Path(source).exists():
        raise ValueError(
            f"{source!r} is no folder: without a recipe one is chosen from all pictures; name one to stream"
        )
    data, notes = choose_splits(source, overrides)
    own = {name: value for name, value in overrides.items() if name in vars(DataArguments()) and name != "streaming"}
    own["longest_edge"] = sys.maxsize  # until it follows the shorter one
    bounds = {"epochs": 1, "max_minutes": overrides.get("max_minutes")}
    checked = make_recipe({"data": {**data, **own}, "training": bounds}, {})
    loaded, minutes = checked.data, None if torch.accelerator.is_available() else checked.training.max_minutes
    facts = describe(load_split(loaded, "train")[0])
    trained = trained_size(overrides["init_from"]) if "init_from" in overrides else None
    edge = loaded.shortest_edge if "shortest_edge" in overrides else trained and trained[0]
    notes.insert(0, "no recipe is given; chosen from the data ({num_images} training pictures, {width} x {height} "
                 "pixels in the middle, {most} objects in the fullest):".format(**facts))  # fmt: skip
    compact = facts["num_images"] <= FEW or (minutes is not None and "init_from" not in overrides)
    sections = few(facts, edge, minutes) if compact else many(facts, edge)
    notes += sections.pop("notes")
    sections["data"] |= data
    if trained and edge == trained[0]:
        sections["data"]["longest_edge"] = trained[1]
    if loaded.overfit is not None:
        sections["data"] |= {"augmentation": "none", "colour_distortion": 0.0}
        notes = [note for note in notes if not note.startswith("augmentation")]
        notes.append(f"augmentation: none, so that {loaded.overfit} pictures can be learnt by heart (overfit)")
    if "num_queries" in overrides:
        sections["model"]["proposal_grid"] = GRIDS.get(overrides["num_queries"])
    if "init_from" in overrides:
        sections["model"] = {}
        sections["training"].pop("backbone_weights")
        dropped = ("detector:", "num_queries:", "learning_rate:", *(["shortest_edge:"] if trained else []))
        notes = [note for note in notes if not note.startswith(dropped)]
        notes.append("architecture: that of init_from")
        if trained:
            notes.append(f"shortest_edge: {edge}, that of init_from (longest_edge {sections['data']['longest_edge']})")
        rate = sections["training"]["learning_rate"]
        notes.append(
            f"learning_rate: {rate:g}, as from scratch; a fifth of it if init_from knows such pictures already"
        )
    else:
        weights = sections["training"]["backbone_weights"]
        notes.append(f"backbone_weights: {weights} from the Hub; a file will do, or none for random weights")
    if any(name in overrides for name in ("max_steps", "max_minutes")):
        sections["training"].pop("epochs")
        if "max_steps" not in overrides:
            sections["training"]["schedule_by"] = "time"
        notes = [note for note in notes if not note.startswith("epochs")]
    recipe = make_recipe(sections, overrides)
    is_given = "warmup_steps" in overrides
    notes.append("warmup_steps:" if is_given else bound_warmup(recipe.training, facts["num_images"]))
    names = [note.partition(":")[0] for note in notes]
    given = {name: f"{name}: {overrides[name]}, as given" for name in names if name in overrides}
    return recipe, [given.get(*pair) for pair in zip(names, notes, strict=True)]


def bound_warmup(training: TrainingArguments, num_images: int) -> str:
    """Bound the warm-up by a tenth of the run.

    Args:
        training (`TrainingArguments`): Its `warmup_steps` are changed where steps or epochs are what ends the run; of
            a schedule by time, `warmup_factor` sees to it.
        num_images (`int`): Training pictures.

    Returns:
        `str`: What was chosen and why.
    """
    if training.schedule_by == "time":
        share = f"the first tenth of the {training.max_minutes:g} minutes"
        return f"warmup_steps: {training.warmup_steps}, or {share} if that is shorter"
    pictures = training.batch_size * training.accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    epochs = math.inf if training.epochs is None else training.epochs
    steps = int(min(training.max_steps or math.inf, epochs * math.ceil(num_images / pictures)))
    training.warmup_steps = min(training.warmup_steps, max(1, int(LONGEST_WARMUP * steps)))
    return f"warmup_steps: {training.warmup_steps}, at most a tenth of the {steps} steps"


def trained_size(source: str) -> tuple[int, int] | None:
    """Return the input size of a model, since a detector is at its best near the size that it was trained with.

    Args:
        source (`str`): Folder or Hub id of the model.

    Returns:
        `tuple[int, int]`: Shortest and longest edge, pixels; None if it resizes in another way.

    Raises:
        ValueError: If it has no image processor, or a damaged one.
    """
    source = find_source(source, "init_from")
    check_reachable(source, "init_from")
    with readable_settings(source, "init_from"):
        size = DrmmImageProcessor.from_pretrained(source).size
    return (size.shortest_edge, size.longest_edge) if size.shortest_edge and size.longest_edge else None


def choose_splits(source: str, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Choose the splits to train on and to choose the best checkpoint on.

    Args:
        source (`str`): Folder or Hub id of the data.
        overrides (`Mapping`): `train_split`, `val_split`, `holdout` and `overfit` are the user's if given.

    Returns:
        `tuple[dict, list[str]]`: Fields of the data section, and a line if pictures are held out.

    Raises:
        ValueError: If no split is called train, and none is named.
    """
    data, notes = {"source": source}, []
    if source == "generated" or "holdout" in overrides:
        return data, notes
    _, splits = find_splits(source)
    for field, start in (("train_split", "train"), ("val_split", "val")):
        found = sorted((name for name in splits if name.lower().startswith(start)), key=len)
        if found and field not in overrides:
            data[field] = found[0]
        elif field not in overrides and start == "train":
            raise ValueError(f"data {source!r} has no split called train, but {sorted(splits)}: name one, train_split")
        elif field not in overrides and "overfit" not in overrides:  # which evaluates what it learns
            data["holdout"] = HOLDOUT
            notes.append(f"holdout: {HOLDOUT:g} of the training pictures choose the best checkpoint: no split val")
    return data, notes


def describe(dataset: datasets.Dataset) -> dict[str, int]:
    """Measure what a recipe depends on.

    Args:
        dataset (`datasets.Dataset`): Training pictures in the canonical schema.

    Returns:
        `dict[str, int]`: `num_images`, the median `width` and `height`, the median `shortest_edge` and the largest
        number of objects in a picture (`most`).
    """
    table = dataset.select_columns(["width", "height", "objects"]).with_format("arrow")[:]
    width, height = (table[name].to_numpy() for name in ("width", "height"))
    return {
        "num_images": len(dataset),
        "width": int(np.median(width)),
        "height": int(np.median(height)),
        "shortest_edge": int(np.median(np.minimum(width, height))),
        "most": int(pc.max(pc.list_value_length(table["objects"])).as_py()),
    }


def few(facts: Mapping[str, int], edge: int | None = None, minutes: float | None = None) -> dict[str, Any]:
    """Choose for up to 2000 pictures, or for minutes on a CPU: a compact detector, strong augmentation, many epochs.

    Args:
        facts (`Mapping`): From `describe`.
        edge (`int`, *optional*): Shorter side of the model input, pixels; by default near the pictures' own.
        minutes (`float`, *optional*): Bound of a run on a CPU, which bounds the shorter side: so that as many pictures
            are seen as in the run that was measured, but not below its size.

    Returns:
        `dict`: The three sections of a recipe, and `notes`.
    """
    queries = enough_queries(facts)
    near = _round(min(max(facts["shortest_edge"], 192), 480), 32)
    affordable = near if minutes is None else _round(MEASURED_EDGE * max(1, minutes / MEASURED_MINUTES) ** 0.5, 16)
    edge = edge or min(near, affordable)
    num_images = facts["num_images"]
    batch = 8 if minutes is None else 4  # a CPU is about as fast with either, and a short run needs steps
    epochs = 300 if num_images <= 100 else 100 if num_images <= 500 else 60
    small = {
        "shortest_edge": edge,
        "longest_edge": _round(1.6 * edge, 32),
        "augmentation": "paper",
        "short_edges": sorted({edge, *(_round(edge * factor, 16) for factor in (0.8, 0.87, 0.93, 1.07, 1.13))}),
        "crop_short_edges": [_round(edge * factor, 8) for factor in (1, 1.17, 1.33)],
        "crop_sizes": [_round(edge * factor, 8) for factor in (0.73, 1.27)],
        "colour_distortion": 0.5,
    }
    model = {
        "decoder_type": "adamixer",
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": "tf_efficientnet_lite0",
            "out_indices": [1, 2, 3, 4],
        },
        "backbone_norm": "eval",
        "freeze_backbone_stages": 2,
        "num_queries": queries,
        "proposal_grid": GRIDS[queries],
        "proposal_size": 0.25,
        "shared_query_features": True,
        "num_stages": 4,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "intermediate_size": 512,
        "num_sampling_points": 16,
        "num_mixing_points": 64,
        "box_delta_unit": "box",
        "overlap_attention": True,
        "mcm_weight": 2.0,
        "mcm_stages": "last",
        "likelihood_epsilon": 0,
    }
    training = {
        "backbone_weights": "timm/tf_efficientnet_lite0.in1k",
        "batch_size": batch,
        "epochs": epochs,
        "schedule": "cosine",
        "final_factor": 0.01,
        "warmup_steps": 100,
        "ema_decay": 0.998,
        "learning_rate": 1.0e-3,
        "learning_rate_batch_size": batch,
        "backbone_lr_factor": 0.25,
        "weight_decay": 1.0e-4,
        "evaluate_every": max(1, epochs // 20),
        "eval_batch_size": 8,
        "log_every": 20,
    }
    size = f"shortest_edge: {edge}, near the pictures' own {facts['shortest_edge']} (192 to 480)"
    if affordable < near:
        size = f"shortest_edge: {edge}, not the pictures' own {facts['shortest_edge']}: "
        size += f"in {minutes:g} minutes on a CPU, smaller pictures are seen more often"
    reason = f"{num_images} pictures are few (up to {FEW})" if num_images <= FEW else "minutes on a CPU are few"
    notes = [
        f"detector: EfficientNet-Lite0, AdaMixer decoder of 4 stages: {reason}",
        f"num_queries: {queries}, at least 3 for each of the {facts['most']} objects of the fullest picture",
        size,
        "augmentation: paper (flips, crops, other sizes), and colours: pictures are soon known by heart otherwise",
        f"epochs: {epochs}, {epochs * num_images} pictures seen",
        f"learning_rate: {training['learning_rate']:g}, for batches of {training['batch_size']}; what is evaluated "
        "and kept is a moving average of the weights",
    ]
    return {"model": model, "data": small, "training": training, "notes": notes}


def many(facts: Mapping[str, int], edge: int | None = None) -> dict[str, Any]:
    """Choose for more than 2000 pictures: the paper's detector and schedule.

    Args:
        facts (`Mapping`): From `describe`.
        edge (`int`, *optional*): Shorter side of the model input, pixels; by default near the pictures' own.

    Returns:
        `dict`: The three sections of a recipe, and `notes`.
    """
    queries = enough_queries(facts)
    edge = edge or _round(min(max(facts["shortest_edge"], 320), 800), 32)
    scale = edge / 800
    large = {
        "shortest_edge": edge,
        "longest_edge": round(1333 * scale),
        "augmentation": "paper",
        "short_edges": sorted({edge, *(_round(size * scale, 16) for size in range(480, 800, 32))}),
        "crop_short_edges": [round(size * scale) for size in (400, 500, 600)],
        "crop_sizes": [round(size * scale) for size in (384, 600)],
    }
    model = {
        "backbone_config": {
            "model_type": "resnet",
            "layer_type": "bottleneck",
            "depths": [3, 4, 6, 3],
            "hidden_sizes": [256, 512, 1024, 2048],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "backbone_norm": "eval",
        "freeze_backbone_stages": 1,
        "num_queries": queries,
        "proposal_grid": GRIDS[queries],
    }
    training = {
        "backbone_weights": "timm/resnet50.tv_in1k",
        "batch_size": 2,
        "accumulation_steps": 8,
        "epochs": 36,
        "learning_rate": 5.0e-5,
        "learning_rate_batch_size": 16,
        "eval_batch_size": 2,
    }
    notes = [
        f"detector: ResNet-50, Sparse R-CNN decoder of 6 stages, as in the paper: more than {FEW} pictures",
        f"num_queries: {queries}, at least 300 and 3 for each of the {facts['most']} objects of the fullest picture",
        f"shortest_edge: {edge}, near the pictures' own {facts['shortest_edge']} (320 to 800)",
        "augmentation: paper (flips, crops, other sizes)",
        "epochs: 36, as the augmentation, the paper's; steps of 16 pictures, 8 times 2: with N processes give "
        "--accumulation-steps 8/N",
    ]
    return {"model": model, "data": large, "training": training, "notes": notes}


def enough_queries(facts: Mapping[str, int]) -> int:
    """Choose a number of queries.

    Args:
        facts (`Mapping`): From `describe`.

    Returns:
        `int`: The smallest of `GRIDS` that is at least 100, or 300 for more than 2000 pictures, and 3 for each object
        of the fullest picture; else the largest.
    """
    least = max(100 if facts["num_images"] <= FEW else 300, 3 * facts["most"])
    return next((number for number in GRIDS if number >= least), max(GRIDS))


def _round(value: float, multiple: int) -> int:
    return multiple * max(1, round(value / multiple))
