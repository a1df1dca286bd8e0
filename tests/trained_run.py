"""What a training run leaves of a tiny detector, and an evaluation of it; places of somebody's machine in both."""

import json
import shlex

import numpy as np
import torch
from PIL import Image

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.labels import LabelMap
from drmm_hf.evaluation.detections import Detections
from drmm_hf.evaluation.evaluate import measure
from drmm_hf.evaluation.origin import annotations_digest
from drmm_hf.training.arguments import dump_yaml


HOME = "/home/jane"
HOST = "server7.example"
NAMES = {0: "round", 1: "/m/01g317", 2: "a|b"}
SIZE = {"shortest_edge": 48, "longest_edge": 64}
DETECTOR = {
    "sparse_rcnn": {},
    "adamixer": {
        "decoder_type": "adamixer",
        "neck_type": "channel_mapping",
        "hidden_size": 32,
        "num_sampling_groups": 2,
        "num_sampling_points": 4,
        "num_mixing_points": 4,
    },
}


def make_run(run, decoder="sparse_rcnn", **fields):
    """Write what a training run leaves: the model with what is not to be published, and its records."""
    torch.manual_seed(0)
    model = DrmmForObjectDetection(tiny_config(id2label=NAMES, **DETECTOR[decoder], **fields)).eval()
    best = run / "best"
    for part in (model, DrmmImageProcessor(size=SIZE)):
        part.save_pretrained(best)
    (best / "model.raw.safetensors").write_bytes((best / "model.safetensors").read_bytes())
    (best / "training_state").mkdir()
    (best / "training_state" / "optimizer.bin").write_bytes(b"state")
    (run / "run.lock").write_text(f"process 7 on {HOST}\n")
    data = {"source": f"{HOME}/data/cells", "val_split": "val", "holdout": None, "overfit": None}
    training = {"output_dir": str(run), "backbone_weights": f"{HOME}/w.safetensors", "batch_size": 8, "seed": 0}
    training |= {"mixed_precision": "no"}
    (run / "recipe.yaml").write_text(dump_yaml({"model": {}, "data": data, "training": training}))
    command = ["drmm", "train", f"{HOME}/r.yaml", "--data", f"{HOME}/data/cells", f"--tracker=http://jane@{HOST}/t"]
    record = {"started": "2026-11-28T14:08:50+00:00", "command": shlex.join(command), "working_directory": HOME}
    record |= {"versions": {"torch": "2.14.1"}, "data": {"train": {"num_images": 205, "num_objects": 2804}}}
    (run / "manifest.json").write_text(json.dumps([record]))
    (run / "summary.json").write_text(json.dumps({"steps": 1536, "training_seconds": 3314.9, "device": "cpu"}))
    return best


def make_evaluation(folder, model, /, split="test", **changes):
    """Write an evaluation of three detections, two of them right, as `drmm evaluate` does."""
    categories = [{"id": label, "name": name} for label, name in NAMES.items()]
    boxes = {0: [10.0, 10.0, 40.0, 40.0], 1: [60.0, 20.0, 100.0, 90.0]}
    annotations = {
        "images": [{"id": 1, "file_name": "1.png", "width": 200, "height": 150}],
        "annotations": [
            {"id": label, "image_id": 1, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for label, box in boxes.items()
        ],
        "categories": categories,
    }
    entries = [
        {"image_id": 1, "category_id": label, "bbox": box, "score": 0.9 - 0.2 * label} for label, box in boxes.items()
    ]
    entries.append({"image_id": 1, "category_id": 2, "bbox": [1.0, 1.0, 9.0, 9.0], "score": 0.4})
    detections = Detections.from_coco(entries, LabelMap.from_categories(categories), [1])
    metrics = measure(detections, annotations, {label: label for label in NAMES}, folder)
    about = {"model": model and str(model), "data": f"{HOME}/data/cells", "split": split, "top_k_ratio": None}
    about |= {"top_k": 100, "dtype": None, "weights": None, "input": None}
    about |= {"annotations": None, "ground_truth": annotations_digest(annotations), "step": None}
    about |= {name: changes.pop(name) for name in [*changes] if name in about}
    if split is not None:  # otherwise they are the run's own
        (folder / "evaluation.json").write_text(json.dumps(about))
    if changes:
        (folder / "metrics.json").write_text(json.dumps(metrics | changes))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "detections.jpg")
    return metrics | changes
