"""Two processes on gloo: the step of one, no unused parameters, each picture counted once, checkpoints together.

This file is also what the two processes run, once, with all that the tests look at.
"""

import datetime
import math
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import SwinConfig

from conftest import STAGES, random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.coco import categories
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation import files
from drmm_hf.evaluation.coco_metrics import ground_truth
from drmm_hf.evaluation.files import run_lock
from drmm_hf.modeling.criteria import CRITERIA
from drmm_hf.training import checkpoint
from drmm_hf.training.arguments import load_recipe
from drmm_hf.training.batch_size import find_batch_size
from drmm_hf.training.build import build_model, load_split, training_loader
from drmm_hf.training.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from drmm_hf.training.epochs import groups
from drmm_hf.training.loop import accumulate_gradients, evaluate_model


def run_in_this_process(folder):
    """Do all jobs as one of the processes that the environment tells of, and write what each returned."""
    limit = datetime.timedelta(seconds=120)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=int(os.environ["RANK"]), world_size=2, timeout=limit
    )
    results = {}
    for name, job in JOBS.items():
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        results[name] = job(accelerator, folder / name)
    torch.save(results, folder / f"{accelerator.process_index}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Start two processes, and return what each job returned in each of them."""
    folder = tmp_path_factory.mktemp("both")
    alone = save_in_each(Accelerator(cpu=True), folder / "saved by one")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = []
    for rank in ("0", "1"):
        output = (folder / f"{rank}.txt").open("w")
        code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"  # leaves sys.path as it is here
        command = [sys.executable, "-c", code, __file__, str(folder)]
        ranks = {"RANK": rank, "LOCAL_RANK": rank}
        processes.append(subprocess.Popen(command, env=environment | ranks, stdout=output, stderr=output))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((folder / f"{rank}.txt").read_text()[-3000:] for rank in range(2))
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {"folder": folder, "alone": alone, **{name: [result[name] for result in results] for name in JOBS}}


def build(**fields):
    torch.manual_seed(0)
    return DrmmForObjectDetection(tiny_config(**fields)).train()


def batches_of(counts, sizes, dtype=torch.float32):
    """Return pictures of one padded size with so many ground truths each, in batches of the given sizes."""
    pixel_values = random_pictures(len(counts)).to(dtype)
    mask = torch.ones(len(counts), 64, 96, dtype=torch.int64)
    for index in range(len(counts)):
        mask[index, 64 - 8 * index :] = 0
        mask[index, :, 96 - 4 * index :] = 0
    labels = random_labels(*counts, dtype=dtype)
    stops = np.cumsum(sizes).tolist()
    return [
        {"pixel_values": pixel_values[start:stop], "pixel_mask": mask[start:stop], "labels": labels[start:stop]}
        for start, stop in zip([0, *stops], stops, strict=False)
    ]


def gradient_of(accelerator, model, batches):
    model.zero_grad()
    _, images = accumulate_gradients(accelerator, model, batches)
    assert images == 4
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


OBJECTIVES = {
    **{name: {"criterion": name} for name in CRITERIA if name != "focal_l1_giou"},
    # More ground truths than queries, once copied: the number of matches is not that of the ground truths.
    "focal_l1_giou": {"head_type": "box", "num_query_groups": 2, "num_ground_truth_copies": 4},
}
# Of four pictures; with two processes, one has nothing but empty pictures in all but the first case.
GROUND_TRUTHS = [(4, 0, 1, 3), (2, 3, 0, 0), (0, 0, 2, 0), (0, 0, 0, 0)]


def gradients_of_each(accelerator, _, sizes, num_cases=2):
    """Return the gradient of each objective, number format and set of ground truths.

    Args:
        sizes: Pictures in each batch; with two processes, each takes half of the batches.
        num_cases: Sets of ground truths.
    """
    gradients = {}
    for name, fields in OBJECTIVES.items():
        for dtype, cases in ((torch.float64, GROUND_TRUTHS[:num_cases]), (torch.float32, GROUND_TRUTHS[:1])):
            model = accelerator.prepare(build(**fields).to(dtype))
            for counts in cases:
                batches = batches_of(counts, sizes, dtype)
                share = len(batches) // accelerator.num_processes
                start = share * accelerator.process_index
                gradients[name, dtype, counts] = gradient_of(accelerator, model, batches[start : start + share])
    return gradients


# Pictures in each batch.
WAYS = {
    "2 processes, 2 each": {"sizes": [2, 2], "num_cases": 4},
    "2 processes, 1 + 1 each": {"sizes": [1, 1, 1, 1]},
    "2 processes, 3 and 1": {"sizes": [3, 1]},
}


@pytest.fixture(scope="module")
def gradients(both):
    """Gradients of one process with 4 pictures at once, and of all other ways to spread them."""
    alone = partial(gradients_of_each, Accelerator(cpu=True), None)
    return alone([4], 4), {"1 process, 2 + 2": [alone([2, 2])], **{way: both[way] for way in WAYS}}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_step_does_not_depend_on_how_pictures_are_spread(gradients, objective):
    whole, ways = gradients
    cases = [key for key in whole if key[0] == objective]
    assert len(cases) == 5
    for key in cases:
        expected, (_, dtype, counts) = whole[key], key
        largest = float(expected.abs().max())
        assert (largest > 0) == (sum(counts) > 0 or objective == "focal_l1_giou")
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype] * largest
        found = [(way, gradient[key]) for way, processes in ways.items() for gradient in processes if key in gradient]
        assert len(found) == (7 if counts in GROUND_TRUTHS[:2] else 2)
        for way, gradient in found:
            error = float((gradient - expected).abs().max())
            assert error <= tolerance, f"{way}, {counts}, {dtype}: {error} of {largest}"


SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
ADAMIXER = {"decoder_type": "adamixer", "hidden_size": 32, "num_sampling_points": 5, "num_mixing_points": 6}
VARIANTS = {
    "Sparse R-CNN on ResNet": {},
    "Sparse R-CNN on Swin": {"backbone_config": SwinConfig(**SWIN, out_features=STAGES)},
    "AdaMixer on ResNet": ADAMIXER,
    "AdaMixer on Swin": {**ADAMIXER, "backbone_config": SwinConfig(**SWIN, out_features=STAGES)},
    "box head": {"head_type": "box"},
    "groups of queries": {"head_type": "box", "num_query_groups": 2},
    "groups of queries on AdaMixer": {**ADAMIXER, "head_type": "box", "num_query_groups": 2},
    "batch norms in training, frozen stages": {"backbone_norm": "train", "freeze_backbone_stages": 2},
    "gradient checkpointing": {"checkpointing": True},
    "gradient checkpointing on AdaMixer and Swin": {
        **ADAMIXER,
        "backbone_config": SwinConfig(**SWIN, out_features=STAGES),
        "checkpointing": True,
    },
}


def train_each_variant(accelerator, _):
    """Take two steps of each; DDP raises at the second if a parameter had no gradient. One process has no objects."""
    results = {}
    for name, fields in VARIANTS.items():
        model = build(**{key: value for key, value in fields.items() if key != "checkpointing"})
        if "checkpointing" in fields:
            model.gradient_checkpointing_enable()
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = [torch.cat([parameter.detach().flatten() for parameter in trainable])]
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainable, lr=1e-2))
        assert not model.find_unused_parameters
        for counts in ([(2, 1), (0, 0)], [(1, 3), (2, 0)]):
            accumulate_gradients(accelerator, model, batches_of(counts[accelerator.process_index], [1, 1]))
            assert all(parameter.grad is not None for parameter in trainable)
            optimizer.step()
            optimizer.zero_grad()
            weights.append(torch.cat([parameter.detach().flatten() for parameter in trainable]))
        results[name] = weights
        accelerator.free_memory()
    return results


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_without_unused_parameters_and_processes_stay_alike(both, variant):
    first, second = (results[variant] for results in both["variants"])
    for mine, other in zip(first, second, strict=True):
        assert mine.isfinite().all() and torch.equal(mine, other)
    for before, after in zip(first, first[1:], strict=False):
        assert (before != after).float().mean() > 0.9


