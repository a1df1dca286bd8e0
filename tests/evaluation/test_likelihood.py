"""Likelihoods of annotations against scipy's densities in plain loops, and against the training criteria."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from conftest import tiny_config
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.data.coco import canonical_dataset
from drmm_hf.evaluation.coco_metrics import ground_truth
from drmm_hf.evaluation.likelihood import check_density, gather_evidence, likelihoods, summarize


CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "owl"}]
# (category, xywh, area, iscrowd): one picture with three objects and a crowd, one with one object, one with none. The
# last cat is over the border, the dog has an area at the boundary of small and medium, no annotation shows an owl.
OBJECTS = [
    [
        (7, [10.0, 5.0, 30.0, 20.0], 600.0, 0),
        (2, [40.0, 10.0, 32.0, 32.0], 1024.0, 0),
        (7, [0.0, 0.0, 60.0, 40.0], 2400.0, 1),
        (7, [-3.0, 20.0, 20.0, 25.5], 200.0, 0),
    ],
    [(2, [10.0, 20.0, 100.0, 120.0], 12000.0, 0)],
    [],
]
SIZES = [(48, 80), (160, 120), (60, 60)]  # heights and widths


def make_dataset(objects=OBJECTS):
    rows, number = [], 0
    for index, ((height, width), mine) in enumerate(zip(SIZES, objects, strict=True)):
        pixels = np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8)
        records = []
        for category_id, bbox, area, iscrowd in mine:
            records.append({"id": number, "category_id": category_id, "bbox": bbox, "area": area, "iscrowd": iscrowd})
            number += 1
        row = {"image_id": 30 - index, "file_name": f"{index}.png", "image": Image.fromarray(pixels)}
        rows.append(row | {"width": width, "height": height, "objects": records})
    return canonical_dataset(rows, CATEGORIES)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


def make_detector(**overrides):
    """Return a float64 model whose components all differ, and its processor."""
    torch.manual_seed(0)
    config = tiny_config(id2label={0: "dog", 1: "cat", 2: "owl"}, category_ids=[2, 7, 5], **overrides)
    model = DrmmForObjectDetection(config).double().eval()
    for name, parameter in model.named_parameters():
        if "decoder" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, DrmmImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})


def density(config, coordinate, location, scale):
    """One side's density, by scipy."""
    family = {"cauchy": stats.cauchy, "gaussian": stats.norm, "student_t": stats.t}[config.coordinate_distribution]
    arguments = (config.student_t_freedom,) if config.coordinate_distribution == "student_t" else ()
    return float(family.pdf(coordinate, *arguments, loc=location, scale=scale))


