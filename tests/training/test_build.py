import copy
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import drmm_hf
from drmm_hf.data.coco import categories, save_coco
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.labels import LabelMap
from drmm_hf.training.arguments import TrainingArguments
from drmm_hf.training.build import build_model, check_pretrained, load_split
from drmm_hf.training.loop import train
from drmm_hf.training.presets import choose_recipe
from drmm_hf.training.stop_request import _kill_children


def test_a_checkpoint_of_another_head_is_checked_as_a_whole(tiny_recipe, tmp_path, capsys):
    recipe = tiny_recipe()
    label_map = LabelMap.from_categories(categories(load_split(recipe.data, "train")[0]))
    options = {"head_type": "box", "box_delta_unit": "pixels", "num_query_groups": 2}
    for part in build_model(tiny_recipe(**options), label_map):
        part.save_pretrained(tmp_path)
    options["num_query_groups"] = 1
    single, _ = build_model(tiny_recipe(init_from=str(tmp_path), **options), label_map)
    assert single.config.head_type == "box" and single.config.criterion == "focal_l1_giou"
    assert "starts afresh: model.queries.boxes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="num_query_groups=2 must be 1 unless head_type"):
        build_model(tiny_recipe(init_from=str(tmp_path), head_type="mixture"), label_map)


def test_a_checkpoint_of_other_classes_lends_everything_but_the_classifier(tiny_recipe, tmp_path):
    shapes = LabelMap((2, 3, 7), ("ellipse", "rectangle", "triangle"))
    cells = LabelMap((5, 6), ("red", "white"))
    model, processor = build_model(tiny_recipe(), shapes)
    processor.image_mean = [0.1, 0.2, 0.3]
    processor.calibration, processor.score_threshold = {"scale_factor": 2.0}, 0.3  # hold for those weights only
    model.save_pretrained(tmp_path / "shapes")
    processor.save_pretrained(tmp_path / "shapes")
    recipe = tiny_recipe(init_from=str(tmp_path / "shapes"), shortest_edge=48)
    settings = tmp_path / "shapes" / "preprocessor_config.json"
    whole = settings.read_text()
    settings.write_text("[]")
    with pytest.raises(ValueError, match="init_from is .*, whose preprocessor_config.json does not hold the settings"):
        build_model(recipe, cells)
    settings.write_text(whole)
    swapped, processor = build_model(recipe, cells)
    assert swapped.config.id2label == {0: "red", 1: "white"}
    assert swapped.config.category_ids == [5, 6]
    assert (list(processor.image_mean), dict(processor.size)["shortest_edge"]) == ([0.1, 0.2, 0.3], 48)
    assert processor.calibration is None and processor.score_threshold is None
    before, after = model.state_dict(), swapped.state_dict()
    replaced = {name for name in after if after[name].shape != before[name].shape}
    assert {name.split(".")[-2] for name in replaced} == {"classifier"}
    assert all(torch.equal(after[name], before[name]) for name in after if name not in replaced)


