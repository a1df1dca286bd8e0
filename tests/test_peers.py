"""Peers see the pictures, boxes and classes of the annotations, train for the time that is counted, and are drawn."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import peers  # noqa: E402

from drmm_hf import DrmmConfig, DrmmImageProcessor  # noqa: E402
from drmm_hf.modeling.backbone import DrmmBackbone  # noqa: E402
from drmm_hf.training.loop import train  # noqa: E402


TINY = ROOT / "tests" / "training" / "tiny.yaml"
BACKBONE = {
    **{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4},
    **{"layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"]},
}
# Sizes (height, width) that are resized to 96 and 72 pixels of height and padded to 96 x 160 together; xywh, class.
PICTURES = [
    (200, 300, [([30.0, 20.0, 60.0, 80.0], 0), ([150.0, 100.0, 90.0, 50.0], 2)]),
    (150, 300, [([0.0, 0.0, 300.0, 150.0], 1)]),
]


def run(tmp_path, name, *options):
    fields = ["--accumulation-steps", "1", "--ema-decay", "0.9", "--image-size", "[96, 128]", "--shortest-edge", "96"]
    fields += ["--longest-edge", "128", "--num-train-images", "3", "--recipe", str(TINY), "--backbone-weights", "none"]
    peers.main([name, *fields, "--output", str(tmp_path / "run"), *options])
    return tmp_path / "run"


@pytest.fixture
def make_peer():
    def make(name):
        torch.manual_seed(0)
        return peers.BUILDERS[name](DrmmBackbone(DrmmConfig(backbone_config=BACKBONE)), 3)

    return make


@pytest.fixture
def processor():
    return DrmmImageProcessor(size={"shortest_edge": 96, "longest_edge": 144})


class Repeater(torch.nn.Module):
    """A detector that keeps what it is given to learn, and then detects just that."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config

    def forward(self, images=None, targets=None, pixel_values=None, pixel_mask=None, labels=None):
        if targets is not None:  # torchvision's way
            self.images, self.targets = images, targets
            return {"loss": torch.zeros(())}
        if labels is not None:  # transformers' way
            self.targets = labels
            return SimpleNamespace(loss=torch.zeros(()))
        first = self.targets.pop(0)
        if images is not None:
            return [{**first, "scores": torch.ones(len(first["boxes"]))}]
        logits = torch.where(torch.nn.functional.one_hot(first["class_labels"], 3) > 0, 9.0, -9.0)
        return SimpleNamespace(logits=logits[None], pred_boxes=first["boxes"][None])


@pytest.mark.parametrize("name", peers.BUILDERS)
def test_what_is_learnt_is_what_is_annotated(make_peer, processor, name):
    peer = make_peer(name)
    repeater = peer.detector = Repeater(SimpleNamespace(two_stage=False))
    images = [torch.randint(256, (3, height, width), dtype=torch.uint8) for height, width, _ in PICTURES]
    annotations = [
        {"image_id": number, "annotations": [{"bbox": box, "category_id": label} for box, label in objects]}
        for number, (_, _, objects) in enumerate(PICTURES)
    ]
    batch = processor(images=images, annotations=annotations, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 96, 160) and batch["pixel_mask"][:, :, 0].sum(1).tolist() == [96, 72]
    peer(batch)
    for number, (height, width, objects) in enumerate(PICTURES):
        # A picture of the batch as it lies there: what is padding around it is the same, learnt or detected.
        inputs = {key: batch[key][number : number + 1] for key in ("pixel_values", "pixel_mask")}
        (found,) = peer.detect(inputs, [(height, width)])
        expected = {label: [x, y, x + w, y + h] for (x, y, w, h), label in objects}
        assert sorted(found["labels"][found["scores"] > 0.5].tolist()) == sorted(expected)
        for label, box, score in zip(found["labels"].tolist(), found["boxes"], found["scores"], strict=True):
            if score > 0.5:
                assert box.tolist() == pytest.approx(expected[label], abs=1e-3)
    if name in ("faster_rcnn", "fcos"):
        assert [image.shape[1:] for image in repeater.images] == [(96, 144), (72, 144)]


