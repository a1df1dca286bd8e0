"""The processor: sizes, frames, labels, post-processing. Oracles are written in float64 numpy, away from the code."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torchvision.transforms.v2 import functional as F  # noqa: N812
from transformers import DeformableDetrImageProcessor

from drmm_hf.evaluation.recalibration import Calibrator
from drmm_hf.modeling.image_processing_drmm import DrmmImageProcessor


SMALL = {"shortest_edge": 40, "longest_edge": 66}
sides = st.integers(1, 90)
fractions = st.floats(0, 1, allow_nan=False)


def picture(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.manual_seed(seed))


def annotation(bboxes, image_id=1, **extra):
    rows = [{"id": 10 + i, "bbox": bbox, "category_id": i, "iscrowd": 0} | extra for i, bbox in enumerate(bboxes)]
    return {"image_id": image_id, "annotations": rows}


def perfect_outputs(labels, num_classes=6):
    """Outputs of a detector that predicts every label exactly, label i of class i with the highest score first."""
    num_queries = max(len(label["boxes"]) for label in labels)
    pred_boxes = torch.zeros(len(labels), num_queries, 4)
    logits = torch.full((len(labels), num_queries, num_classes), -9.0)
    for image, label in enumerate(labels):
        for query, (box, name) in enumerate(zip(label["boxes"], label["class_labels"], strict=True)):
            pred_boxes[image, query] = box
            logits[image, query, name] = 9.0 - query
    return SimpleNamespace(logits=logits, pred_boxes=pred_boxes)


def random_outputs(batch_size=2, num_queries=7, num_classes=3, seed=0, dtype=torch.float32):
    generator = torch.manual_seed(seed)
    objectness = torch.randn(batch_size, num_queries, generator=generator)
    classes = torch.randn(batch_size, num_queries, num_classes, generator=generator)
    confidence = objectness.sigmoid()[..., None] * classes.softmax(-1)
    tensors = {
        "logits": confidence.logit(),
        "pred_boxes": torch.rand(batch_size, num_queries, 4, generator=generator),
        "box_scales": torch.rand(batch_size, num_queries, 4, generator=generator) * 0.1,
        "objectness_logits": objectness,
        "class_logits": classes,
    }
    return SimpleNamespace(**{name: tensor.to(dtype) for name, tensor in tensors.items()})


class TestSize:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ((480, 640), (800, 1067)),
            ((640, 480), (1067, 800)),
            ((500, 353), (1133, 800)),
            ((427, 640), (800, 1199)),
            ((100, 1000), (133, 1333)),  # the longest edge rules, 133.3 is rounded down
            ((800, 1333), (800, 1333)),
            ((2000, 3000), (800, 1200)),
            ((1, 3000), (1, 1333)),  # never 0
        ],
    )
    def test_default_rule(self, given, expected):
        size = DrmmImageProcessor()(images=[torch.zeros(3, *given, dtype=torch.uint8)], do_pad=False)["pixel_values"]
        assert tuple(size.shape[-2:]) == expected

    @given(sides, sides)
    @settings(max_examples=25)
    def test_padded_to_the_next_multiple(self, height, width):
        batch = DrmmImageProcessor(size=SMALL)(images=[picture(height, width)], return_tensors="pt")
        valid_height, valid_width = (int(batch["pixel_mask"][0].amax(axis).sum()) for axis in (1, 0))
        assert batch["pixel_values"].shape[-2:] == tuple(math.ceil(s / 32) * 32 for s in (valid_height, valid_width))
        assert max(valid_height, valid_width) <= 66 and min(valid_height, valid_width) <= 40
        outside = batch["pixel_values"].masked_select(batch["pixel_mask"][:, None] == 0)
        assert not outside.any()

    def test_other_kinds_of_size(self):
        def size(**kwargs):
            return tuple(
                DrmmImageProcessor(**kwargs)(images=[picture(30, 60)], do_pad=False)["pixel_values"].shape[2:]
            )

        assert size(size={"height": 20, "width": 50}) == (20, 50)
        assert size(size={"max_height": 20, "max_width": 20}) == (10, 20)
        assert size(do_resize=False) == (30, 60)

    def test_divisor_and_pad_size(self):
        processor = DrmmImageProcessor(do_resize=False, size_divisor=8)
        assert processor(images=[picture(30, 60)])["pixel_values"].shape == (1, 3, 32, 64)
        assert processor(images=[picture(30, 60)], size_divisor=50)["pixel_values"].shape == (1, 3, 50, 100)
        padded = processor(images=[picture(30, 60)], pad_size={"height": 70, "width": 61})
        assert padded["pixel_values"].shape == (1, 3, 70, 61)
        with pytest.raises(ValueError, match="pad_size=.*smaller"):
            processor(images=[picture(30, 60)], pad_size={"height": 29, "width": 61})
        with pytest.raises(ValueError, match="do_pad=False"):
            processor(images=[picture(30, 60), picture(31, 60)], do_pad=False)
        with pytest.raises(ValueError, match="size_divisor=0"):
            DrmmImageProcessor(size_divisor=0)


class TestPixels:
    def test_normalised_as_stated(self):
        image = picture(32, 64)
        values = DrmmImageProcessor(do_resize=False)(images=[image], return_tensors="pt")["pixel_values"][0].double()
        mean, std = (np.array(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        np.testing.assert_allclose(values.numpy(), (image.numpy() / 255.0 - mean) / std, atol=1e-5)

    def test_switches(self):
        image = picture(32, 32)
        processor = DrmmImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
        values = processor(images=[image])["pixel_values"]
        assert values.dtype == torch.float32
        assert torch.equal(values[0], image.float())
        torch.testing.assert_close(processor(images=[image], do_rescale=True)["pixel_values"][0], image / 255)

    def test_every_kind_of_picture_is_the_same_picture(self):
        image = picture(20, 30)
        pixels = image.permute(1, 2, 0).numpy()
        same = [image, pixels, np.ascontiguousarray(pixels.transpose(2, 0, 1)), Image.fromarray(pixels)]
        values = DrmmImageProcessor(size=SMALL)(images=same, return_tensors="pt")["pixel_values"]
        assert torch.equal(values, values[:1].expand_as(values))

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "F", "I;16"])
    def test_any_pil_mode_becomes_rgb(self, mode):
        values = DrmmImageProcessor(do_resize=False)(images=[Image.new(mode, (40, 20))])["pixel_values"]
        assert values.shape == (1, 3, 32, 64)
        assert values.isfinite().all()

    @given(st.lists(st.tuples(sides, sides), min_size=1, max_size=4), st.data())
    @settings(max_examples=20)
    def test_same_pixels_alone_or_in_any_batch(self, shapes, data):
        processor = DrmmImageProcessor(size=SMALL, pad_size={"height": 96, "width": 70})
        images = [picture(*shape, seed=i) for i, shape in enumerate(shapes)]
        order = data.draw(st.permutations(range(len(images))))
        grouping = data.draw(st.booleans())
        batch = processor(images=[images[i] for i in order], disable_grouping=grouping, return_tensors="pt")
        for place, i in enumerate(order):
            alone = processor(images=[images[i]], return_tensors="pt")
            assert torch.equal(batch["pixel_values"][place], alone["pixel_values"][0])
            assert torch.equal(batch["pixel_mask"][place], alone["pixel_mask"][0])

    @given(st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.sampled_from(["planes", "pixels", "PIL"]))
    @settings(max_examples=40)
    def test_pixels_are_those_of_the_plain_path(self, shapes, kind):
        """Resize bytes plane by plane, divide by 255, normalise, paste: whatever the memory order of the picture."""
        images = [picture(*shape, seed=i) for i, shape in enumerate(shapes)]
        as_kind = {
            "planes": lambda image: image,
            "pixels": lambda image: image.permute(1, 2, 0).contiguous().permute(2, 0, 1),
            "PIL": F.to_pil_image,
        }[kind]
        batch = DrmmImageProcessor(size=SMALL)(images=[as_kind(image) for image in images], return_tensors="pt")
        mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        for image, values, mask in zip(images, batch["pixel_values"], batch["pixel_mask"], strict=True):
            height, width = (int(mask.amax(axis).sum()) for axis in (1, 0))
            assert mask.sum() == height * width
            expected = torch.zeros_like(values)
            small = torch.nn.functional.interpolate(
                image[None].double(), (height, width), mode="bilinear", antialias=True
            )[0]
            expected[:, :height, :width] = (small / 255 - mean) / std
            # Bytes are rounded after each of the two directions, and a byte is up to 1 / 255 / 0.224 here.
            assert (values - expected).abs().max() <= 1.01 / 255 / 0.224
            exact = F.resize(image, [height, width], antialias=True).double()
            expected[:, :height, :width] = (exact / 255 - mean) / std
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)

    def test_pictures_of_the_caller_are_left_alone(self):
        images = [picture(20, 30), torch.rand(3, 20, 30)]
        before = [image.clone() for image in images]
        for switches in ({}, {"do_resize": False}, {"do_resize": False, "do_pad": False}):
            for image in images:
                DrmmImageProcessor(size=SMALL)(images=[image], **switches)
        assert all(torch.equal(*pair) for pair in zip(images, before, strict=True))

    def test_workers_build_batches_in_shared_memory(self, monkeypatch):
        images = [picture(20, 30), picture(30, 20)]
        here = DrmmImageProcessor(size=SMALL)(images=images)
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
        there = DrmmImageProcessor(size=SMALL)(images=images)
        for name in ("pixel_values", "pixel_mask"):
            assert there[name].is_shared() and not here[name].is_shared()
            assert torch.equal(there[name], here[name])


class TestLabels:
    def test_values(self):
        target = {
            "image_id": 7,
            "annotations": [
                {"bbox": [10, 4, 20.5, 8], "category_id": 3, "area": 100, "iscrowd": 0},
                {"bbox": [0, 0, 60, 30], "category_id": 1.0},
            ],
        }
        batch = DrmmImageProcessor(size={"height": 60, "width": 240})(
            images=[picture(30, 60)], annotations=target, return_tensors="pt"
        )
        (label,) = batch["labels"]
        torch.testing.assert_close(
            label["boxes"], torch.tensor([[20.25 / 60, 8 / 30, 20.5 / 60, 8 / 30], [0.5, 0.5, 1, 1]])
        )
        assert label["boxes"].dtype == label["area"].dtype == torch.float32
        assert label["class_labels"].tolist() == [3, 1] and label["class_labels"].dtype == torch.int64
        assert label["area"].tolist() == [800, 60 * 240]  # pixels of the resized picture
        assert label["iscrowd"].tolist() == [0, 0]
        assert label["image_id"].tolist() == [7]
        assert label["orig_size"].tolist() == [30, 60] and label["size"].tolist() == [60, 240]

    @pytest.mark.parametrize("category", ["category", "category_id"])
    def test_coco_and_datasets_forms_agree(self, category):
        columns = {
            "id": [4, 5, 6],
            "bbox": [[1, 2, 3, 4], [5.5, 6, 7, 8], [0, 0, 9, 9]],
            category: [2, 0, 1],
            "area": [11, 12.5, 13],
            "iscrowd": [0, 0, 1],
        }
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        forms = [
            {"annotations": rows},
            {"objects": rows},
            {"objects": columns},
            {"objects": {name: torch.tensor(column) for name, column in columns.items()}},
            {"objects": {name: np.array(column) for name, column in columns.items()}},
        ]
        labels = DrmmImageProcessor(size=SMALL)(
            images=[picture(20, 30)] * len(forms),
            annotations=[{"image_id": np.int64(3), **form} for form in forms],
            return_tensors="pt",
        )["labels"]
        assert labels[0]["class_labels"].tolist() == [2, 0]  # the crowd is gone
        for label in labels[1:]:
            assert label.keys() == labels[0].keys()
            assert all(torch.equal(label[name], labels[0][name]) for name in label)

    @pytest.mark.parametrize(
        "empty",
        [{"annotations": []}, {"objects": []}, {"objects": {"bbox": [], "category": []}}, {"objects": {}}]
        + [{"annotations": [{"bbox": [0, 0, 0, 0], "category_id": 0, "iscrowd": 1}]}],
    )
    def test_a_picture_without_objects(self, empty):
        batch = DrmmImageProcessor(size=SMALL)(
            images=[picture(20, 30)], annotations=[{"image_id": 3, **empty}], return_tensors="pt"
        )
        (label,) = batch["labels"]
        assert label["boxes"].shape == (0, 4) and label["boxes"].dtype == torch.float32
        assert label["class_labels"].shape == (0,) and label["class_labels"].dtype == torch.int64

    def test_boxes_over_the_border_are_clipped(self):
        (label,) = DrmmImageProcessor(size=SMALL)(
            images=[picture(20, 40)], annotations=annotation([[-10, 10, 30, 30]]), return_tensors="pt"
        )["labels"]
        torch.testing.assert_close(label["boxes"], torch.tensor([[0.25, 0.75, 0.5, 0.5]]))

    @pytest.mark.parametrize(
        ("change", "rule"),
        [
            ({"bbox": [5, 5, 0, 3]}, "width and height must be above 0"),
            ({"bbox": [5, 5, 3, -1.5]}, "width and height must be above 0"),
            ({"bbox": [5, 5, math.nan, 3]}, "four finite numbers"),
            ({"bbox": [5, 5, math.inf, 3]}, "four finite numbers"),
            ({"bbox": [5, 5, 3]}, "four finite numbers"),
            ({"bbox": None}, "four finite numbers"),
            ({"bbox": ["a", 5, 3, 3]}, "four finite numbers"),
            ({"bbox": [30, 0, 5, 5]}, "must overlap its picture of 30 x 20"),
            ({"bbox": [0, -9, 5, 5]}, "must overlap its picture of 30 x 20"),
            ({"category_id": -1}, "integer of at least 0"),
            ({"category_id": 1.5}, "integer of at least 0"),
            ({"category_id": "cat"}, "integer of at least 0"),
            ({"category_id": None}, "integer of at least 0"),
            ({"area": -1}, "area"),
        ],
    )
    def test_wrong_annotations_are_named(self, change, rule):
        good = {"id": 41, "bbox": [1, 1, 2, 2], "category_id": 0}
        targets = [{"image_id": 5, "annotations": [good]}, {"image_id": 6, "annotations": [good, good | change]}]
        with pytest.raises(ValueError, match=f"image_id 6, annotation 41: .*{rule}"):
            DrmmImageProcessor(size=SMALL)(images=[picture(20, 30)] * 2, annotations=targets)

    def test_an_annotation_without_id_is_named_by_its_place(self):
        bad = {"bbox": [1, 1, 2, 0], "category_id": 0}
        with pytest.raises(ValueError, match="image_id 6, annotation number 0: bbox="):
            DrmmImageProcessor()(images=[picture(20, 30)], annotations={"image_id": 6, "annotations": [bad]})

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ({"annotations": []}, "image_id=None"),
            ({"image_id": "a", "annotations": []}, "image_id='a'"),
            ({"image_id": 4}, "image_id 4: must have 'annotations' or 'objects'"),
            (
                {"image_id": 4, "objects": {"bbox": [[1, 1, 2, 2]], "category": []}},
                "image_id 4: objects must have lists",
            ),
        ],
    )
    def test_wrong_dicts_are_named(self, target, message):
        with pytest.raises(ValueError, match=message):
            DrmmImageProcessor(size=SMALL)(images=[picture(20, 30)], annotations=[target])

    def test_one_annotation_an_image(self):
        with pytest.raises(ValueError, match="1 given for 2 images"):
            DrmmImageProcessor(size=SMALL)(images=[picture(20, 30)] * 2, annotations=annotation([[1, 1, 2, 2]]))


class TestFrame:
    """Label -> pred_boxes -> original pixels gives the annotation back, whatever happened to the picture."""

    @given(
        shapes=st.lists(st.tuples(st.integers(2, 90), st.integers(2, 90)), min_size=1, max_size=3),
        corners=st.lists(st.lists(fractions, min_size=4, max_size=4), min_size=1, max_size=3),
        divisor=st.sampled_from([1, 32, 50]),
        extra=st.integers(0, 64),
        size=st.sampled_from([SMALL, {"height": 17, "width": 71}, None]),
        frame=st.floats(0.37, 80),
        as_tensor=st.booleans(),
    )
    @settings(max_examples=60)
    def test_annotation_comes_back(self, shapes, corners, divisor, extra, size, frame, as_tensor):
        """`frame` scales the pixels the answer is wanted in: 80 stands for pictures of up to 7,200 pixels."""
        processor = DrmmImageProcessor(do_resize=size is not None, size=size, size_divisor=divisor)
        pad_size = {"height": 90 + extra, "width": 90 + 2 * extra} if extra else None
        expected, targets = [], []
        for image_id, (height, width) in enumerate(shapes):
            ends = np.sort(np.array(corners).reshape(-1, 2, 2), axis=1).astype(np.float64) * [width, height]
            ends = np.concatenate([ends[:, 0], np.maximum(ends[:, 1] - ends[:, 0], 1e-3)], axis=1)
            ends[:, :2] = np.minimum(ends[:, :2], [width - 1e-3, height - 1e-3])
            targets.append(annotation(ends.tolist(), image_id))
            expected.append(np.concatenate([ends[:, :2], ends[:, :2] + ends[:, 2:]], axis=1) * frame)
        batch = processor(
            images=[picture(*shape) for shape in shapes], annotations=targets, pad_size=pad_size, return_tensors="pt"
        )
        target_sizes = [(height * frame, width * frame) for height, width in shapes]
        results = processor.post_process_object_detection(
            perfect_outputs(batch["labels"]), 0.5, torch.tensor(target_sizes) if as_tensor else target_sizes
        )
        for result, boxes in zip(results, expected, strict=True):
            np.testing.assert_allclose(result["boxes"].double().numpy(), boxes, rtol=0, atol=1e-3)
            assert result["labels"].tolist() == list(range(len(boxes)))

    def test_the_padded_batch_of_a_detr_processor_shifts_the_same_box(self):
        """The trap that the frame avoids; if this fails, transformers changed and the docstring must follow."""
        images, targets = [picture(40, 40), picture(40, 80)], [annotation([[10, 10, 20, 20]], i) for i in range(2)]
        for name, stays in (("ours", True), ("theirs", False)):
            cls = DrmmImageProcessor if name == "ours" else DeformableDetrImageProcessor
            processor = cls(do_resize=False)
            labels = processor(images=images, annotations=_with_area(targets), return_tensors="pt")["labels"]
            results = processor.post_process_object_detection(perfect_outputs(labels), 0.5, [(40, 40), (40, 80)])
            close = torch.allclose(results[0]["boxes"], torch.tensor([[10.0, 10.0, 30.0, 30.0]]), atol=1e-3)
            assert close == stays, name


def _with_area(targets):
    return [
        target | {"annotations": [row | {"area": row["bbox"][2] * row["bbox"][3]} for row in target["annotations"]]}
        for target in targets
    ]


class TestPostProcess:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("top_k", [1, 5, 100])
    def test_against_a_float64_loop(self, dtype, top_k):
        outputs = random_outputs(batch_size=3, dtype=dtype)
        target_sizes = [(480, 640), (333.5, 500.25), (7, 2000)]
        results = DrmmImageProcessor().post_process_object_detection(outputs, 0.2, target_sizes, top_k=top_k)
        arrays = {name: tensor.double().numpy() for name, tensor in vars(outputs).items()}
        for image, (height, width) in enumerate(target_sizes):
            pairs = []
            for query, label in np.ndindex(7, 3):
                score = 1 / (1 + math.exp(-arrays["logits"][image, query, label]))
                cx, cy, w, h = arrays["pred_boxes"][image, query]
                box = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]) * [width, height, width, height]
                scales = arrays["box_scales"][image, query] * [width, height, width, height]
                objectness = 1 / (1 + math.exp(-arrays["objectness_logits"][image, query]))
                exponents = np.exp(arrays["class_logits"][image, query])
                pairs.append((score, label, query, box, scales, objectness, exponents[label] / exponents.sum()))
            pairs.sort(key=lambda pair: -pair[0])
            pairs = [pair for pair in pairs[:top_k] if pair[0] > 0.2]
            columns = dict(
                zip(
                    ("scores", "labels", "query_indices", "boxes", "box_scales", "objectness", "class_probabilities"),
                    map(np.array, zip(*pairs, strict=True)),
                    strict=True,
                )
            )
            result = results[image]
            assert result.keys() == columns.keys()
            assert result["boxes"].dtype == result["scores"].dtype == torch.float32
            if dtype is torch.float32:  # half precision has ties, whose order is free
                assert result["labels"].tolist() == columns["labels"].tolist()
                for name, column in columns.items():
                    np.testing.assert_allclose(result[name].double().numpy(), column, rtol=1e-5, atol=1e-3)
            else:
                np.testing.assert_allclose(result["scores"].double().numpy(), columns["scores"], rtol=1e-5)
                again = arrays["logits"][image, result["query_indices"], result["labels"]]
                np.testing.assert_allclose(1 / (1 + np.exp(-again)), columns["scores"], rtol=1e-5)

    def test_agrees_with_a_sigmoid_processor_of_transformers(self):
        outputs = random_outputs()
        theirs = DeformableDetrImageProcessor().post_process_object_detection(outputs, 0.1, [(60, 80)] * 2, top_k=10)
        ours = DrmmImageProcessor().post_process_object_detection(outputs, 0.1, [(60, 80)] * 2, top_k=10)
        for mine, other in zip(ours, theirs, strict=True):
            for name, tensor in other.items():
                torch.testing.assert_close(mine[name], tensor, rtol=1e-6, atol=1e-5)

    def test_score_is_objectness_times_class_probability(self):
        (result, _) = DrmmImageProcessor().post_process_object_detection(random_outputs(), 0.0)
        torch.testing.assert_close(result["scores"], result["objectness"] * result["class_probabilities"])
        assert len(result["scores"]) == 21

    @pytest.mark.parametrize("make", [tuple, list, torch.tensor, np.array])
    def test_target_sizes_of_any_kind(self, make):
        outputs = random_outputs()
        expected = DrmmImageProcessor().post_process_object_detection(outputs, 0.1, torch.tensor([[30, 60], [50, 40]]))
        given = [make([30, 60]), make([50.0, 40.0])]
        for sizes in (given, tuple(given), np.array([[30, 60], [50, 40]]), torch.IntTensor([[30, 60], [50, 40]])):
            results = DrmmImageProcessor().post_process_object_detection(outputs, 0.1, sizes)
            assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(results, expected, strict=True))

    def test_without_target_sizes_boxes_stay_fractions(self):
        outputs = random_outputs()
        fractions_of_one = DrmmImageProcessor().post_process_object_detection(outputs, 0.1)
        ones = DrmmImageProcessor().post_process_object_detection(outputs, 0.1, [(1, 1)] * 2)
        for a, b in zip(fractions_of_one, ones, strict=True):
            assert torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["box_scales"], b["box_scales"])

    def test_box_head_has_no_mixture_fields(self):
        outputs = random_outputs()
        outputs.box_scales = outputs.objectness_logits = outputs.class_logits = None
        (result, _) = DrmmImageProcessor().post_process_object_detection(outputs, 0.1)
        assert result.keys() == {"scores", "labels", "boxes", "query_indices"}

    def test_clip_orders_and_clips_only_when_asked(self):
        boxes = torch.tensor([[[0.5, 0.5, -0.2, 0.4], [0.9, 0.1, 0.4, 0.4]]])
        outputs = SimpleNamespace(
            logits=torch.tensor([[[2.0], [1.0]]]),
            pred_boxes=boxes,
            box_scales=torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]]]),
        )
        (raw,) = DrmmImageProcessor().post_process_object_detection(outputs, 0.5, [(100, 200)])
        torch.testing.assert_close(raw["boxes"], torch.tensor([[120.0, 30, 80, 70], [140, -10, 220, 30]]))
        (clipped,) = DrmmImageProcessor().post_process_object_detection(outputs, 0.5, [(100, 200)], clip=True)
        torch.testing.assert_close(clipped["boxes"], torch.tensor([[80.0, 30, 120, 70], [140, 0, 200, 30]]))
        # the inverted box's left side is what was predicted as the right one, with its scale
        torch.testing.assert_close(clipped["box_scales"], torch.tensor([[60.0, 20, 20, 40], [20, 20, 60, 40]]))
        (unit,) = DrmmImageProcessor().post_process_object_detection(outputs, 0.5, clip=True)
        assert unit["boxes"].min() >= 0 and unit["boxes"].max() <= 1

    def test_scores_that_round_to_one_keep_their_order(self):
        logits = torch.tensor([[[40.0], [60.0], [50.0]]])
        outputs = SimpleNamespace(logits=logits, pred_boxes=torch.rand(1, 3, 4))
        (result,) = DrmmImageProcessor().post_process_object_detection(outputs, top_k=2)
        assert result["query_indices"].tolist() == [1, 2]

    def test_nothing_above_the_threshold(self):
        (result, _) = DrmmImageProcessor().post_process_object_detection(random_outputs(), 1.0, [(30, 60)] * 2)
        assert result["boxes"].shape == (0, 4) and result["scores"].shape == result["labels"].shape == (0,)

    def test_a_score_at_the_threshold_is_not_above_it(self):
        outputs = SimpleNamespace(logits=torch.tensor([[[0.0], [0.01]]]), pred_boxes=torch.rand(1, 2, 4))
        (result,) = DrmmImageProcessor().post_process_object_detection(outputs)
        assert result["query_indices"].tolist() == [1]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"target_sizes of shape \(1, 2\).*2 pictures"):
            DrmmImageProcessor().post_process_object_detection(random_outputs(), 0.5, [(3, 4)])
        with pytest.raises(ValueError, match="top_k=0"):
            DrmmImageProcessor().post_process_object_detection(random_outputs(), top_k=0)

    def test_supervision_takes_the_result(self):
        supervision = pytest.importorskip("supervision")
        (result, _) = DrmmImageProcessor().post_process_object_detection(random_outputs(), 0.2, [(30, 60)] * 2)
        detections = supervision.Detections.from_transformers(result, id2label={0: "a", 1: "b", 2: "c"})
        assert len(detections) == len(result["scores"]) > 0
        np.testing.assert_array_equal(detections.xyxy, result["boxes"].numpy())
        np.testing.assert_array_equal(detections.confidence, result["scores"].numpy())
        assert detections.data["class_name"].tolist() == ["abc"[label] for label in result["labels"]]


class TestIntervals:
    @pytest.mark.parametrize("freedom", [1.0, 3.5, math.inf])
    @given(level=st.floats(0.01, 0.99))
    @settings(max_examples=10)
    def test_quantiles_of_the_density_in_pixels(self, freedom, level):
        outputs = random_outputs()
        outputs.scale_freedom = torch.full((2,), freedom)
        results = DrmmImageProcessor().post_process_object_detection(
            outputs, 0.1, [(480, 640), (70, 30)], interval=level
        )
        for result in results:
            boxes, scales = (result[name].double().numpy() for name in ("boxes", "box_scales"))
            expected = [stats.t.ppf((1 + side * level) / 2, freedom, boxes, scales) for side in (-1, 1)]
            assert result["box_intervals"].shape == (len(boxes), 4, 2)
            np.testing.assert_allclose(result["box_intervals"], np.stack(expected, -1), rtol=1e-4, atol=1e-2)

    @given(
        corners=st.lists(st.floats(-0.5, 1.5), min_size=4, max_size=4),
        scales=st.lists(st.floats(1e-4, 2), min_size=4, max_size=4),
        level=st.floats(0.01, 0.99),
        clip=st.booleans(),
    )
    def test_the_box_lies_inside_whatever_is_clipped(self, corners, scales, level, clip):
        left, top, right, bottom = corners
        outputs = SimpleNamespace(
            logits=torch.tensor([[[2.0]]]),
            pred_boxes=torch.tensor([[[(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]]]),
            box_scales=torch.tensor([[scales]]),
            scale_freedom=torch.ones(1),
        )
        (result,) = DrmmImageProcessor().post_process_object_detection(
            outputs, 0.5, [(100, 200)], clip=clip, interval=level
        )
        boxes, (low, high) = result["boxes"], result["box_intervals"].unbind(-1)
        assert (low <= boxes + 1e-4).all() and (boxes <= high + 1e-4).all()
        if clip:
            frame = torch.tensor([200.0, 100, 200, 100])
            assert (low >= 0).all() and (high <= frame).all()
            reach = math.tan(math.pi * level / 2) * result["box_scales"]  # the scales were ordered with the corners
            inside = (low > 0) & (high < frame)
            torch.testing.assert_close((high - low)[inside], 2 * reach[inside], rtol=1e-4, atol=1e-3)

    def test_without_a_density_there_is_none(self):
        outputs = random_outputs()
        with pytest.raises(ValueError, match=r"interval=0.9: must be None for outputs without box_scales"):
            DrmmImageProcessor().post_process_object_detection(outputs, interval=0.9)
        outputs.scale_freedom = torch.ones(2)
        with pytest.raises(ValueError, match="interval=90: must lie between 0 and 1"):
            DrmmImageProcessor().post_process_object_detection(outputs, interval=90)
        assert "box_intervals" not in DrmmImageProcessor().post_process_object_detection(outputs, 0.1)[0]


ISOTONIC = {"method": "isotonic", "scores": [0.1, 0.4, 0.5, 0.9], "calibrated": [0.0, 0.2, 0.7, 0.7]}


class TestCalibration:
    """What is saved with the processor and applied by it."""

    @pytest.mark.parametrize("fitted", [{"method": "temperature", "temperature": 0.6}, ISOTONIC], ids=str)
    def test_scores_are_those_of_the_calibrator_and_nothing_else_moves(self, fitted):
        outputs = random_outputs()
        processor = DrmmImageProcessor(calibration={"scores": fitted})
        for result, raw in zip(
            processor.post_process_object_detection(outputs, -1.0),
            DrmmImageProcessor().post_process_object_detection(outputs, -1.0),
            strict=True,
        ):
            expected = Calibrator.from_dict(fitted)(raw["scores"].double().numpy())
            np.testing.assert_allclose(result["scores"], expected, atol=1e-6)
            assert result.keys() == raw.keys()
            assert all(torch.equal(result[name], raw[name]) for name in raw.keys() - {"scores"})

    def test_a_single_knot_is_a_constant(self):
        fitted = {"method": "isotonic", "scores": [0.3], "calibrated": [0.2]}
        processor = DrmmImageProcessor(calibration={"scores": fitted})
        (result, _) = processor.post_process_object_detection(random_outputs(), 0.0)
        assert result["scores"].tolist() == pytest.approx([0.2] * 21)

    def test_scales_and_intervals_grow_by_the_factor(self):
        outputs = random_outputs()
        outputs.scale_freedom = torch.ones(2)
        processor = DrmmImageProcessor(calibration={"scale_factor": 2.5})
        (result, _) = processor.post_process_object_detection(outputs, 0.1, interval=0.5)
        (raw, _) = DrmmImageProcessor().post_process_object_detection(outputs, 0.1, interval=0.5)
        torch.testing.assert_close(result["box_scales"], 2.5 * raw["box_scales"])
        low, high = result["box_intervals"].unbind(-1)
        torch.testing.assert_close(high - low, 5 * raw["box_scales"])  # the quartiles of Cauchy are one scale away

    @pytest.mark.parametrize("threshold", [0.3, [0.2, 0.9, 0.05]])
    def test_the_saved_threshold_is_the_default(self, threshold):
        outputs = random_outputs()
        processor = DrmmImageProcessor(score_threshold=threshold)
        for result, everything in zip(
            processor.post_process_object_detection(outputs),
            processor.post_process_object_detection(outputs, -1.0),
            strict=True,
        ):
            limits = torch.tensor(threshold)[everything["labels"]] if isinstance(threshold, list) else threshold
            kept = everything["scores"] > limits
            assert 0 < kept.sum() < len(kept)
            assert result.keys() == everything.keys()
            assert all(torch.equal(result[name], everything[name][kept]) for name in result)
        (given, _) = processor.post_process_object_detection(
            outputs, 0.5
        )  # positional, as the stock pipeline calls it
        assert (given["scores"] > 0.5).all()
        (default, _) = DrmmImageProcessor().post_process_object_detection(outputs)
        assert torch.equal(default["scores"], given["scores"])

    def test_the_threshold_is_of_the_calibrated_score(self):
        processor = DrmmImageProcessor(calibration={"scores": ISOTONIC}, score_threshold=0.1)
        (result, _) = processor.post_process_object_detection(random_outputs())
        (raw, _) = DrmmImageProcessor().post_process_object_detection(random_outputs(), 0.25)
        assert torch.equal(result["boxes"], raw["boxes"]) and len(raw["boxes"]) > 0

    def test_it_is_saved_and_taken_back(self, tmp_path):
        fields = {"calibration": {"scores": ISOTONIC, "scale_factor": 1.25}, "score_threshold": [0.1, 0.2, 0.3]}
        DrmmImageProcessor(**fields).save_pretrained(tmp_path)
        loaded = DrmmImageProcessor.from_pretrained(tmp_path)
        assert {name: getattr(loaded, name) for name in fields} == fields
        fresh = DrmmImageProcessor.from_pretrained(tmp_path, calibration=None, score_threshold=None)
        assert fresh.to_dict() == DrmmImageProcessor().to_dict()
        assert not fields.keys() & DrmmImageProcessor().to_dict().keys()
        batch = loaded(images=[picture(20, 30)], return_tensors="pt")  # pictures have nothing to do with it
        assert torch.equal(batch["pixel_values"], fresh(images=[picture(20, 30)], return_tensors="pt")["pixel_values"])

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"calibration": {"score": {}}}, r"calibration has \['score'\]: must have only scores, scale_factor"),
            ({"calibration": {"scale_factor": 0}}, "scale_factor=0: must be a number above 0"),
            ({"calibration": {"scale_factor": math.nan}}, "scale_factor=nan: must be a number above 0"),
            ({"calibration": {"scores": {"method": "temperature"}}}, "temperature=None: must be a number above 0"),
            ({"calibration": {"scores": {"method": "beta"}}}, "must have the method 'temperature' or 'isotonic'"),
            ({"calibration": {"scores": ISOTONIC | {"scores": [0.1]}}}, "equally many rising"),
            ({"calibration": {"scores": ISOTONIC | {"calibrated": [0.0, 0.7, 0.2, 0.9]}}}, "equally many rising"),
            ({"calibration": {"scores": ISOTONIC | {"calibrated": [0.0, 0.2, 0.7, 1.5]}}}, "equally many rising"),
            ({"calibration": {"scores": ISOTONIC | {"scores": [0.1, None, 0.5, 0.9]}}}, "equally many rising"),
            ({"calibration": {"scores": ISOTONIC | {"calibrated": 0.5}}}, "equally many rising"),
            ({"calibration": {"scores": [0.1]}}, r"calibration has scores=\[0.1\]: must be a dict"),
            ({"calibration": []}, r"calibration=\[\]: must be a dict"),
            ({"calibration": 5}, "calibration=5: must be a dict"),
            ({"image_std": [0.2, 0, 0.2]}, r"image_std=\(0.2, 0, 0.2\): must be numbers above 0"),
            ({"image_std": 0.0}, "image_std=.*0.0.*: must be numbers above 0"),
            ({"image_std": [0.2, None, 0.2]}, "must be numbers above 0"),
            ({"score_threshold": 50}, r"score_threshold=50: must be a score in \[0, 1\]"),
            ({"score_threshold": []}, r"score_threshold=\[\]: must be a score"),
            ({"score_threshold": [0.1, "a"]}, "must be a score"),
        ],
    )
    def test_what_is_none_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            DrmmImageProcessor(**fields)

    @pytest.mark.parametrize("entry", [{"calibration": []}, {"calibration": 5}, {"image_std": [0, 1, 1]}])
    def test_a_file_that_was_spoilt_is_refused_when_it_is_loaded(self, entry, tmp_path):
        DrmmImageProcessor().save_pretrained(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entry))
        with pytest.raises(ValueError, match=f"{next(iter(entry))}=.*: must be"):
            DrmmImageProcessor.from_pretrained(tmp_path)

    def test_thresholds_are_one_a_class(self):
        with pytest.raises(ValueError, match="score_threshold has 2 entries: must be one for 3 classes"):
            DrmmImageProcessor(score_threshold=[0.1, 0.2]).post_process_object_detection(random_outputs())


def test_save_and_load(tmp_path):
    processor = DrmmImageProcessor(
        size={"shortest_edge": 33, "longest_edge": 50}, size_divisor=16, image_mean=[0.1] * 3
    )
    processor.save_pretrained(tmp_path)
    loaded = DrmmImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.size_divisor == 16 and dict(loaded.size) == {"shortest_edge": 33, "longest_edge": 50}
    images = [picture(20, 30), picture(30, 20)]
    before, after = (p(images=images, return_tensors="pt") for p in (processor, loaded))
    assert torch.equal(before["pixel_values"], after["pixel_values"])
    assert torch.equal(before["pixel_mask"], after["pixel_mask"])
    assert "auto_map" not in (tmp_path / "preprocessor_config.json").read_text()


def test_numpy_tensors():
    batch = DrmmImageProcessor(size=SMALL)(
        images=[picture(20, 30)], annotations=annotation([[1, 2, 3, 4]]), return_tensors="np"
    )
    assert isinstance(batch["pixel_values"], np.ndarray) and isinstance(batch["labels"][0]["boxes"], np.ndarray)