@pytest.mark.parametrize(
    ("argument", "name", "has_recipe"),
    [
        ("init_from", "nobody/nothing", True),
        ("init_from", "nobody/nothing", False),
        ("backbone_weights", "nobody/nothing", True),
        ("backbone_weights", "timm/resnet50.a1_in1k", True),
        ("backbone_weights", "tf_efficientnet_lite0", True),
    ],
)
def test_a_hub_that_cannot_be_reached_is_asked_once_before_the_work(
    argument, name, has_recipe, tiny_recipe, tmp_path, monkeypatch
):
    """A download would ask six times, with pauses of 24 seconds together; port 1 refuses every connection."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    address = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"a pause of {seconds} s"))
    monkeypatch.setattr("drmm_hf.training.loop.load_split", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(
        ValueError, match=f"^{argument} is '{name}', which is no folder here, and the Hub cannot be re"
    ):
        if has_recipe:
            train(tiny_recipe(output_dir=str(tmp_path / "run"), **{argument: name}))
        else:
            choose_recipe("generated", {argument: name, "max_steps": 1})


def test_of_the_hub_s_cache_and_of_files_nothing_is_asked(tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"")
    asked = []
    monkeypatch.setattr("drmm_hf.evaluation.predict.get_hf_file_metadata", asked.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = tmp_path / "models--timm--tf_efficientnet_lite0.in1k" / "snapshots" / "abc"
    commit.mkdir(parents=True)
    (commit / "model.safetensors").write_bytes(b"")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("abc")
    for source in (None, "none", str(weights), "tf_efficientnet_lite0", "timm/tf_efficientnet_lite0.in1k"):
        check_pretrained(TrainingArguments(max_steps=1, backbone_weights=source))
    assert not asked
    check_pretrained(TrainingArguments(max_steps=1, backbone_weights="resnet50"))
    assert len(asked) == 1 and "timm/resnet50.a1_in1k/resolve/main/config.json" in asked[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_pretrained(TrainingArguments(max_steps=1, backbone_weights="tf_efficientnet_lite0"))
    for wanted in ({"backbone_weights": "resnet18"}, {"init_from": "nobody/nothing"}):
        ((argument, name),) = wanted.items()
        with pytest.raises(ValueError, match=f"^{argument} is '{name}', .* and HF_HUB_OFFLINE forbids to ask it$"):
            check_pretrained(TrainingArguments(max_steps=1, **wanted))
    assert len(asked) == 1


def test_splits_are_read_from_a_folder_with_their_untouched_annotations(tiny_recipe, tmp_path):
    for split, seed in (("train", 3), ("test", 4)):
        save_coco(generate_shapes(4, seed, (64, 64)), tmp_path / "shapes", split)
    file = tmp_path / "shapes" / "annotations" / "instances_test.json"
    content = json.loads(file.read_text())
    content["info"] = {"note": "untouched"}
    file.write_text(json.dumps(content))
    data = tiny_recipe(source=str(tmp_path / "shapes"), val_split="test").data
    assert len(load_split(data, "train")[0]) == 4
    dataset, annotations = load_split(data, "val")
    assert annotations == content
    pair = copy.copy(data)
    pair.source, pair.val_annotations, pair.val_images = None, str(file), str(tmp_path / "shapes" / "test")
    assert load_split(pair, "val")[0].to_dict() == dataset.to_dict()
    with pytest.raises(ValueError, match="no train data"):
        load_split(pair, "train")


def test_overfitting_takes_the_first_rich_pictures_for_both_splits(tiny_recipe, tmp_path):
    shapes = generate_shapes(30, 3, (64, 64))
    save_coco(shapes, tmp_path / "shapes", "train")
    data = tiny_recipe(source=str(tmp_path / "shapes"), overfit=4).data
    rich = sorted(row["image_id"] for row in shapes if len(row["objects"]) >= 5)
    assert 4 < len(rich) < 30
    for split in ("train", "val"):
        dataset, annotations = load_split(data, split)
        assert dataset["image_id"] == rich[:4] == [image["id"] for image in annotations["images"]]
    data.overfit = len(rich) + 1
    with pytest.raises(ValueError, match=f"overfit is {len(rich) + 1}, but only {len(rich)} pictures"):
        load_split(data, "val")


def test_children_that_are_ended_report_no_error():
    """torch's loader turns the end of a worker into an error, in the middle of whatever is being said."""
    reported, before = [], signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, lambda *_: reported.append("ended"))
    try:
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        child.start()
        _kill_children()
        child.join()
        assert child.exitcode == -signal.SIGKILL and not reported
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_process_that_fails_in_the_middle_of_an_epoch_ends(tmp_path):
    """Its workers ignore the signal that Python ends them with, and it would wait for them."""
    script = """
        import sys
        from drmm_hf.data.coco import categories
        from drmm_hf.data.labels import LabelMap
        from drmm_hf.modeling.image_processing_drmm import DrmmImageProcessor
        from drmm_hf.training.arguments import load_recipe
        from drmm_hf.training.build import load_split, training_loader

        recipe = load_recipe(sys.argv[1], {"num_workers": 1})
        dataset, _ = load_split(recipe.data, "train")
        loader = training_loader(dataset, LabelMap.from_categories(categories(dataset)), DrmmImageProcessor(), recipe)
        batches = iter(loader)  # kept until the end
        next(batches)
        raise ValueError("in the middle")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parent / "tiny.yaml")]
    environment = os.environ | {"PYTHONPATH": str(Path(drmm_hf.__file__).parents[1])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "ValueError: in the middle"