@pytest.mark.parametrize(("name", "background"), [("faster_rcnn", 1), ("fcos", 0)])
def test_torchvision_gets_pixels_as_they_are_and_its_own_labels(make_peer, processor, name, background):
    peer = make_peer(name)
    image = torch.randint(256, (3, 96, 144), dtype=torch.uint8)
    annotation = {"image_id": 0, "annotations": [{"bbox": [12.0, 24.0, 36.0, 48.0], "category_id": 2}]}
    batch = processor(images=[image], annotations=[annotation], return_tensors="pt")
    seen = {}
    peer.detector.backbone.register_forward_pre_hook(lambda _, inputs: seen.update(pixels=inputs[0]))
    transform = peer.detector.transform.forward
    peer.detector.transform.forward = lambda images, targets: (
        seen.update(targets=targets) or transform(images, targets)
    )
    peer.train()(batch)
    assert torch.equal(seen["pixels"], batch["pixel_values"])  # not normalised again, not resized
    assert seen["targets"][0]["labels"].tolist() == [2 + background]
    assert seen["targets"][0]["boxes"][0].tolist() == pytest.approx([12, 24, 48, 72], abs=1e-4)
    peer.eval()
    with torch.no_grad():
        (found,) = peer.detect({key: batch[key] for key in ("pixel_values", "pixel_mask")}, [(96, 144)])
    assert torch.equal(seen["pixels"], batch["pixel_values"])
    assert set(found["labels"].tolist()) <= {0, 1, 2} and len(found["labels"]) <= peers.TOP_K


@pytest.mark.parametrize("name", ["faster_rcnn", "fcos"])
def test_autocast_rounds_no_box_of_torchvision(make_peer, processor, name):
    peer = make_peer(name).eval()
    image = torch.randint(256, (3, 96, 416), dtype=torch.uint8)
    batch = processor(images=[image], do_resize=False, return_tensors="pt")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = peer.detect(batch, [(96, 416)])
    inside = found["boxes"][(found["boxes"] > 1).all(1) & (found["boxes"][:, 2] < 415) & (found["boxes"][:, 3] < 95)]
    assert len(inside) > 10 and found["boxes"].dtype == torch.float32
    assert (inside != inside.bfloat16().float()).any(1).float().mean() > 0.9