def evaluate_in_parts(accelerator, _, count):
    dataset = generate_shapes(count, 0, (64, 64))
    label_map = LabelMap.from_categories(categories(dataset))
    model = build(id2label=label_map.id2label, category_ids=list(label_map.category_ids)).eval()
    training = SimpleNamespace(eval_batch_size=2)
    processor = DrmmImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})
    metrics, detections = evaluate_model(accelerator, model, processor, dataset, ground_truth(dataset), training)
    found = detections.to_coco(label_map)
    return metrics, sorted(found, key=_key)


@pytest.mark.parametrize("count", [7, 1])
def test_each_picture_is_evaluated_once(both, count):
    """7 pictures are no multiple of 2 processes x 2 pictures; 1 leaves a process without any."""
    metrics, detections = evaluate_in_parts(Accelerator(cpu=True), None, count)
    assert len({item["image_id"] for item in detections}) == metrics["num_images"] == count
    assert len(detections) == count * 36  # 12 queries, 3 classes
    for found_metrics, found in both[f"evaluate {count}"]:
        assert [_key(item) for item in found] == [_key(item) for item in detections]
        assert [item["score"] for item in found] == pytest.approx([item["score"] for item in detections], rel=1e-4)
        assert {name: found_metrics[name] for name in ("num_images", "AP50", "AR100", "ECE")} == pytest.approx(
            {name: metrics[name] for name in ("num_images", "AP50", "AR100", "ECE")}, abs=1e-4
        )


def _key(item):
    return item["image_id"], item["query"], item["category_id"]


def images_of_an_epoch(accelerator, _, count):
    """Return the ids in each batch of each step: batches of 2 in each process, 2 batches a step."""
    recipe = load_recipe(Path(__file__).parent / "tiny.yaml", {"num_train_images": count})
    dataset, _ = load_split(recipe.data, "train")
    label_map = LabelMap.from_categories(categories(dataset))
    _, processor = build_model(recipe, label_map)
    loader = accelerator.prepare(training_loader(dataset, label_map, processor, recipe))
    steps = groups(loader, recipe.training.accumulation_steps)
    batches = [[[int(label["image_id"]) for label in batch["labels"]] for batch in step] for step in steps]
    return batches, len(loader), sorted(dataset["image_id"])


@pytest.mark.parametrize("count", [1, 8, 9, 10])
def test_processes_take_as_many_steps_and_the_last_is_filled_with_pictures_seen_before(both, count):
    (first, length, every_id), (second, second_length, _) = both[f"epoch of {count}"]
    assert length == second_length == math.ceil(count / 4) == sum(map(len, first))
    assert [list(map(len, step)) for step in first] == [list(map(len, step)) for step in second]
    seen = [image_id for steps in (first, second) for step in steps for batch in step for image_id in batch]
    assert sorted(set(seen)) == every_id
    assert len(seen) == 4 * math.ceil(count / 4)


def draw():
    return random.random(), float(np.random.rand()), torch.rand(3).tolist()


def state_of(model, optimizer):
    moments = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return torch.cat([value.detach().flatten().float() for value in (*model.parameters(), *moments)])


