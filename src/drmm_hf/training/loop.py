"""The training loop, visible from top to bottom: steps, logs, checkpoints, evaluation."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn

from ..data.coco import categories
from ..data.labels import LabelMap
from ..data.problems import Problems
from ..evaluation.detections import Detections
from ..evaluation.evaluate import category_of_label, measure
from ..evaluation.files import run_lock, write_text
from ..evaluation.origin import origin
from ..evaluation.predict import predict
from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.image_processing_drmm import DrmmImageProcessor
from ..visualization.batch_pictures import save_augmented_pictures
from .arguments import Recipe, TrainingArguments, load_recipe
from .batch_size import find_batch_size
from .build import build_model, check_pretrained, load_split, training_loader
from .checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint, save_model
from .ema import averaged_model
from .epochs import Epochs
from .manifest import add_to_manifest, data_changes, data_fingerprint, read_manifest
from .optimizer import LONGEST_WARMUP, build_optimizer, schedule_factor, set_learning_rate, warmup_factor
from .presets import describe
from .resume import check_model, check_run, settle_best
from .run_log import Clock, Log
from .sharding import check_sharding, gather_weights, whole_tensor
from .stop_request import StopRequest


def train(recipe: Recipe) -> dict[str, Any]:
    """Train a detector.

    Args:
        recipe (`Recipe`): From `load_recipe`.

    Returns:
        `dict`: What `summary.json` holds: the figures of the best checkpoint on the validation split (fractions), and
        `steps`, `epochs`, `images` seen, `best_step`, `seconds` (everything) and `training_seconds` (evaluations
        included, loading excluded).

    Raises:
        ValueError: If the output folder holds a run and `resume` is not set, or if data and recipe do not fit.
        FloatingPointError: If the loss or gradient of `max_skipped_steps` in a row is not finite; the message names
            the pictures. Found at the next log line or checkpoint; until then the weights are left as they are.
        SystemExit: If SIGTERM or SIGINT came: after the step in progress and a checkpoint, with code 143 or 130.
    """
    output_dir = Path(recipe.training.output_dir)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=several and not torch.accelerator.is_available(),  # torchrun's processes would each be alone otherwise
        mixed_precision=recipe.training.mixed_precision,
        log_with=recipe.training.trackers or None,
        project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / "tensorboard")),
    )
    check_sharding(accelerator, recipe.training)
    for name in {*recipe.training.trackers} - {"all", *map(str, accelerator.log_with)}:
        accelerator.print(f"tracker {name!r} is left out: its package is not installed")
    with run_lock(accelerator, output_dir):
        return run(recipe, accelerator, output_dir)


def run(recipe: Recipe, accelerator: Accelerator, output_dir: Path) -> dict[str, Any]:
    """Do what `train` says, in a folder that no other run uses.

    Args:
        recipe (`Recipe`): From `load_recipe`.
        accelerator (`Accelerator`): Made for the recipe.
        output_dir (`Path`): Folder of the run.

    Returns:
        `dict`: As `train`.
    """
    began = time.perf_counter()
    training = recipe.training
    checkpoint = find_checkpoint(output_dir, accelerator)
    if checkpoint is not None and training.find_batch_size:
        if not (output_dir / "recipe.yaml").is_file():
            raise ValueError(
                f"find_batch_size is true, but {str(output_dir)!r} has lost its recipe.yaml, which has the batch size "
                "that was found: give that as batch_size and accumulation_steps, without find_batch_size"
            )
        stored = load_recipe(output_dir / "recipe.yaml").training
        training.batch_size, training.accumulation_steps = stored.batch_size, stored.accumulation_steps
        training.find_batch_size = False
    changes = check_run(output_dir, recipe, checkpoint)
    check_pretrained(training)
    set_seed(training.seed)

    with accelerator.main_process_first():  # the others find its cache
        problems = Problems()  # of a stream, as it goes
        train_set, _ = load_split(recipe.data, "train", problems)
        val_set, annotations = load_split(recipe.data, "val")
    label_map = LabelMap.from_categories(categories(train_set))
    classes = label_map if len(label_map) <= 20 else f"{len(label_map)} classes, {', '.join(label_map.names[:5])} ..."
    num_train = None if recipe.data.streaming else len(train_set)
    accelerator.print(f"{num_train or 'a stream of'} training and {len(val_set)} validation pictures\n{classes}")

    model, processor = build_model(recipe, label_map)
    if checkpoint is not None:
        check_model(output_dir, DrmmConfig.from_pretrained(checkpoint), model.config)
    category_of_label(model.config, annotations["categories"])  # the two splits name the same classes
    if accelerator.num_processes > 1 and model.config.backbone_norm == "train":
        model = synchronize_batch_norms(accelerator, model)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(accelerator.device)
    optimizer = build_optimizer(model, model.model.backbone, training)
    # Before `prepare`, which gives the model a forward that a copy would share, or shards it.
    average = averaged_model(model, training.ema_decay) if training.ema_decay is not None else None
    whole_model = copy.deepcopy(model) if accelerator.is_fsdp2 else model
    bare_model = model
    if training.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    if training.find_batch_size:
        training.batch_size, training.accumulation_steps = find_batch_size(
            accelerator, bare_model, optimizer, training, recipe.data.longest_edge, describe(train_set)["most"]
        )
        training.find_batch_size = False  # a run that is resumed, or repeated from its recipe, has what was found
    loader = accelerator.prepare(training_loader(train_set, label_map, processor, recipe, problems))
    kept_model = whole_model if average is None else average.module  # what is evaluated and saved

    progress, lost, data, changed = Progress(), [], {}, {}
    if accelerator.is_main_process:
        data = {"train": data_fingerprint(train_set), "val": data_fingerprint(val_set)}
    accelerator.register_for_checkpointing(progress, *([] if average is None else [average]))
    if checkpoint is not None:
        groups = [{name: group[name] for name in group.keys() - {"params"}} for group in optimizer.param_groups]
        load_checkpoint(accelerator, checkpoint)
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)  # the recipe's, which may have changed
        gather_weights(bare_model, whole_model)
        accelerator.print(f"resuming {checkpoint} at step {progress.step}", *changes, sep="\n")
        if accelerator.is_main_process:
            changed = data_changes(read_manifest(output_dir / "manifest.json"), progress.step, data)
        (changed,) = broadcast_object_list([changed])
        if "train" in changed and progress.step_in_epoch:
            changed["train"] += (
                f"; step {progress.step_in_epoch + 1} of the epoch in progress has other pictures than it would have "
                "had, and so have those after it"
            )
        accelerator.print(*changed.values(), sep="\n", end="\n" * bool(changed))
        lost = settle_best(accelerator, output_dir, progress, training.best_metric, "val" in changed)
    elif training.resume:
        accelerator.print(f"nothing to resume in {output_dir}: starting")
    clock = Clock(accelerator, progress, training)
    epochs = Epochs(accelerator, loader, progress, training.accumulation_steps)
    total_steps = min(training.max_steps or math.inf, (training.epochs or math.inf) * epochs.steps)
    if progress.step_in_epoch >= epochs.steps:  # resumed with larger batches
        progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
    accelerator.print(describe_batch(training, accelerator.num_processes))
    accelerator.print(describe_length(training, epochs.steps, total_steps))
    if accelerator.is_main_process:
        recipe.save(output_dir / "recipe.yaml")
        add_to_manifest(
            output_dir / "manifest.json", step=progress.step, data=data, processes=accelerator.num_processes
        )
    # DeepSpeed has stepped before we see the gradient: the first one that is not finite ends the run.
    max_skipped = 1 if accelerator.distributed_type == DistributedType.DEEPSPEED else training.max_skipped_steps
    log = Log(accelerator, output_dir, progress, total_steps, max_skipped, training.max_minutes)
    raw_model = None if average is None else whole_model
    is_told = by_time = training.schedule_by == "time"  # whose warm-up does not outlast the run
    save = partial(
        save_checkpoint, accelerator, output_dir, kept_model, processor, progress, training.keep_last, raw_model
    )

    def evaluate() -> None:
        """Measure the weights that were just saved, unless an earlier part of the run did; keep the best."""
        metrics = logged = None if "val" in changed else log.evaluation_at(progress.step)
        is_new = logged is None or bool(lost)
        if is_new:
            metrics, detections = evaluate_model(accelerator, kept_model, processor, val_set, annotations, training)
        value = metrics.get(training.best_metric) or 0.0
        progress.evaluations_since_best += 1
        if progress.best_value is None or value > progress.best_value:
            progress.best_value, progress.best_step, progress.evaluations_since_best = value, progress.step, 0
            if is_new and accelerator.is_main_process:
                save_model(output_dir / "best", kept_model, processor, raw_model)
                mapping = category_of_label(kept_model.config, annotations["categories"])
                data, split = recipe.data, "holdout" if recipe.data.holdout else recipe.data.val_split
                best, source = output_dir / "best", data.source or data.val_annotations
                about = origin(best, source, split, annotations, step=progress.step)
                measure(detections, annotations, mapping, output_dir, about=about)
        progress.evaluation_due = False
        lost.clear()
        clock.read()
        if logged is None:
            log.write_evaluation(metrics)
        else:
            log.write_table()

    def is_over() -> bool:
        impatient = progress.evaluations_since_best >= (training.patience or math.inf)
        streamed = epochs.streams and progress.epoch >= (training.epochs or math.inf)
        return progress.step >= total_steps or streamed or clock.is_over() or impatient

    model.train()
    done = 1.0  # of the schedule, at the last step
    with StopRequest(accelerator) as stop:
        if progress.evaluation_due:
            with stop.at_once():
                evaluate()
        while not (is_over() or stop.came()):
            for batches, ends_epoch in epochs.rest():
                if progress.step == 0 and accelerator.is_main_process:
                    save_augmented_pictures(batches, processor, label_map.id2label, output_dir / "first_batches.jpg")
                done = clock.fraction() if by_time else progress.step / total_steps
                set_learning_rate(optimizer, schedule_factor(training, progress.step, done))
                terms, images = accumulate_gradients(accelerator, model, batches, training.channels_last)
                norm = accelerator.clip_grad_norm_(model.parameters(), training.max_grad_norm or math.inf)
                norm = whole_tensor(torch.as_tensor(norm, device=accelerator.device))
                if accelerator.scaler is None:  # the fused kernel leaves the weights alone where this is 1
                    optimizer.optimizer.found_inf = (~norm.isfinite()).float()
                optimizer.step()
                optimizer.zero_grad()
                if average is not None:
                    gather_weights(bare_model, whole_model)
                    average.update_parameters(whole_model)

                progress.step += 1
                progress.step_in_epoch += 1
                progress.images += images
                if ends_epoch:
                    progress.epoch += 1
                    progress.step_in_epoch = 0
                clock.read()
                log.add(batches, terms, norm)
                if not is_told and clock.expected_steps() < min(training.warmup_steps, total_steps):
                    accelerator.print(describe_slow_run(training, clock.expected_steps()))
                    is_told = True
                stops, ends_run = stop.came(), is_over()
                saves = ends_run or stops or ends_epoch or progress.step % (training.save_every_steps or math.inf) == 0
                progress.evaluation_due = ends_run or (
                    ends_epoch and progress.epoch % (training.evaluate_every or math.inf) == 0
                )
                if saves or progress.step % training.log_every == 0:
                    log.write_training(optimizer)
                if saves:
                    gather_weights(bare_model, whole_model)
                    progress.positions = epochs.positions()
                    save()
                if progress.evaluation_due and not stops:
                    with stop.at_once():
                        evaluate()
                if stops or is_over():
                    break
        log.close()
        if stop.came():
            accelerator.end_training()
            raise SystemExit(stop.exit_code)
    if warmup_factor(training, progress.step - 1, done) < 1 and (by_time or training.warmup_steps < total_steps):
        accelerator.print(describe_short_run(training, progress.step))

    accelerator.wait_for_everyone()
    summary = {
        "steps": progress.step,
        "epochs": progress.epoch,
        "images": progress.images,
        "best_step": progress.best_step,
        "skipped_steps": progress.skipped_steps,
        "training_seconds": progress.seconds,
        "seconds": progress.seconds + time.perf_counter() - clock.stopped + clock.started - began,
        "num_training_images": num_train,
        "num_parameters": sum(parameter.numel() for parameter in kept_model.parameters()),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }
    if accelerator.is_main_process:
        metrics = json.loads((output_dir / "metrics.json").read_text())
        summary = {name: value for name, value in metrics.items() if not isinstance(value, (dict, list))} | summary
        write_text(output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    (summary,) = broadcast_object_list([summary])
    accelerator.end_training()  # the processes part
    return summary


def synchronize_batch_norms(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Let batch norms in training mode use the statistics of all processes.

    Args:
        accelerator (`Accelerator`): Tells the device.
        model (`nn.Module`): The model, before `prepare`.

    Returns:
        `nn.Module`: The model; unchanged, with a warning, on devices other than GPUs, where torch has no such layer.
    """
    if accelerator.device.type != "cuda":
        accelerator.print(
            "warning: backbone_norm is 'train' and torch synchronises batch norms on GPUs only: each process uses "
            "the statistics of its own pictures"
        )
        return model
    from timm.layers import convert_sync_batchnorm  # torch's own would lose the activation in timm's batch norms

    return convert_sync_batchnorm(model)


