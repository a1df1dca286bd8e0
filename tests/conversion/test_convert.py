import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from conftest import random_pictures, tiny_resnet
from conversion.conftest import KINDS, detectron2_weights, mmdetection_weights, tiny_detector, tiny_swin
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.conversion.convert import convert_checkpoint


HEADS = {"num_attention_heads": 2}
CLASSES = ("round", "square", "star")


def converted(content, folder, **options):
    """Write a checkpoint, convert it and load what came out."""
    torch.save(content, folder / "public.pth")
    report = convert_checkpoint(folder / "public.pth", folder / "out", **({"fields": HEADS} | options))
    return DrmmForObjectDetection.from_pretrained(folder / "out").eval(), report


def check_same(model, detector, tolerance=0.0):
    with torch.no_grad():
        ours, theirs = model(random_pictures()), detector(random_pictures())
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make_backbone", [tiny_resnet, tiny_swin], ids=["resnet", "swin"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_checkpoint_of_the_mmdetection_family_becomes_the_same_detector(kind, make_backbone, tmp_path):
    resnet = make_backbone is tiny_resnet
    detector = tiny_detector(*kind, backbone_config=make_backbone(), freeze_backbone_stages=int(resnet))
    public = mmdetection_weights(detector)
    content = {"state_dict": public, "meta": {"CLASSES": CLASSES}, "optimizer": {"state": {0: torch.ones(1)}}}
    model, report = converted(content, tmp_path)
    check_same(model, detector)
    sizes = ["num_sampling_groups", "num_mixing_points"] if kind[0] == "adamixer" else ["dynamic_size", "roi_size"]
    for name in ("decoder_type", "head_type", "criterion", "num_queries", "freeze_backbone_stages", *sizes):
        assert getattr(model.config, name) == getattr(detector.config, name)
    assert model.config.max_log_size_delta == pytest.approx(math.log(1000 / 16))
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.config.category_ids is None

    assert report.mapped.keys() | report.dropped.keys() == public.keys() | {"optimizer"}
    index = {name for name in public if name.endswith("relative_position_index")}
    assert len(index) == (0 if resnet else 8)
    assert report.dropped.keys() == index | {"optimizer"} and all(report.dropped.values())
    ours = [name for names in report.mapped.values() for name in names]
    assert sorted([*ours, *report.added]) == sorted(model.model.state_dict())
    assert len(report.added) == (0 if resnet else 2)


def test_the_folder_is_a_normal_one_with_report_and_card(tmp_path):
    detector = tiny_detector("sparse_rcnn", "mixture")
    _, report = converted({"state_dict": mmdetection_weights(detector)}, tmp_path)
    folder = tmp_path / "out"
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "conversion.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert not [path for path in tmp_path.iterdir() if path.name not in ("out", "public.pth")]
    written = json.loads((folder / "conversion.json").read_text())
    assert written["mapped"] == report.mapped and written["settings"] == HEADS and written["assumed"] == {}
    assert written["sha256"] == hashlib.sha256((tmp_path / "public.pth").read_bytes()).hexdigest()
    assert written["sha256"] in (folder / "README.md").read_text()
    processor = DrmmImageProcessor.from_pretrained(folder)
    assert (
        list(processor.image_mean) == DrmmImageProcessor.image_mean
        and list(processor.image_std) == DrmmImageProcessor.image_std
    )
    assert "give them with --labels" in str(report) and "D-RMM on Sparse R-CNN, ResNet" in str(report)


def test_a_checkpoint_of_the_detectron2_family_becomes_the_same_detector(tmp_path):
    detector = tiny_detector("sparse_rcnn", "box", max_log_size_delta=8.740336742730447)
    public = detectron2_weights(detector)
    public |= {"pixel_mean": torch.tensor([[[123.675]], [[116.28]], [[103.53]]])}
    model, report = converted({"model": public, "iteration": 89999}, tmp_path)
    check_same(model, detector)
    assert model.config.max_log_size_delta == detector.config.max_log_size_delta
    assert report.family == "detectron2" and report.dropped["pixel_mean"] == "in the image processor"
    assert report.added and all(name.endswith("num_batches_tracked") for name in report.added)
    assert any("counter" in line for line in str(report).splitlines())


def test_safetensors_and_a_wrapper_s_prefix(tmp_path):
    detector = tiny_detector("adamixer", "box")
    weights = {f"module.{name}": value for name, value in mmdetection_weights(detector).items()}
    save_file(weights, tmp_path / "public.safetensors")
    report = convert_checkpoint(tmp_path / "public.safetensors", tmp_path / "out")
    check_same(DrmmForObjectDetection.from_pretrained(tmp_path / "out").eval(), detector)
    assert report.assumed == {}  # AdaMixer has a number for each head of attention


