"""The training loop, visible from top to bottom: data, model, steps, logs, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.augmentation import build_augmentation
from ..data.coco import categories, coco_paths, load_detection_dataset
from ..data.generated import generate_shapes
from ..data.labels import LabelMap
from ..data.loading import DetectionDataset, data_loader
from ..evaluation.coco_metrics import ground_truth, load_annotations
from ..evaluation.detections import Detections
from ..evaluation.evaluate import category_of_label, measure
from ..evaluation.predict import predict
from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..modeling.modeling_drmm import DrmmForObjectDetection
from .arguments import DataArguments, Recipe, TrainingArguments, load_recipe
from .checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint, save_model
from .ema import averaged_model
from .optimizer import build_optimizer, schedule_factor, set_learning_rate


def train(recipe: Recipe) -> dict[str, Any]:
    """Train a detector.

    Args:
        recipe (`Recipe`): From `load_recipe`.

    Returns:
        `dict`: What `summary.json` holds: the figures of the best checkpoint on the validation split (fractions), and
        `steps`, `epochs`, `images` seen, `best_step`, `seconds` (everything) and `training_seconds` (evaluations
        included, loading and the last evaluation excluded).

    Raises:
        ValueError: If the output folder holds a run and `resume` is not set, or if data and recipe do not fit.
        FloatingPointError: If a loss or gradient is not finite; the message names the pictures. Found at the next log
            line or checkpoint; until then the weights are left as they are.
    """
    began = time.perf_counter()
    training = recipe.training
    output_dir = Path(training.output_dir)
    checkpoint = find_checkpoint(output_dir)
    if checkpoint is not None and not training.resume:
        raise ValueError(
            f"output_dir {str(output_dir)!r} holds a run: continue it with --resume or name another folder"
        )
    if checkpoint is not None and (output_dir / "recipe.yaml").is_file():
        stored = load_recipe(output_dir / "recipe.yaml").model
        changed = sorted(
            name for name in stored.keys() | recipe.model.keys() if stored.get(name) != recipe.model.get(name)
        )
        if changed:
            raise ValueError(
                f"output_dir {str(output_dir)!r} holds a run of another model: {changed[0]} was "
                f"{stored.get(changed[0])!r} and is {recipe.model.get(changed[0])!r}; name another folder"
            )
    accelerator = Accelerator(
        mixed_precision=training.mixed_precision,
        log_with=training.trackers or None,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "tensorboard")),
    )
    set_seed(training.seed)

    train_set, _ = load_split(recipe.data, "train")
    val_set, annotations = load_split(recipe.data, "val")
    label_map = LabelMap.from_categories(categories(train_set))
    accelerator.print(f"{len(train_set)} training and {len(val_set)} validation pictures\n{label_map}")

    model, processor = build_model(recipe, label_map)
    category_of_label(model.config, annotations["categories"])  # the two splits name the same classes
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda" and model.config.backbone_norm == "train":
        from timm.layers import convert_sync_batchnorm  # torch's own would lose the activation in timm's batch norms

        model = convert_sync_batchnorm(model)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    model.to(accelerator.device)
    optimizer = build_optimizer(model, model.model.backbone, training)
    # Before `prepare`, which gives the model a forward that a copy would share.
    average = averaged_model(model, training.ema_decay) if training.ema_decay is not None else None
    loader = training_loader(train_set, label_map, processor, recipe)
    bare_model = model
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    kept_model = bare_model if average is None else average.module  # what is evaluated and saved

    progress = Progress()
    accelerator.register_for_checkpointing(progress, *([] if average is None else [average]))
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint)
        accelerator.print(f"resuming {checkpoint} at step {progress.step}")
    clock = Clock(accelerator, progress, training)
    steps_per_epoch = math.ceil(len(loader) / training.accumulation_steps)
    total_steps = min(training.max_steps or math.inf, (training.epochs or math.inf) * steps_per_epoch)
    if progress.step_in_epoch >= steps_per_epoch:  # resumed with larger batches
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        recipe.save(output_dir / "recipe.yaml")
    log = Log(accelerator, output_dir, progress, total_steps)

    model.train()
    over = progress.step >= total_steps or clock.is_over()
    while not over:
        loader.set_epoch(progress.epoch)
        seen = progress.step_in_epoch * training.accumulation_steps
        rest_of_epoch = skip_first_batches(loader, seen) if seen else loader
        for batches in groups(rest_of_epoch, training.accumulation_steps):
            done = clock.fraction() if training.schedule_by == "time" else progress.step / total_steps
            set_learning_rate(optimizer, schedule_factor(training, progress.step, done))
            terms, images = accumulate_gradients(accelerator, model, batches, training.channels_last)
            norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm or math.inf)
            if accelerator.scaler is None:  # the fused kernel leaves the weights alone where this is 1
                optimizer.optimizer.found_inf = (~norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update_parameters(bare_model)

            progress.step += 1
            progress.step_in_epoch += 1
            progress.images += images
            ends_epoch = progress.step_in_epoch == steps_per_epoch
            if ends_epoch:
                progress.epoch += 1
                progress.step_in_epoch = 0
            clock.read()
            over = progress.step >= total_steps or clock.is_over()
            saves = over or ends_epoch or progress.step % (training.save_every_steps or math.inf) == 0
            evaluates = over or (ends_epoch and progress.epoch % (training.evaluate_every or math.inf) == 0)

            log.add(batches, terms, norm)
            if saves or progress.step % training.log_every == 0:
                log.write_training(optimizer)
            if evaluates:
                metrics = evaluate_model(accelerator, kept_model, processor, val_set, annotations, training)
                value = metrics[training.best_metric] or 0.0
                if progress.best_value is None or value > progress.best_value:
                    progress.best_value, progress.best_step = value, progress.step
                    if accelerator.is_main_process:
                        save_model(output_dir / "best", kept_model, processor)
                clock.read()
                log.write_evaluation(metrics)
                over = over or clock.is_over()
            if saves or over:
                save_checkpoint(accelerator, output_dir, kept_model, processor, progress, training.keep_last)
            if over:
                break
    log.close()

    accelerator.wait_for_everyone()
    best = DrmmForObjectDetection.from_pretrained(output_dir / "best").to(accelerator.device)
    metrics = evaluate_model(accelerator, best, processor, val_set, annotations, training, output_dir)
    summary = {name: value for name, value in metrics.items() if not isinstance(value, (Mapping, list))}
    summary |= {
        "steps": progress.step,
        "epochs": progress.epoch,
        "images": progress.images,
        "best_step": progress.best_step,
        "training_seconds": progress.seconds,
        "seconds": progress.seconds + time.perf_counter() - clock.stopped + clock.started - began,
        "num_training_images": len(train_set),
        "num_parameters": sum(parameter.numel() for parameter in best.parameters()),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    if accelerator.is_main_process:
        (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    accelerator.end_training()
    return summary


def load_split(data: DataArguments, split: str) -> tuple[datasets.Dataset, Mapping[str, Any]]:
    """Load the pictures of a split and its untouched annotations.

    Args:
        data (`DataArguments`): Says where they are.
        split (`str`): `train` or `val`, whatever the data set calls it.

    Returns:
        `tuple`: The dataset in the canonical schema, and its COCO annotations: the content of the file if there is
        one, else built from the dataset.

    Raises:
        ValueError: If the recipe does not say where the data are, or if there are no pictures.
    """
    if data.overfit_images is not None:
        dataset, _ = load_split(dataclasses.replace(data, overfit_images=None), "train")
        return first_rich_pictures(dataset, data.overfit_images)
    if data.source == "generated":
        count, seed = {"train": (data.num_train_images, 0), "val": (data.num_val_images, 1)}[split]
        dataset = generate_shapes(count, seed, image_size=tuple(data.image_size))
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
        invalid=data.invalid_boxes,
    )
    if not len(dataset):
        raise ValueError(f"split {name!r} of {source} has no pictures")
    paths = coco_paths(source, name, images=images, annotations=annotations)
    return dataset, ground_truth(dataset) if paths is None else load_annotations(paths[0])


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
        raise ValueError(f"data.overfit_images is {count}, but only {len(chosen)} pictures have 5 boxes or more")
    dataset = dataset.select(chosen)
    return dataset, ground_truth(dataset)


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
        for name, stored, wanted in sorted(loaded["mismatched_keys"]):
            print(f"starts afresh: {name}, {tuple(stored)} in {training.init_from} and {tuple(wanted)} here")
        if loaded["missing_keys"]:
            missing = sorted(loaded["missing_keys"])
            print(f"starts afresh: {len(missing)} tensors that {training.init_from} does not have, as {missing[0]}")
        processor = DrmmImageProcessor.from_pretrained(training.init_from, size=size)
    if training.backbone_weights is not None:
        from ..conversion.backbone_weights import load_backbone_weights

        print(load_backbone_weights(model, training.backbone_weights, processor))
    elif training.init_from is None:
        frozen = model.config.freeze_backbone_stages
        print(f"the backbone starts from random weights{f', {frozen} stages of it frozen' if frozen else ''}")
    return model, processor


def training_loader(
    dataset: datasets.Dataset, label_map: LabelMap, processor: DrmmImageProcessor, recipe: Recipe
) -> DataLoader:
    """Build the loader of augmented training batches.

    Args:
        dataset (`datasets.Dataset`): Training pictures.
        label_map (`LabelMap`): Category ids to labels.
        processor (`DrmmImageProcessor`): Makes pixel values and labels.
        recipe (`Recipe`): Augmentation, workers, batch size and seed.

    Returns:
        `DataLoader`: Batches of `pixel_values`, `pixel_mask` and `labels`.
    """
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
    loader = data_loader(
        DetectionDataset(dataset, label_map, augmentation, training.seed),
        processor,
        training.batch_size,
        num_workers=data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    loader.generator = torch.Generator()  # its own: starting an epoch must not draw from the model's
    return loader


def groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Group batches into the lists of one optimiser step; the last may be shorter.

    Args:
        batches (`Iterable`): Batches of an epoch.
        size (`int`): Batches in a group.

    Yields:
        `list`: Up to `size` batches.
    """
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def loss_shares(
    accelerator: Accelerator, config: DrmmConfig, batches: list[Mapping[str, Any]]
) -> tuple[list[float], int]:
    """Weigh the batches of one optimiser step so that they add up to the loss of all its pictures at once.

    Args:
        accelerator (`Accelerator`): Sums over processes.
        config (`DrmmConfig`): Of the model; `focal_l1_giou` is a mean over matched predictions, others over pictures.
        batches (`list[Mapping]`): Each with `labels`, a list with an entry a picture.

    Returns:
        `tuple[list[float], int]`: Factor of each batch's loss, and the number of pictures in all processes.
    """
    images = [len(batch["labels"]) for batch in batches]
    copies, most = config.num_ground_truth_copies, config.num_queries
    matches = [
        config.num_query_groups * sum(min(len(label["boxes"]) * copies, most) for label in batch["labels"])
        for batch in batches
    ]
    counts = torch.tensor([*matches, sum(images)], device=accelerator.device)
    *all_matches, all_images = (accelerator.reduce(counts) if accelerator.num_processes > 1 else counts).tolist()
    if config.criterion == "focal_l1_giou":
        return [max(count, 1) / max(sum(all_matches), 1) for count in all_matches], all_images
    return [count * accelerator.num_processes / all_images for count in images], all_images