def describe_batch(training: TrainingArguments, num_processes: int) -> str:
    """Say how large an optimiser step's batch is, and what that means for the learning rate.

    Args:
        training (`TrainingArguments`): Batch size, accumulation, learning rate and the batch that it was chosen for.
        num_processes (`int`): Processes that train together.

    Returns:
        `str`: One or two lines.
    """
    size = training.batch_size * training.accumulation_steps * num_processes
    line = (
        f"effective batch {size}: {training.batch_size} pictures x {training.accumulation_steps} accumulation steps x "
        f"{num_processes} processes; learning rate {training.learning_rate:g}"
    )
    chosen_for = training.learning_rate_batch_size
    if chosen_for is None or chosen_for == size:
        return line
    ratio = size / chosen_for
    rates = sorted((training.learning_rate * ratio**0.5, training.learning_rate * ratio))
    return f"{line}\nit was chosen for an effective batch of {chosen_for}; try {rates[0]:.2g} to {rates[1]:.2g}"


def describe_length(training: TrainingArguments, epoch_steps: float, total_steps: float) -> str:
    """Say how long a run will be, before its first step.

    Args:
        training (`TrainingArguments`): Bounds, warm-up and how often a line is written.
        epoch_steps (`float`): Optimiser steps in an epoch, infinite if that is not known.
        total_steps (`float`): Optimiser steps of the run, infinite if that is not known.

    Returns:
        `str`: A line, and a second one if the run's steps are no more than those of its warm-up.
    """
    bounds = [] if math.isinf(total_steps) else [f"{total_steps} steps"]
    if math.isinf(total_steps) and training.epochs is not None:
        bounds.append(f"{training.epochs} epochs")
    if training.max_minutes is not None:
        bounds.append(f"{training.max_minutes:g} minutes")
    line = f"at most {' or '.join(bounds)}"
    if math.isfinite(epoch_steps):
        line += f", {epoch_steps} steps an epoch"
    if training.warmup_steps:
        line += f", warm-up of {training.warmup_steps} steps"
        if training.schedule_by == "time":
            line += f" or {LONGEST_WARMUP * training.max_minutes:.2g} minutes, whichever is shorter"
    line += f"; a line every {training.log_every} steps and at each checkpoint"
    is_short = total_steps <= training.warmup_steps and training.schedule_by == "steps"
    return f"{line}\n{describe_short_run(training, total_steps)}" if is_short else line