def parts_of_a_run(accelerator):
    model = build(dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    return model, prepared, optimizer, progress


def save_in_each(accelerator, folder):
    model, prepared, optimizer, progress = parts_of_a_run(accelerator)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(accelerator.process_index)
    accumulate_gradients(accelerator, prepared, batches_of((2, 1), [2]))
    optimizer.step()
    progress.step = 1
    save_checkpoint(accelerator, folder, model, DrmmImageProcessor(), progress, 2)
    return draw(), state_of(prepared, optimizer)


def load_in_each(accelerator, folder):
    _, prepared, optimizer, progress = parts_of_a_run(accelerator)
    load_checkpoint(accelerator, find_checkpoint(folder, accelerator))
    assert progress.step == 1
    return draw(), state_of(prepared, optimizer)


def save_and_load(accelerator, folder):
    """Return random numbers and state after a save, and again after loading it."""
    saved = save_in_each(accelerator, folder)
    return saved, load_in_each(Accelerator(cpu=True), folder)


def test_every_process_gets_its_own_random_numbers_back(both):
    (first, first_again), (second, second_again) = both["save and load"]
    assert first[0] != second[0]
    assert (first_again[0], second_again[0]) == (first[0], second[0])
    assert all(torch.equal(state, first[1]) for _, state in (first_again, second, second_again))


def test_another_number_of_processes_goes_on_from_the_same_weights(both, capsys):
    saved = both["save and load"][0][0]
    _, state = load_in_each(Accelerator(cpu=True), both["folder"] / "save and load")
    assert torch.equal(state, saved[1])
    assert "was saved with num_processes 2 and goes on with 1: weights, optimizer" in capsys.readouterr().out
    assert all(torch.equal(state, both["alone"][1]) for _, state in both["saved by one"])
    said = (both["folder"] / "0.txt").read_text()
    assert said.count("was saved with") == said.count("was saved with num_processes 1 and goes on with 2") == 1


def save_on_a_full_disk(accelerator, folder, rank):
    """Save twice; the second time the given process finds the disk full."""
    model, _, _, progress = parts_of_a_run(accelerator)
    progress.step = 1
    save_checkpoint(accelerator, folder, model, DrmmImageProcessor(), progress, 2)
    if accelerator.process_index == rank:
        accelerator.save_state = mock.Mock(side_effect=OSError(28, "No space left on device"))
    progress.step = 2
    try:
        save_checkpoint(accelerator, folder, model, DrmmImageProcessor(), progress, 2)
    except OSError as error:
        return str(error), find_checkpoint(folder, accelerator).name, sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_in_one_process_ends_all_of_them(both, rank):
    for message, newest, left in both[f"disk full for {rank}"]:
        assert "last' cannot be written: No space left on device. It needs" in message
        assert newest == "last" and left == ["last"]


def lock_and_look(accelerator, folder):
    """Let the first process find that the folder is in use, and that its checkpoint is damaged."""
    messages = []
    with mock.patch.object(files, "_lock", return_value=False):
        try:
            with run_lock(accelerator, folder):
                pass
        except ValueError as error:
            messages.append(str(error))
    found = (None, {"last": "weights are missing"}) if accelerator.is_main_process else None
    with mock.patch.object(checkpoint, "_newest_whole", return_value=found):
        try:
            find_checkpoint(folder, accelerator)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_the_first_process_finds_is_said_in_all(both):
    for in_use, damaged in both["lock and look"]:
        assert "lock and look' is in use by another run: name another folder" in in_use
        assert "holds no whole checkpoint: last (weights are missing)" in damaged


def find_while_one_is_short_of_memory(accelerator, _, **fields):
    """Let more than 2 pictures fit into the first process only."""
    bare = build(**fields)
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters(), fused=True))
    forward = bare.forward

    def limited(pixel_values, *args, **kwargs):
        if len(pixel_values) > 2 and not accelerator.is_main_process:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(pixel_values, *args, **kwargs)

    with mock.patch.object(bare, "forward", limited):
        training = SimpleNamespace(batch_size=2, accumulation_steps=4)
        return find_batch_size(accelerator, bare, optimizer, training, longest_edge=64, most=3)


@pytest.mark.parametrize("head_type", ["mixture", "box"])
def test_the_batch_size_found_is_what_fits_into_every_process(both, head_type):
    """Also where processes exchange a number inside the loss: they would wait for the one that is out of memory."""
    assert both[f"find batch size, {head_type}"] == [(2, 4), (2, 4)]


JOBS = {
    **{way: partial(gradients_of_each, **options) for way, options in WAYS.items()},
    "variants": train_each_variant,
    **{f"evaluate {count}": partial(evaluate_in_parts, count=count) for count in (7, 1)},
    **{f"epoch of {count}": partial(images_of_an_epoch, count=count) for count in (1, 8, 9, 10)},
    "save and load": save_and_load,
    "saved by one": load_in_each,
    **{f"disk full for {rank}": partial(save_on_a_full_disk, rank=rank) for rank in (0, 1)},
    "lock and look": lock_and_look,
    **{f"find batch size, {t}": partial(find_while_one_is_short_of_memory, head_type=t) for t in ("mixture", "box")},
}

if __name__ == "__main__":
    run_in_this_process(Path(sys.argv[2]))