def oracle(model, processor, dataset):
    """Return each ground truth's columns in plain loops, from what the model tells the outside."""
    config, terms = model.config, []
    for row in dataset:
        inputs = processor(images=row["image"], return_tensors="pt")
        with torch.no_grad():
            outputs = model(inputs["pixel_values"].double(), inputs["pixel_mask"], output_auxiliary=True)
        mask = inputs["pixel_mask"][0]
        frame = np.array([int(mask[0].sum()), int(mask[:, 0].sum())] * 2, dtype=float)
        objects = [item for item in row["objects"] if not item["iscrowd"]]
        for item in objects:
            x, y, width, height = item["bbox"]
            box = np.array([x, y, x + width, y + height]) / ([row["width"], row["height"]] * 2) * frame
            label = config.category_ids.index(item["category_id"])
            entry = {"id": item["id"], "log_scale": 2 * math.log(frame[0] * frame[1] / row["width"] / row["height"])}
            entry["stages"] = []
            for stage in [*outputs.auxiliary_outputs, outputs]:
                objectness = 1 / (1 + np.exp(-stage["objectness_logits"][0].numpy()))
                products, powers = [], []
                for k in range(len(objectness)):
                    cx, cy, w, h = stage["pred_boxes"][0, k].numpy() * frame
                    location = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    scales = stage["box_scales"][0, k].numpy() * frame
                    exponentials = np.exp(stage["class_logits"][0, k].numpy())
                    probability = exponentials[label] / exponentials.sum()
                    product = objectness[k] / objectness.sum()
                    for side in range(4):
                        product *= density(config, box[side], location[side], scales[side])
                    products.append(product * probability)
                    powers.append(product * probability**config.class_exponent)
                total, public = sum(products), len(objects) * sum(powers)
                shares = sorted((product / total for product in products), reverse=True)
                entry["stages"].append(
                    {
                        "nll": -math.log(total),
                        "share": shares[0],
                        "effective_positives": 1 / sum(share**2 for share in shares),
                        "public_nll": -math.log(public + 1e-12),
                        "public_share": len(objects) * max(powers) / (public + 1e-12) + 1e-12,
                        "responsibilities": shares[:5],
                    }
                )
            terms.append(entry)
    return terms


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"criterion": "nll", "likelihood_epsilon": 0, "scale_mixing_by_num_objects": False, "min_scale_ratio": 0},
        {"criterion": "max_nll", "coordinate_distribution": "student_t", "student_t_freedom": 3.0},
        {"criterion": "nll_mcm_bipartite", "class_exponent": 0.5, "box_delta_unit": "box"},
        {"criterion": "bipartite_nll", "coordinate_distribution": "gaussian", "min_scale_ratio": 0.3},
    ],
    ids=lambda overrides: overrides.get("criterion", "nll_mcm"),
)
def test_every_term_equals_scipy_in_plain_loops(overrides, dataset):
    model, processor = make_detector(**overrides)
    result = likelihoods(model, processor, dataset, ground_truth(dataset), batch_size=2, progress=False)
    expected = oracle(model, processor, dataset)
    assert result.annotation_indices.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(result.log_scales, [entry["log_scale"] for entry in expected], atol=1e-12)
    for name in expected[0]["stages"][0]:
        wanted = np.array([[stage[name] for stage in entry["stages"]] for entry in expected]).swapaxes(0, 1)
        np.testing.assert_allclose(getattr(result, name), wanted, rtol=1e-9, atol=1e-13, err_msg=name)
    for row, mine in ((0, [0, 1, 2]), (1, [3])):  # the model's own method says the same of the last stage
        objects = [item for item in dataset[row]["objects"] if not item["iscrowd"]]
        corner, size = torch.tensor([item["bbox"] for item in objects], dtype=torch.float64).split(2, dim=1)
        height, width = SIZES[row]
        boxes = torch.cat([corner + size / 2, size], dim=1) / torch.tensor([width, height] * 2)
        classes = torch.tensor([model.config.category_ids.index(item["category_id"]) for item in objects])
        inputs = processor(images=dataset[row]["image"], return_tensors="pt")
        labels = [{"class_labels": classes, "boxes": boxes}]
        (found,) = model.log_likelihood(inputs["pixel_values"].double(), labels, inputs["pixel_mask"])
        np.testing.assert_allclose(-found.numpy(), result.nll[-1, mine], rtol=1e-10)
    assert np.ptp(result.nll) > 0.1 and 0.2 < result.share.mean() < 0.999  # components differ, and share


@pytest.mark.parametrize(
    "overrides", [{}, {"top_k_ratio": 0.5}, {"decoder_type": "adamixer", "neck_type": "fpn"}], ids=str
)
@pytest.mark.parametrize("public", [False, True], ids=["paper", "public"])
def test_training_computes_the_same_two_terms(public, overrides):
    """The criterion on labels of the processor; of a picture with one object, even the share can be read from it."""
    objects = [OBJECTS[0][:2], OBJECTS[1], []]
    dataset = make_dataset(objects)
    form = {"likelihood_epsilon": 1e-12} if public else {"likelihood_epsilon": 0, "scale_mixing_by_num_objects": False}
    model, processor = make_detector(**overrides, **form)
    summary = summarize(likelihoods(model, processor, dataset, ground_truth(dataset)), ground_truth(dataset))
    totals = np.zeros(2)
    for row in dataset.select([0, 1]):
        for item in row["objects"]:
            item["category_id"] = model.config.category_ids.index(item["category_id"])
        annotation = {"image_id": row["image_id"], "annotations": row["objects"]}
        inputs = processor(images=row["image"], annotations=annotation, return_tensors="pt")
        labels = [{name: inputs["labels"][0][name] for name in ("class_labels", "boxes")}]
        labels[0]["boxes"] = labels[0]["boxes"].double()
        with torch.no_grad():
            terms = model(inputs["pixel_values"].double(), inputs["pixel_mask"], labels=labels).loss_dict
        totals += [terms[f"nll.stage{stage}"].item() for stage in range(2)]
    prefix = "public_" if public else ""
    assert summary["all"][f"{prefix}nll"] == pytest.approx(totals / 3, rel=1e-6)
    last = [math.exp(-terms[f"mcm.stage{stage}"].item()) for stage in range(2)]
    assert summary["sizes"]["large"][f"{prefix}share"] == pytest.approx(last, rel=1e-5)


