"""`drmm export`: turn a model into a graph that runs elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .document import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a D-RMM detector")
    parser.add_argument(
        "--format", default="onnx", choices=["onnx", "torch", "openvino"], help="what to write (default: onnx)"
    )
    parser.add_argument("--output", default="runs/export", metavar="FOLDER", help="new folder (default: runs/export)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="type of the weights (default: float32)",
    )
    parser.add_argument("--int8", action="store_true", help="give linear layers weights of 8 bits (onnx)")
    parser.add_argument(
        "--post-process", action="store_true", help="let the graph end in the 100 best detections, in original pixels"
    )
    parser.add_argument("--data", metavar="DATA", help="also measure AP before and after on a split of this data")
    parser.add_argument("--split", default="val", help="split of the data (default: val)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export, compare with the model, and print the differences.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    from transformers.utils import logging

    from ..benchmarks.exported import measure_latency
    from ..conversion.model_source import find_source
    from ..conversion.new_folder import check_new
    from ..evaluation.files import write_json
    from ..evaluation.predict import load_detector
    from ..evaluation.report import load_split
    from ..export.export import check_export, export_detector
    from ..export.exported import ExportedDetector
    from ..export.graph import DetectionGraph
    from ..export.parity import precision_of

    check_export(args.format, args.dtype, args.int8)
    check_new(args.output)
    name = find_source(args.model)
    split = None if args.data is None else load_split(args.data, args.split)
    logging.disable_progress_bar()  # of each weight that is loaded
    model, processor = load_detector(name, "cpu")
    if model.config.model_type != "drmm":
        raise ValueError(f"model {name!r} is a {model.config.model_type!r}; only D-RMM detectors are exported.")
    options = {"dtype": args.dtype, "int8": args.int8, "post_process": args.post_process, "say": _say}
    about = export_detector(model, processor, args.output, args.format, **options)
    print(parity_table(about["parity"]), flush=True)
    graph, exported = DetectionGraph(model), ExportedDetector(args.output)
    _say("timing both")
    about["latency"] = measure_latency(graph, processor, exported)
    print(f"\n{latency_line(about['latency'], args.format)}", flush=True)
    if split is not None:
        about["AP"] = precision_of({"eager": graph, "exported": exported}, processor, model.config, *split)
        eager, other = about["AP"].values()
        print(f"\nAP in per cent: {100 * eager:.3f} in torch, {100 * other:.3f} in {args.format}")
    args.document = write_json(about, Path(args.output) / "export.json")
    print(f"\n{args.output} is the export; export.json in it has the figures")
    return 0


def _say(words: str) -> None:
    """Say on a terminal what is done, as bars are shown there only: tracing alone takes half a minute."""
    if sys.stderr.isatty():
        print(f"{words} ...", file=sys.stderr, flush=True)


def parity_table(rows: list[Mapping[str, Any]]) -> str:
    """Return differences as lines of text, a line a batch.

    Args:
        rows (`list[Mapping]`): From `drmm_hf.export.parity.compare_with_eager`.

    Returns:
        `str`: With a title.
    """
    lines = ["largest difference to the model in float32", "pictures       box px   of side    score  missing"]
    for row in rows:
        shape = f"{row['batch_size']} x {row['height']}x{row['width']}"
        lines.append(
            f"{shape:<13}{row['box_px']:8.1e}  {row['box_share']:8.1e}  {row['score']:7.1e}  {row['missing']:7}"
        )
    return "\n".join(lines)


def latency_line(latency: Mapping[str, Any], form: str) -> str:
    """Return latencies as a line of text.

    Args:
        latency (`Mapping`): From `drmm_hf.benchmarks.exported.measure_latency`.
        form (`str`): Name of the format.

    Returns:
        `str`: Medians in milliseconds, and their ratio.
    """
    eager, exported = (1000 * latency[name]["median"] for name in ("eager", "exported"))
    speedup, threads = latency["speedup"], latency["environment"]["threads"]
    return (
        f"one picture of {latency['height']}x{latency['width']}, {threads} threads: {eager:.0f} ms in torch, "
        f"{exported:.0f} ms in {form}, {speedup['median']:.2f} times as fast "
        f"({speedup['min']:.2f} to {speedup['max']:.2f})"
    )