def describe_short_run(training: TrainingArguments, steps: int) -> str:
    """Say what it means that a run ends before its warm-up does.

    Args:
        training (`TrainingArguments`): Warm-up and learning rate.
        steps (`int`): Optimiser steps of the run, at most those of the warm-up.

    Returns:
        `str`: A warning.
    """
    return (
        f"warning: the run's {steps} steps end within the warm-up, warmup_steps {training.warmup_steps}: the learning "
        f"rate never reaches {training.learning_rate:g}; lower warmup_steps"
    )


def describe_slow_run(training: TrainingArguments, steps: float) -> str:
    """Say that a run will end before its warm-up does, as soon as its pace is known.

    Args:
        training (`TrainingArguments`): Warm-up, learning rate and the bound in minutes.
        steps (`float`): Optimiser steps that fit into it.

    Returns:
        `str`: A warning.
    """
    return (
        f"warning: about {steps:.0f} steps fit into max_minutes {training.max_minutes:.3g}, fewer than warmup_steps "
        f"{training.warmup_steps}: the learning rate will not reach {training.learning_rate:g}; lower warmup_steps"
    )


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
        accelerator.sync_gradients = last  # tells DeepSpeed, which steps inside `backward`
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
) -> tuple[dict[str, Any], Detections]:
    """Measure a model on the validation split, each process on its share of the pictures.

    Args:
        accelerator (`Accelerator`): Gathers the detections.
        model (`nn.Module`): The model, unwrapped.
        processor (`DrmmImageProcessor`): Its image processor.
        dataset (`datasets.Dataset`): Validation pictures.
        annotations (`Mapping`): Their untouched COCO annotations.
        training (`TrainingArguments`): `eval_batch_size`.

    Returns:
        `tuple[dict, Detections]`: What `drmm_hf.evaluation.evaluate.measure` returns, and what it measured, the same
        in every process.
    """
    share = dataset.select(range(accelerator.process_index, len(dataset), accelerator.num_processes))
    progress = accelerator.is_main_process and sys.stderr.isatty()
    detections = predict(model, processor, share, training.eval_batch_size, progress=progress)
    detections = Detections.merge(gather_object([detections]))
    metrics = [None]
    if accelerator.is_main_process:
        mapping = category_of_label(model.config, annotations["categories"])
        metrics = [measure(detections, annotations, mapping)]
    return broadcast_object_list(metrics)[0], detections