def test_groups_are_means_over_their_own_ground_truths(dataset):
    annotations = ground_truth(dataset)
    for record in annotations["annotations"]:
        if record["area"] == 200.0:
            del record["area"]  # then that of the box, 510
    result = likelihoods(*make_detector(), dataset, annotations, progress=False)
    summary = summarize(result, annotations)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert {name: summary[name] for name in ("num_images", "num_ground_truths", "num_crowds")} == {
        "num_images": 3,
        "num_ground_truths": 4,
        "num_crowds": 1,
    }
    members = {("all", None): [0, 1, 2, 3]}
    # An area of 1024 is small and medium, as in COCO's own evaluation.
    members |= {("sizes", "small"): [0, 1, 2], ("sizes", "medium"): [1], ("sizes", "large"): [3]}
    members |= {("classes", "cat"): [0, 2], ("classes", "dog"): [1, 3], ("classes", "owl"): []}
    for (kind, name), indices in members.items():
        group = summary[kind] if name is None else summary[kind][name]
        assert group["num_ground_truths"] == len(indices)
        for column in ("nll", "share", "effective_positives", "public_nll", "public_share", "responsibilities"):
            values = getattr(result, column)
            wanted = None if not indices else [[values[s, i] for i in indices] for s in range(len(values))]
            if wanted is None:
                assert group[column] is None
            else:
                np.testing.assert_allclose(group[column], np.mean(wanted, axis=1), rtol=1e-12)
    assert summary["mean_log_scale"] == pytest.approx(result.log_scales.mean())
    np.testing.assert_allclose(summary["all"]["share"], np.array(summary["all"]["responsibilities"])[:, 0], rtol=1e-12)


def test_annotations_of_pictures_and_categories_that_are_not_listed_change_nothing(dataset):
    model, processor = make_detector()
    truth = ground_truth(dataset)
    first = truth["annotations"][0]
    mixed = [first | {"image_id": 999}, first | {"category_id": 999}, first | {"image_id": 999, "iscrowd": 1}]
    mixed = truth | {"annotations": [*mixed, *truth["annotations"]]}
    summaries = [summarize(likelihoods(model, processor, dataset, one), one) for one in (truth, mixed)]
    assert summaries[0] == summaries[1]


def test_batch_size_and_precision_of_the_network_change_little(dataset):
    model, processor = make_detector()
    alone = likelihoods(model, processor, dataset, ground_truth(dataset), progress=False)
    together = likelihoods(model, processor, dataset, ground_truth(dataset), batch_size=3, progress=False)
    single = likelihoods(model.float(), processor, dataset, ground_truth(dataset), batch_size=3, progress=False)
    for field in dataclasses.fields(alone):
        np.testing.assert_allclose(getattr(together, field.name), getattr(alone, field.name), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(single.nll, alone.nll, atol=1e-3)


def test_the_mode_of_the_model_is_left_as_it_was(dataset):
    model, processor = make_detector()
    likelihoods(model.train(), processor, dataset, ground_truth(dataset), progress=False)
    assert model.training


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SimpleNamespace(model_type="detr"), "model is a 'detr', which predicts boxes and scores but no density"),
        (SimpleNamespace(model_type="drmm", head_type="box"), "model is a 'drmm' with head_type 'box', which"),
    ],
)
def test_models_without_a_density_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        check_density(config)
    with pytest.raises(ValueError, match=said):
        likelihoods(SimpleNamespace(config=config), None, None, {})


def test_what_cannot_be_measured_is_said_in_words(dataset):
    model, processor = make_detector()
    crowds = make_dataset([OBJECTS[0][2:3], [], []])
    with pytest.raises(ValueError, match="no object but crowds"):
        likelihoods(model, processor, crowds, ground_truth(crowds))
    with pytest.raises(ValueError, match="1 of 3 annotated pictures are not in the dataset"):
        likelihoods(model, processor, dataset.select([0, 1]), ground_truth(dataset))
    torch.nn.init.constant_(model.model.decoder.layers[1].head.box_scale.bias, math.nan)
    with pytest.raises(ValueError, match="likelihoods are not finite"):
        likelihoods(model, processor, dataset, ground_truth(dataset))


