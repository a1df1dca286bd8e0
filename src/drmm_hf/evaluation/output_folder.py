"""The folder of an evaluation: its figures, the detections that they are of, and reports on these and no others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .files import naming_full_disk, read_json, write_json


# What an evaluation may write beside its figures: reports, then their pictures.
REPORTS = (
    *(f"{name}.json" for name in ("evaluation", "thresholds", "calibration", "calibrators", "coverage")),
    *(f"{name}.json" for name in ("duplicates", "breakdown", "likelihood", "assignments")),
    *(f"{name}.png" for name in ("reliability", "thresholds", "confusion", "calibration", "calibrated", "coverage")),
    *(f"{name}.png" for name in ("duplicates", "duplicates_reliability", "duplicates_boxes", "breakdown")),
    "detections.jpg",
)
# What metrics know of the way that detections have come; the file of detections does not.
_ORIGIN = ("deduplication", "calibration", "num_boxes_without_size", "num_other_labels")


def holds_figures(output_dir: str | Path, metrics: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a folder is of these very detections and figures, so that its reports are of them too.

    Args:
        output_dir (`str` or `Path`): The folder.
        metrics (`Mapping`): From `drmm_hf.evaluation.evaluate.figures`.
        entries (`Sequence[Mapping]`): The COCO results that they are of.

    Returns:
        `bool`: True if so, wherever the detections have come from.
    """
    files = [Path(output_dir) / name for name in ("detections.json", "metrics.json")]
    if not all(file.is_file() for file in files) or files[0].read_text() != json.dumps(entries):
        return False
    try:
        written = dict(read_json(files[1]))
    except (TypeError, ValueError):  # damaged
        return False
    kept, mine = ({name: one[name] for name in one.keys() - {*_ORIGIN}} for one in (written, metrics))
    return kept == mine


def write_figures(
    metrics: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write `metrics.json` and `detections.json`, and in `evaluation.json` what they are of.

    Reports of an earlier evaluation that found something else are removed first, and a line says so: a folder holds
    one evaluation. Where a training run has a new best checkpoint, nothing is said of the figures of the one before.
    `metrics.json` goes first and comes last: wherever it stands, the others are of it.

    Args:
        metrics (`Mapping`): From `drmm_hf.evaluation.evaluate.figures`.
        entries (`Sequence[Mapping]`): The COCO results that they are of.
        output_dir (`str` or `Path`): Where to write; it is made if it does not exist.
        about (`Mapping`, *optional*): From `drmm_hf.evaluation.origin.origin`; None if that is not known.
    """
    output_dir, names = Path(output_dir), ["detections.json", "metrics.json"]
    output_dir.mkdir(parents=True, exist_ok=True)
    with naming_full_disk(output_dir), TemporaryDirectory(dir=output_dir) as aside:
        (Path(aside) / "detections.json").write_text(json.dumps(entries, allow_nan=False))
        write_json(metrics, Path(aside) / "metrics.json")
        if about is not None:
            write_json(about, Path(aside) / "evaluation.json")
            names.insert(0, "evaluation.json")
        if not holds_figures(output_dir, metrics, entries):  # a full disk would have been noticed by now
            stale = [name for name in REPORTS if (output_dir / name).is_file()]
            for name in ("metrics.json", *stale):
                (output_dir / name).unlink(missing_ok=True)
            if about is not None and about.get("step") is not None:
                stale = [name for name in stale if name != "evaluation.json"]  # the run's own, which is written anew
            if any(name.endswith(".json") for name in stale):  # pictures alone are a training run's own, drawn anew
                print(f"{output_dir} held another evaluation; its reports are removed: {', '.join(stale)}", flush=True)
        for name in names:
            os.replace(Path(aside) / name, output_dir / name)