def test_the_training_configuration_in_the_file_is_heard(tmp_path):
    detector = tiny_detector("sparse_rcnn", "mixture", top_k_ratio=0.7, min_scale_ratio=0.1)
    text = "backbone = dict(style='pytorch', num_heads=[3, 6])\n"
    text += "head = [dict(num_heads=2, top_k_ratio=0.7, min_sc_ratio=0.1)]\n"
    text += "img_norm_cfg = dict(mean=[127.5, 127.5, 102.0], std=[51.0, 51.0, 51.0], to_rgb=True)"
    content = {"state_dict": mmdetection_weights(detector), "meta": {"config": text}}
    model, report = converted(content, tmp_path, fields=None)
    assert report.settings == {"num_attention_heads": 2, "top_k_ratio": 0.7, "min_scale_ratio": 0.1}
    check_same(model, detector)
    processor = DrmmImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == [0.5, 0.5, 0.4] and list(processor.image_std) == [0.2, 0.2, 0.2]
    for setting in ("style='caffe'", "to_rgb=False", "bgr_to_rgb=False"):
        content["meta"]["config"] = f"model = dict({setting})"
        torch.save(content, tmp_path / "refused.pth")
        with pytest.raises(ValueError, match=f"trained with {setting}"):
            convert_checkpoint(tmp_path / "refused.pth", tmp_path / "refused")


def test_given_names_of_classes_go_before_those_in_the_file(tmp_path):
    (tmp_path / "names.txt").write_text("eins\nzwei\ndrei\n")
    content = {"state_dict": mmdetection_weights(tiny_detector("sparse_rcnn", "box")), "meta": {"CLASSES": CLASSES}}
    model, report = converted(content, tmp_path, labels=tmp_path / "names.txt")
    assert list(model.config.id2label.values()) == ["eins", "zwei", "drei"] and report.class_names == "option"


def test_what_nothing_tells_is_assumed_and_said(tmp_path):
    detector = tiny_detector("sparse_rcnn", "mixture", num_attention_heads=8)
    model, report = converted({"state_dict": mmdetection_weights(detector)}, tmp_path, fields=None)
    check_same(model, detector)
    assert report.assumed == {"num_attention_heads": 8}
    assert "--num-attention-heads" in str(report)


def without(weights, part):
    return {name: value for name, value in weights.items() if part not in name}