def oracle_evidence(model, processor, dataset):
    """Return the evidence about each annotation in plain loops, from what the model tells the outside."""
    config, found = model.config, {}
    for row in dataset:
        inputs = processor(images=row["image"], return_tensors="pt")
        with torch.no_grad():
            outputs = model(inputs["pixel_values"].double(), inputs["pixel_mask"])
        mask, size = inputs["pixel_mask"][0], np.array([row["width"], row["height"]] * 2)
        frame = np.array([int(mask[0].sum()), int(mask[:, 0].sum())] * 2, dtype=float)
        objectness = 1 / (1 + np.exp(-outputs.objectness_logits[0].numpy()))
        probability = torch.softmax(outputs.class_logits[0], -1).numpy()
        for item in row["objects"]:
            if item["iscrowd"]:
                continue
            x, y, width, height = item["bbox"]
            box = np.array([x, y, x + width, y + height]) / size * frame
            label = config.category_ids.index(item["category_id"])
            products, agreements, locations = [], [], []
            for k in range(len(objectness)):
                cx, cy, w, h = outputs.pred_boxes[0, k].numpy() * frame
                location = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
                scales = outputs.box_scales[0, k].numpy() * frame
                values = [density(config, *side) for side in zip(box, location, scales, strict=True)]
                peaks = [density(config, *side) for side in zip(location, location, scales, strict=True)]
                products.append(objectness[k] / objectness.sum() * probability[k, label] * np.prod(values))
                agreements.append(math.sqrt(np.prod(values) / np.prod(peaks)))
                locations.append(location / frame * size)
            best = int(np.argmax(products))
            plausibility = (np.sqrt(objectness) * probability[:, label] * agreements).sum()
            found[item["id"]] = {
                "nll": -math.log(sum(products)),
                "log_plausibility": min(math.log(plausibility), 0.0),
                "log_box": math.log(agreements[best]),
                "log_class": math.log(probability[best, label] / probability[best].max()),
                "log_object": math.log(objectness[best]) / 2,
                "scores": objectness[best] * probability[best].max(),
                "category_ids": config.category_ids[int(probability[best].argmax())],
                "queries": best,
                "boxes": locations[best],
            }
    return found


@pytest.mark.parametrize(
    "overrides",
    [{}, {"min_scale_ratio": 0.1, "coordinate_distribution": "student_t", "student_t_freedom": 3.0}],
    ids=["cauchy", "student_t"],
)
def test_evidence_is_that_of_plain_loops(dataset, overrides):
    model, processor = make_detector(**overrides)
    content = ground_truth(dataset)
    evidence = gather_evidence(model, processor, dataset, content, batch_size=2, progress=False)
    expected = oracle_evidence(model, processor, dataset)
    records = [content["annotations"][index] for index in evidence.annotation_indices]
    assert [record["id"] for record in records] == list(expected)
    for row, record in enumerate(records):
        for name, value in expected[record["id"]].items():
            np.testing.assert_allclose(getattr(evidence, name)[row], value, rtol=2e-5, atol=1e-5, err_msg=name)
    same = likelihoods(model, processor, dataset, content, progress=False)
    np.testing.assert_allclose(evidence.nll, same.nll[-1], rtol=1e-9)


def test_a_box_that_a_component_predicts_is_at_least_as_plausible_as_its_confidence(dataset):
    """An annotation is put where a component is, under its most probable class."""
    model, processor = make_detector()
    content = ground_truth(dataset)
    few = {**content, "annotations": [{**content["annotations"][0], "iscrowd": 0}]}
    first = gather_evidence(model, processor, dataset, few, progress=False)
    x0, y0, x1, y1 = first.boxes[0].tolist()
    few["annotations"][0] |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": int(first.category_ids[0])}
    there = gather_evidence(model, processor, dataset, few, progress=False)
    assert there.queries[0] == first.queries[0] and there.log_box[0] == pytest.approx(0, abs=1e-6)
    assert there.log_class[0] == pytest.approx(0, abs=1e-9)
    own = there.scores[0] / math.exp(there.log_object[0])  # p sqrt(o)
    assert math.exp(there.log_plausibility[0]) >= own * (1 - 1e-6) > there.scores[0]
