"""Measure where the scores of an AdaMixer detector lose their last digits: in torch, in a graph, and by which part.

    python scripts/measure_rounding.py runs/bccd_adamixer/best runs/exports/onnx

The yardstick is the model in float64, on the generated pictures of `drmm export`. A part is to blame if the pass in
float32 is near it once that part's results are those of float64, rounded.
"""

import argparse
import copy
from unittest.mock import patch

import torch

from drmm_hf.evaluation.predict import load_detector
from drmm_hf.export.exported import ExportedDetector
from drmm_hf.export.graph import DetectionGraph
from drmm_hf.export.parity import largest_differences, parity_batches, top_detections
from drmm_hf.modeling import adamixer_stage


PARTS = {"samples": "sample_maps", "overlaps": "overlap_bias"}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a D-RMM detector on AdaMixer")
    parser.add_argument("export", help="folder that drmm export wrote of it, in float32")
    args = parser.parse_args()
    model, processor = load_detector(args.model, "cpu")
    single, double = DetectionGraph(model.eval()), DetectionGraph(copy.deepcopy(model).double())
    exported, worst = ExportedDetector(args.export), {}
    for inputs, sizes in parity_batches(processor):

        def found(detector, inputs=inputs, sizes=sizes):
            with torch.no_grad():
                return top_detections(detector, processor, inputs, sizes)

        detections, recorded = {"torch": found(single), exported.about["format"]: found(exported)}, {}
        for part, name in PARTS.items():
            function, values = getattr(adamixer_stage, name), []
            with patch.object(adamixer_stage, name, lambda *a, f=function, v=values: v.append(f(*a)) or v[-1]):
                recorded["exact"] = found(double)
            replayed = iter(values)
            with patch.object(adamixer_stage, name, lambda *_, r=replayed: next(r).float()):
                detections[f"torch, {part} of float64"] = found(single)
        for name, each in detections.items():
            differences = largest_differences(recorded["exact"], each, sizes, model.config.num_labels)
            worst[name] = max(worst.get(name, 0), differences["score"])
    print("largest difference of a score to float64")
    for name, score in worst.items():
        print(f"{name:<32}{score:.1e}")


if __name__ == "__main__":
    main()
