"""transformers' own Trainer fine-tunes a checkpoint and measures what `drmm evaluate` measures."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.coco import save_coco
from drmm_hf.data.generated import generate_shapes
from drmm_hf.evaluation.evaluate import evaluate


SCRIPT = Path(__file__).parents[1] / "scripts" / "train_with_trainer.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("train_with_trainer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_trainer_fine_tunes_and_measures(script, tmp_path, capsys):
    torch.manual_seed(0)
    splits = {"train": generate_shapes(6, 0, (64, 64)), "val": generate_shapes(5, 1, (64, 64))}
    for split, dataset in splits.items():
        save_coco(dataset, tmp_path / "shapes", split)
    size = {"shortest_edge": 64, "longest_edge": 64}
    DrmmForObjectDetection(tiny_config(num_labels=5, box_delta_unit="box")).save_pretrained(tmp_path / "start")
    DrmmImageProcessor(size=size).save_pretrained(tmp_path / "start")
    options = {"--init-from": tmp_path / "start", "--data": tmp_path / "shapes", "--output": tmp_path / "run"}
    options |= {"--epochs": 2, "--batch-size": 2, "--shortest-edge": 64, "--longest-edge": 64}
    figures = script.main([str(part) for option in options.items() for part in option])
    state = json.loads((next((tmp_path / "run").glob("checkpoint-6")) / "trainer_state.json").read_text())
    assert [row["epoch"] for row in state["log_history"] if "eval_AP" in row] == [1.0, 2.0]

    model = DrmmForObjectDetection.from_pretrained(tmp_path / "run")
    processor = DrmmImageProcessor.from_pretrained(tmp_path / "run")
    annotations = tmp_path / "shapes" / "annotations" / "instances_val.json"
    expected = evaluate(model, processor, splits["val"], annotations)
    assert model.config.category_ids == [2, 3, 7]
    assert {name: figures[f"eval_{name}"] for name in ("AP", "AP50", "ECE")} == pytest.approx(
        {name: expected[name] for name in ("AP", "AP50", "ECE")}, abs=1e-6
    )


def test_the_trainer_takes_the_loss_as_it_is(tmp_path):
    model = DrmmForObjectDetection(tiny_config()).eval()
    batch = {
        "pixel_values": torch.randn(2, 3, 64, 64),
        "labels": [
            {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])},
            {"class_labels": torch.tensor([], dtype=torch.int64), "boxes": torch.zeros(0, 4)},
        ],
    }
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    expected = model(**batch).loss
    for num_items in (None, 1, torch.tensor(7)):
        assert torch.equal(trainer.compute_loss(model, dict(batch), num_items_in_batch=num_items), expected)
