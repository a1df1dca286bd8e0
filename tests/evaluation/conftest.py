"""Random detection scenes as COCO dicts, with everything that makes matching hard."""

import numpy as np
import pytest


def random_scene(seed, num_images=3, num_classes=3, crowds=True):
    """Make annotations and detections: overlaps, duplicates, misses, inventions, crowds, distinct scores."""
    rng = np.random.default_rng(seed)
    categories = [{"id": 7 * k + 2, "name": f"class {k}"} for k in range(num_classes)]
    images = [{"id": 11 * i + 5, "file_name": f"{i}.png", "width": 100, "height": 80} for i in range(num_images)]
    annotations, detections = [], []
    for image in images:
        for _ in range(rng.integers(0, 7)):
            box = np.concatenate([rng.uniform(0, 60, 2), rng.uniform(5, 40, 2)])
            annotations.append(
                {
                    "id": len(annotations),  # from 0, where pycocotools itself errs
                    "image_id": image["id"],
                    "category_id": categories[rng.integers(num_classes)]["id"],
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3]),
                    "iscrowd": int(crowds and rng.random() < 0.2),
                }
            )
            for _ in range(rng.integers(0, 4)):
                jittered = box + rng.normal(0, 3, 4)
                detections.append(_detection(image, annotations[-1]["category_id"], jittered))
        for _ in range(rng.integers(0, 5)):
            box = np.concatenate([rng.uniform(0, 60, 2), rng.uniform(5, 40, 2)])
            detections.append(_detection(image, categories[rng.integers(num_classes)]["id"], box))
    for detection, score in zip(detections, rng.permutation(len(detections)), strict=True):
        detection["score"] = float((score + 0.5) / len(detections))
    rng.shuffle(detections)
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def _detection(image, category_id, box):
    box = np.array([box[0], box[1], max(box[2], 1.0), max(box[3], 1.0)])
    return {"image_id": image["id"], "category_id": category_id, "bbox": box.tolist()}


@pytest.fixture(scope="session")
def scene():
    """Return the maker of random scenes."""
    return random_scene
