"""Tiny random detectors in folders, and a tiny COCO folder."""

import json
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

from drmm_hf import DrmmConfig, DrmmForObjectDetection, DrmmImageProcessor


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SIZE = {"shortest_edge": 64, "longest_edge": 96}
NAMES = {0: "round", 1: "square"}


def make_detr():
    config = DetrConfig(
        use_timm_backbone=False,
        backbone=None,
        backbone_config=ResNetConfig(**RESNET, out_features=["stage4"]),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        id2label=NAMES,
    )
    return DetrForObjectDetection(config), DetrImageProcessor(size=SIZE)


def make_drmm():
    config = DrmmConfig(
        backbone_config=ResNetConfig(**RESNET, out_features=["stage1", "stage2", "stage3", "stage4"]),
        num_queries=6,
        proposal_grid=[2, 3],
        num_stages=2,
        hidden_size=16,
        num_attention_heads=2,
        id2label=NAMES,
        category_ids=[3, 8],
    )
    return DrmmForObjectDetection(config), DrmmImageProcessor(size=SIZE)


@pytest.fixture(scope="session", params=[make_detr, make_drmm], ids=["detr", "drmm"])
def model_folder(request, tmp_path_factory):
    """Return the folder of a random detector with its processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    for part in request.param():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drmm_folder(tmp_path_factory):
    """Return the folder of a random D-RMM with its processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("drmm")
    for part in make_drmm():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory):
    """Return a COCO folder with a split of three pictures of two sizes, one of them empty."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "annotations").mkdir()
    (folder / "val").mkdir()
    images, annotations = [], []
    for index in range(3):
        height, width = (60, 80) if index % 2 else (80, 60)
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        name = f"{index}.png"
        Image.fromarray(pixels).save(folder / "val" / name)
        images.append({"id": 10 * index, "file_name": name, "width": width, "height": height})
        if index:
            bbox = [5.0 * index, 8.0, 30.0, 25.0]
            annotations.append({"id": index, "image_id": 10 * index, "category_id": (3, 8)[index - 1], "bbox": bbox})
            annotations[-1] |= {"area": 700.0, "iscrowd": 0}
    categories = [{"id": 3, "name": "round"}, {"id": 8, "name": "square"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return folder


@contextmanager
def run_that_goes_on(folder):
    """Hold the lock of a folder in another process, as a training run does."""
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('process 7', file=file, flush=True); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, str(folder / "run.lock")], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        yield
        other.stdin.close()


@pytest.fixture
def goes_on():
    """Return `run_that_goes_on`."""
    return run_that_goes_on