@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2"])
def test_detrs_start_as_published_and_train_all_of_their_parts(make_peer, processor, name):
    peer = make_peer(name).train()
    detector = peer.detector
    norms = [module for module in detector.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(module.weight.eq(1).all() for module in norms if module.weight.requires_grad)
    attention = [module for module in detector.modules() if hasattr(module, "sampling_offsets")]
    assert attention and all(m.sampling_offsets.weight.eq(0).all() for m in attention)
    assert all(m.sampling_offsets.bias.abs().max() > 0 for m in attention)
    assert all(head.bias.sigmoid().tolist() == pytest.approx([0.01] * 3) for head in detector.class_embed)
    image = torch.randint(256, (3, 96, 144), dtype=torch.uint8)
    annotation = {"image_id": 0, "annotations": [{"bbox": [12.0, 24.0, 36.0, 48.0], "category_id": 2}]}
    peer(processor(images=[image], annotations=[annotation], return_tensors="pt")).backward()
    first_stage = detector.class_embed[-1] if name == "deformable_detr" else detector.model.enc_score_head
    assert first_stage.weight.grad.abs().sum() > 0
    trained = [parameter for parameter in peer.backbone.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("name", peers.BUILDERS)
def test_a_run_leaves_its_figures(tmp_path, name):
    output = run(tmp_path, name, "--max-steps", "2", "--evaluations", "2", "--learning-rate", "1e-4")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["images"] for line in lines] == [2, 3]  # three pictures in batches of two: none is dropped
    assert all(0 < line["minutes"] < 5 and line["loss"] > 0 and "ECE" in line for line in lines)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["peer"] == name and metrics["training"]["learning_rate"] == 1e-4
    assert metrics["parameters"]["all"] >= metrics["parameters"]["trained"] > 0
    assert set(metrics["test"]) >= {"AP", "AP50", "AP75", "AR100"} and metrics["best"]["step"] in (1, 2)
    assert isinstance(json.loads((output / "test" / "detections.json").read_text()), list)
    assert torch.load(output / "best.pt")
    with pytest.raises(ValueError, match="must be new or empty"):
        run(tmp_path, name, "--max-steps", "1")


def test_the_loop_is_that_of_drmm_train(tmp_path):
    output = run(tmp_path, "drmm", "--max-steps", "4", "--evaluations", "4", "--dropout", "0.1")
    theirs = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    fields = {"accumulation_steps": 1, "ema_decay": 0.9, "image_size": [96, 128], "shortest_edge": 96}
    fields |= {"longest_edge": 128, "num_train_images": 3, "backbone_weights": "none", "max_steps": 4, "epochs": None}
    train(peers.load_recipe(TINY, fields | {"output_dir": str(tmp_path / "trained"), "evaluate_every": 1}))
    ours = peers.read_log(tmp_path / "trained" / "log.jsonl")
    losses = [line["loss"] for line in ours if "loss" in line]
    assert [line["loss"] for line in theirs] == pytest.approx(losses, rel=1e-5)
    evaluations = {line["step"]: line for line in ours if "AP" in line}
    assert set(evaluations) == {2, 4}
    for line in theirs:
        for name in ("AP", "AR100", "ECE") if line["step"] in evaluations else ():
            assert line[name] == pytest.approx(evaluations[line["step"]][name], rel=1e-4)


def test_minutes_are_processor_time_of_steps_alone(tmp_path, monkeypatch):
    used = iter(range(0, 10_000, 6))  # each reading of the clock is 6 seconds after the one before
    monkeypatch.setattr(peers, "processor_seconds", lambda: next(used))
    output = run(tmp_path, "fcos", "--max-minutes", "0.4", "--evaluations", "2")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["minutes"]) for line in lines] == [(2, 0.2), (4, 0.4)]


def test_what_a_peer_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="accumulation_steps is 2"):
        peers.run("fcos", peers.load_recipe(TINY, {"output_dir": str(tmp_path)}), 1)
    with pytest.raises(ValueError, match="evaluations is 0"):
        run(tmp_path, "fcos", "--max-steps", "1", "--evaluations", "0")


def test_evaluations_of_drmm_train_are_taken_off_its_clock(tmp_path, capsys):
    ours, theirs = tmp_path / "ours" / "seed0", tmp_path / "theirs"
    lines = [
        {"step": 5, "seconds": 60.0, "loss": 1.0},
        {"step": 10, "seconds": 120.0, "loss": 1.0},
        {"step": 10, "seconds": 150.0, "AP": 0.2},
        {"step": 20, "seconds": 270.0, "loss": 1.0},
        {"step": 20, "seconds": 300.0, "AP": 0.4},
    ]
    for folder, content in ((ours, lines), (theirs, [{"step": 3, "minutes": 1.5, "AP": 0.1}])):
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    assert peers.curve(ours) == ([(2.0, 0.2), (4.0, 0.4)], "wall clock")
    assert peers.curve(theirs) == ([(1.5, 0.1)], "processor")
    peers.main(["draw", str(ours), str(theirs), "--output", str(tmp_path / "time.png")])
    assert (tmp_path / "time.png").stat().st_size > 1000
    assert f"{ours}: 4.00 minutes of training (wall clock), best AP 0.4000" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no log.jsonl with evaluations"):
        peers.curve(tmp_path)