def accumulate_gradients(
    accelerator: Accelerator, model: nn.Module, batches: list[Mapping[str, Any]], channels_last: bool = False
) -> tuple[list[dict[str, Tensor]], int]:
    """Add up the gradients of one optimiser step: of the mean loss over all its pictures, in all processes.

    Batches weigh as many pictures as they hold (with `focal_l1_giou`, as many matched predictions as they will have),
    so that 1 x 8, 4 x 2 and two processes with 2 x 2 are the same step.

    Args:
        accelerator (`Accelerator`): Runs the backward pass.
        model (`nn.Module`): The prepared model; its loss is a mean over pictures.
        batches (`list[Mapping]`): `pixel_values`, `pixel_mask` and `labels`.
        channels_last (`bool`): Bring the pictures into channels-last memory order.

    Returns:
        `tuple[list[dict[str, Tensor]], int]`: For each batch of this process the detached `loss` and `loss_dict`, and
        the number of pictures in all processes.
    """
    shares, images = loss_shares(accelerator, accelerator.unwrap_model(model).config, batches)
    terms = []
    for position, batch in enumerate(batches):
        pixel_values = batch["pixel_values"]
        if channels_last:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        last = position == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            outputs = model(pixel_values, batch["pixel_mask"], batch["labels"], output_auxiliary=False)
            accelerator.backward(outputs.loss * shares[position])
        terms.append({"loss": outputs.loss.detach(), **outputs.loss_dict})
    return terms, images