def shorter(weights, part):
    return {name: value[:-1] if part in name else value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda w: w | {"roi_head.mask_head.weight": torch.ones(1)},
            "no pattern fits 1 of .*: 'roi_head.mask_head",
        ),
        (lambda w: w | {"ema_other": torch.ones(1)}, "no pattern fits 1 of .* names: 'ema_other'"),
        (
            lambda w: w | {"roi_head.bbox_head.0.cls_fcs.0.bias": torch.ones(32)},
            "tensors left over: 'decoder.layers.0.head.class_branch.0.bias'",
        ),
        (
            lambda w: without(w, "stages.1.blocks.0.norm2.bias"),
            "tensors missing: .*layernorm_after.bias'.$",
        ),
        (
            lambda w: shorter(w, "bbox_head.1.ffn_norm"),
            "another shape or type than the rest implies: .*layers.1.stage.feed_forward_norm.bias', .*weight'.$",
        ),
        (
            lambda w: {n: v + 1 if "1.attn.w_msa.relative_position_index" in n else v for n, v in w.items()},
            "other than what the model computes: .*",
        ),
        (
            lambda w: w | {"roi_head.bbox_head.0.ffn_norm.bias": torch.ones(32, dtype=torch.complex64)},
            "another shape or type than the rest implies: 'decoder.layers.0.stage.feed_forward_norm.bias'.$",
        ),
        (
            lambda w: w | {"roi_head.bbox_head.0.ffn_norm.bias": torch.full((32,), torch.nan)},
            "public.pth: .*tensors not finite: 'decoder.layers.0.stage.feed_forward_norm.bias'.$",
        ),
        (
            lambda w: w | {"backbone.norm9.weight": torch.ones(1)},
            "no pattern fits 1 of .*: 'backbone.norm9",
        ),
    ],
    ids=[
        "extra",
        "stray average",
        "left over",
        "missing",
        "shape",
        "other positions",
        "complex",
        "nan",
        "other backbone",
    ],
)
def test_anything_unexplained_is_an_error_and_writes_nothing(damage, words, tmp_path):
    weights = mmdetection_weights(tiny_detector("sparse_rcnn", "box", backbone_config=tiny_swin()))
    torch.save({"state_dict": damage(weights)}, tmp_path / "public.pth")
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(tmp_path / "public.pth", tmp_path / "out", fields=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["public.pth"]


def test_other_pixels_and_unknown_fields_are_errors(tmp_path):
    public = detectron2_weights(tiny_detector("sparse_rcnn", "box"))
    torch.save({"model": public | {"pixel_mean": torch.tensor([103.53, 116.28, 123.675])}}, tmp_path / "bgr.pth")
    with pytest.raises(ValueError, match="pixel_mean is .*only RGB pictures"):
        convert_checkpoint(tmp_path / "bgr.pth", tmp_path / "out")
    torch.save(public, tmp_path / "public.pth")
    with pytest.raises(ValueError, match="num_attention_head"):
        convert_checkpoint(tmp_path / "public.pth", tmp_path / "out", fields={"num_attention_head": 2})
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert_checkpoint(tmp_path / "public.pth", tmp_path / "out", fields={"num_attention_heads": "two"})


def test_nothing_is_left_of_a_conversion_that_fails_while_writing(tmp_path, monkeypatch):
    weights = mmdetection_weights(tiny_detector("sparse_rcnn", "box"))
    torch.save(weights, tmp_path / "public.pth")

    def fail(*args, **kwargs):
        raise OSError("disk is full")

    monkeypatch.setattr(DrmmImageProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk is full"):
        convert_checkpoint(tmp_path / "public.pth", tmp_path / "out", fields=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["public.pth"]


def test_a_folder_that_holds_something_is_not_touched(tmp_path):
    torch.save(mmdetection_weights(tiny_detector("sparse_rcnn", "box")), tmp_path / "public.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out' exists"):
        convert_checkpoint(tmp_path / "public.pth", tmp_path / "out", fields=HEADS)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out" / "mine.txt").unlink()
    convert_checkpoint(tmp_path / "public.pth", tmp_path / "out", fields=HEADS)
    assert (tmp_path / "out" / "config.json").is_file()


def test_links_are_followed_and_stay(tmp_path):
    torch.save(mmdetection_weights(tiny_detector("sparse_rcnn", "box")), tmp_path / "public.pth")
    (tmp_path / "empty").mkdir()
    for link, target in (("link", "empty"), ("dangling", "new"), ("loop", "loop")):
        (tmp_path / link).symlink_to(tmp_path / target)
    for link, target in (("link", "empty"), ("dangling", "new")):
        convert_checkpoint(tmp_path / "public.pth", tmp_path / link, fields=HEADS)
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "config.json").is_file()
    with pytest.raises(FileExistsError, match="loop' exists"):
        convert_checkpoint(tmp_path / "public.pth", tmp_path / "loop", fields=HEADS)


@pytest.mark.parametrize("made_before", [False, True])
def test_of_two_conversions_into_one_folder_the_first_to_end_stays(made_before, tmp_path, monkeypatch):
    torch.save(mmdetection_weights(tiny_detector("sparse_rcnn", "box")), tmp_path / "public.pth")
    output = tmp_path / "out"
    if made_before:
        output.mkdir()

    def other_process(*args):
        output.mkdir(exist_ok=True)
        (output / "theirs").write_text("theirs")
        return "card"

    monkeypatch.setattr("drmm_hf.conversion.convert.model_card", other_process)
    with pytest.raises(FileExistsError, match="out' was filled by another process"):
        convert_checkpoint(tmp_path / "public.pth", output, fields=HEADS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "public.pth"]
    assert [path.name for path in output.iterdir()] == ["theirs"]


@pytest.mark.parametrize("name", ["num_labels", "id2label", "label2id"])
def test_classes_are_not_set_as_fields(name, tmp_path):
    torch.save(mmdetection_weights(tiny_detector("sparse_rcnn", "box")), tmp_path / "public.pth")
    with pytest.raises(ValueError, match=f"field '{name}' is the checkpoint's: .* --labels"):
        convert_checkpoint(tmp_path / "public.pth", tmp_path / "out", fields=HEADS | {name: {0: "cat"}})


def test_settings_of_unexpected_types_are_not_heard(tmp_path):
    text = "a = dict(mean=['a', 'b', 'c'])"
    content = {"state_dict": mmdetection_weights(tiny_detector("sparse_rcnn", "box"))}
    _, report = converted(content | {"meta": {"config": text, "CLASSES": 3}}, tmp_path)
    assert report.class_names == "none"
    assert list(DrmmImageProcessor.from_pretrained(tmp_path / "out").image_mean) == DrmmImageProcessor.image_mean
