"""Pictures of an evaluation: which boxes are drawn, and what the diagrams say they are of."""

import numpy as np
import pytest
from PIL import Image

from drmm_hf.visualization import evaluation_pictures
from drmm_hf.visualization.evaluation_pictures import draw_detections, draw_report


ANNOTATIONS = {
    "images": [{"id": 1, "file_name": "1.png", "width": 90, "height": 60}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 9, 9], "score": None}],
    "categories": [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}],
}
ENTRIES = [
    {"image_id": 1, "category_id": category, "bbox": [5, 5, 20, 20], "score": score}
    for category in (7, 9)
    for score in (0.1, 0.2, 0.3, 0.6)
]


@pytest.mark.parametrize(
    ("thresholds", "drawn", "said"),
    [
        (None, [0.3, 0.6, 0.3, 0.6], "scoring 0.3 and more"),
        ({7: 0.1, 9: 0.3}, [0.2, 0.3, 0.6, 0.6], "scoring above the saved 0.1 to 0.3"),
        ({7: 0.5, 9: 0.5}, [0.6, 0.6], "scoring above the saved 0.5"),
    ],
)
def test_detections_above_the_saved_thresholds_are_drawn(thresholds, drawn, said, tmp_path, monkeypatch):
    results, captions = [], []
    monkeypatch.setattr(
        evaluation_pictures,
        "draw_boxes",
        lambda image, result, *_, **options: results.append((result, options)) or image,
    )
    monkeypatch.setattr(
        evaluation_pictures, "grid", lambda images, columns, captions: captions_are(captions) or images[0]
    )

    def captions_are(texts):
        captions.extend(texts)

    picture = [(1, "1.png", Image.fromarray(np.zeros((60, 90, 3), np.uint8)))]
    draw_detections(ENTRIES, ANNOTATIONS, picture, tmp_path / "d.jpg", thresholds)
    (truth, _), (found, options) = results
    assert "scores" not in truth and len(truth["boxes"]) == 1
    assert found["scores"] == drawn and options == {"threshold": 0}
    assert captions == ["1.png: annotations", f"detections {said}"]


BINS = {"ece": 0.1, "bin_edges": [0, 1], "bin_confidence": [0.5], "bin_accuracy": [0.4], "bin_count": [3]}


@pytest.mark.parametrize("saved", [None, "isotonic"])
def test_diagrams_say_what_is_the_score_and_whether_it_is_calibrated(saved, tmp_path, monkeypatch):
    seen = {}

    def note(results, path, xlabels=None, notes=()):
        seen[path.name] = list(results), xlabels
        return path

    monkeypatch.setattr(evaluation_pictures, "reliability_diagrams", note)
    monkeypatch.setattr(evaluation_pictures, "reliability_diagram", lambda result, path, title: note([title], path))
    kinds = {name: {"reliability": BINS, "ECE_0.1": 0.1} for name in ("confidence", "class_probability", "objectness")}
    draw_report("calibration", {"kinds": kinds, "saved_scores": saved}, tmp_path)
    draw_report("metrics", {"reliability": BINS, "calibration": saved and {"scores": {"method": saved}}}, tmp_path)
    titles, xlabels = seen["calibration.png"]
    assert titles == ["class probability", "objectness", "confidence"]
    assert xlabels[:2] == ["class probability, a factor of the score", "objectness, a factor of the score"]
    assert xlabels[2] == "confidence: the score" + (" (calibrated)" if saved else "")
    assert seen["reliability.png"][0] == ["Reliability, calibrated" if saved else "Reliability"]