def evaluate_model(
    accelerator: Accelerator,
    model: nn.Module,
    processor: DrmmImageProcessor,
    dataset: datasets.Dataset,
    annotations: Mapping[str, Any],
    training: TrainingArguments,
    output_dir: Path | None = None,
) -> dict[str, Any]:
    """Measure a model on the validation split, each process on its share of the pictures.

    Args:
        accelerator (`Accelerator`): Gathers the detections.
        model (`nn.Module`): The model, unwrapped.
        processor (`DrmmImageProcessor`): Its image processor.
        dataset (`datasets.Dataset`): Validation pictures.
        annotations (`Mapping`): Their untouched COCO annotations.
        training (`TrainingArguments`): `eval_batch_size`.
        output_dir (`Path`, *optional*): Where to write `metrics.json` and `detections.json`.

    Returns:
        `dict`: What `drmm_hf.evaluation.evaluate.measure` returns, the same in every process.
    """
    share = dataset.select(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    progress = accelerator.is_main_process and sys.stderr.isatty()
    detections = predict(model, processor, share, training.eval_batch_size, progress=progress)
    detections = Detections.merge(gather_object([detections]))
    metrics = [None]
    if accelerator.is_main_process:
        mapping = category_of_label(model.config, annotations["categories"])
        metrics = [measure(detections, annotations, mapping, output_dir)]
    return broadcast_object_list(metrics)[0]


class Clock:
    """Tell how much of a run's time is used, the same in every process.

    Args:
        accelerator (`Accelerator`): With several processes and a bound in minutes, the first one's clock counts.
        progress (`Progress`): `seconds` used by earlier parts of the run; `read` updates it.
        training (`TrainingArguments`): `max_minutes`.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress, training: TrainingArguments):
        self.accelerator = accelerator
        self.progress = progress
        self.limit = None if training.max_minutes is None else 60 * training.max_minutes
        self.earlier = progress.seconds
        self.started = self.stopped = time.perf_counter()

    def read(self) -> None:
        """Set `progress.seconds` to the time used by now."""
        self.stopped = time.perf_counter()
        seconds = self.earlier + self.stopped - self.started
        if self.limit is not None and self.accelerator.num_processes > 1:
            seconds = broadcast_object_list([seconds])[0]
        self.progress.seconds = seconds

    def fraction(self) -> float:
        """Return the share of `max_minutes` that was used when the clock was last read."""
        return self.progress.seconds / self.limit

    def is_over(self) -> bool:
        """Return whether `max_minutes` were used up when the clock was last read."""
        return self.limit is not None and self.progress.seconds >= self.limit


class Log:
    """Write a run's figures to stdout, `log.jsonl` and the trackers, without waiting for the device at each step.

    A training line holds, over the steps since the line before: `loss` (mean over pictures), the criterion's terms
    (`nll.stage0`, `mcm.stage0`, ...: mean over ground truths), `leading_share.stage0`, ... (exp(-L_MCM): the share of
    a ground truth's likelihood that its best component takes), `grad_norm` before clipping, learning rates and
    pictures per second. An evaluation line holds the figures of `measure`.

    Args:
        accelerator (`Accelerator`): Its trackers are started here.
        output_dir (`Path`): Folder of the run. Lines of later steps, from a run that was killed, are removed.
        progress (`Progress`): Where the run stands.
        total_steps (`float`): Steps of the whole run, for the bar; infinite if time ends it.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, progress: Progress, total_steps: float):
        self.accelerator = accelerator
        self.progress = progress
        self.path = output_dir / "log.jsonl"
        if accelerator.is_main_process:
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= progress.step]
            self.path.write_text("".join(kept))
        accelerator.init_trackers("drmm")
        self.bar = tqdm(
            total=None if math.isinf(total_steps) else total_steps,
            initial=progress.step,
            unit="step",
            disable=None if accelerator.is_main_process else True,  # None: only on a terminal
        )
        self._start_window()

    def _start_window(self) -> None:
        self.sums, self.norms, self.image_ids = [], [], []  # an entry a step
        self.num_images = self.num_objects = 0
        self.window_started = time.perf_counter()

    def add(self, batches: list[Mapping[str, Any]], terms: list[dict[str, Tensor]], norm: Tensor) -> None:
        """Take in one optimiser step.

        Args:
            batches (`list[Mapping]`): Its batches.
            terms (`list[dict[str, Tensor]]`): The loss and its terms of each, means over pictures.
            norm (`Tensor`): Norm of the gradient before clipping.
        """
        counts = [len(batch["labels"]) for batch in batches]
        labels = [label for batch in batches for label in batch["labels"]]
        self.names = list(terms[0])
        rows = [torch.stack([values[name].detach().float() for name in self.names]) for values in terms]
        self.sums.append(torch.stack([row * count for row, count in zip(rows, counts, strict=True)]).sum(0))
        self.norms.append(norm.detach())
        self.image_ids.append([label["image_id"] for label in labels])
        self.num_images += sum(counts)
        self.num_objects += sum(len(label["boxes"]) for label in labels)
        self.bar.update()

    def write_training(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the figures of the steps since the last training line.

        Args:
            optimizer (`Optimizer`): Gives the learning rates.

        Raises:
            FloatingPointError: If the loss or the gradient of a step was not finite.
        """
        if not self.sums:
            return
        device = self.accelerator.device
        norms, step_sums = torch.stack(self.norms), torch.stack(self.sums)
        self._check_finite(norms, step_sums)
        counts = torch.tensor([self.num_images, self.num_objects], dtype=torch.float64, device=device)
        totals = self.accelerator.reduce(torch.cat((step_sums.sum(0).double(), counts)), "sum")
        *sums, images, objects = totals.tolist()
        seconds = time.perf_counter() - self.window_started
        values = {}
        for name, value in zip(self.names, sums, strict=True):
            per_object = name.startswith(("nll.", "mcm."))
            values[name] = value / max(objects, 1) if per_object else value / images
            if name.startswith("mcm."):
                values[name.replace("mcm", "leading_share")] = math.exp(-values[name])
        values["grad_norm"] = norms[norms.isfinite()].mean().item()
        for group in optimizer.param_groups:
            part = group["name"].removesuffix("_no_decay")
            values["learning_rate" if part == "head" else f"learning_rate_{part}"] = group["lr"]
        values["images_per_second"] = images / seconds
        if device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        shown = {name: value for name, value in values.items() if ".stage" not in name}
        last = max((int(name.rpartition(".stage")[2]) for name in values if ".stage" in name), default=0)
        last_stage = [name for name in values if name.endswith(f".stage{last}")]
        self._write(values, {**shown, **{name: values[name] for name in last_stage}})
        self._start_window()

    def write_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Write the figures of an evaluation.

        Args:
            metrics (`Mapping`): From `evaluate_model`.
        """
        values = {name: value for name, value in metrics.items() if isinstance(value, float)}
        shown = {name: values[name] for name in ("AP", "AP50", "AP75", "ECE") if name in values}
        self._write(values, {"validation": "", **shown})
        self.window_started = time.perf_counter()

    def close(self) -> None:
        """Take the bar away."""
        self.bar.close()

    def _write(self, values: Mapping[str, float], shown: Mapping[str, Any]) -> None:
        progress = self.progress
        head = {"step": progress.step, "epoch": progress.epoch, "images": progress.images, "seconds": progress.seconds}
        self.accelerator.log(dict(values), step=progress.step)
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({**head, **values}) + "\n")
        words = [f"{name} {value:.4g}" if isinstance(value, float) else name for name, value in shown.items()]
        where = f"[{progress.seconds / 60:.1f} min] epoch {progress.epoch} step {progress.step}"
        tqdm.write("  ".join((where, *words)))

    def _check_finite(self, norms: Tensor, step_sums: Tensor) -> None:
        finite = step_sums.isfinite().all(1)
        if self.accelerator.scaler is None:  # a scaler of fp16 looks for the largest scale that overflows
            finite &= norms.isfinite()
        bad = (~finite).nonzero().flatten().tolist()
        image_ids = gather_object([int(image_id) for step in bad[:1] for image_id in self.image_ids[step]])
        if image_ids:
            raise FloatingPointError(
                f"loss or gradient is not finite by step {self.progress.step}, in a step on the "
                f"pictures with image_id {image_ids}: look at their boxes, or lower the learning rate"
            )
