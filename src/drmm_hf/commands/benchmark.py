"""`drmm benchmark`: measure speed, each kind of measurement a subcommand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments.

    Args:
        parser (`argparse.ArgumentParser`): The command's parser.
    """
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    loader = kinds.add_parser("loader", help="pictures a second, beside transformers' DETR processor")
    loader.set_defaults(measure=_loader)
    loader.add_argument("data", help="COCO folder, or any other data that drmm train takes")
    loader.add_argument("--split", default="val", help="split of the data (default: val)")
    loader.add_argument("--batch-size", type=int, default=4, metavar="N", help="pictures a batch (default: 4)")
    loader.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="processes that read (default: 0, this one)"
    )
    loader.add_argument("--num-pictures", type=int, default=64, metavar="N", help="pictures a turn (default: 64)")
    loader.add_argument("--repetitions", type=int, default=5, metavar="N", help="turns of each loader (default: 5)")
    loader.add_argument("--shortest-edge", type=int, default=800, metavar="PX", help="shorter side (default: 800)")
    loader.add_argument("--longest-edge", type=int, default=1333, metavar="PX", help="its bound (default: 1333)")
    loader.add_argument("--output", metavar="FILE", help="where to write the figures as json")
    cost = kinds.add_parser("cost", help="parameters and multiply-adds of a detector; with --speed, pictures a second")
    cost.set_defaults(measure=_cost)
    cost.add_argument(
        "model", metavar="MODEL_OR_RECIPE", help="folder or Hub id of a detector, or a recipe's yaml file"
    )
    cost.add_argument(
        "--size", type=int, nargs=2, default=[800, 1280], metavar=("H", "W"), help="model input (default: 800 1280)"
    )
    cost.add_argument(
        "--speed", action="store_true", help="measure speed and, on a GPU, training memory on this machine"
    )
    cost.add_argument(
        "--top-k-ratio", type=float, metavar="R", help="keep this share of the queries after every stage but the last"
    )
    cost.add_argument("--device", help="where to measure them (default: a GPU if there is one)")
    cost.add_argument("--output", metavar="FILE", help="where to write the figures as json")

    evaluation = kinds.add_parser("eval", help="seconds of each step from detections to figures")
    evaluation.set_defaults(measure=_evaluation)
    evaluation.add_argument("--num-pictures", type=int, default=5000, metavar="N", help="pictures (default: 5000)")
    evaluation.add_argument("--output", metavar="FILE", help="where to write the figures as json")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and write the figures.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad place costs none
    figures, lines = args.measure(args)
    print(lines)
    if args.output is not None:
        Path(args.output).write_text(json.dumps(figures, indent=2) + "\n")
        print(f"written to {args.output}")
    return 0


def loader_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of the loader benchmark as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.loader.benchmark_loader`.

    Returns:
        `str`: A line a loader: medians, and the spread in brackets; then the ratio.
    """
    names = {"drmm_hf": "drmm-hf", "transformers": "transformers DETR", "decoding": "decoding alone"}
    lines = [f"{'pictures a second':<20}{'of one core':>28}{'of wall clock':>28}"]
    for name, title in names.items():
        columns = (figures["loaders"][name][key] for key in ("pictures_per_core_second", "pictures_per_second"))
        lines.append(f"{title:<20}" + "".join(f"{_spread(column, 1):>28}" for column in columns))
    return "\n".join(
        [
            *lines,
            f"{'ratio':<20}{_spread(figures['ratio'], 2):>28}",
            "",
            f"{figures['num_pictures']} pictures in batches of {figures['batch_size']}, {figures['num_workers']} "
            f"workers, {figures['repetitions']} turns each, in brackets the slowest and fastest",
        ]
    )


def cost_table(figures: Mapping[str, Any]) -> str:
    """Return what a detector costs as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.cost.model_cost`, with those of `measured_cost` if measured.

    Returns:
        `str`: A line a part of the model and a kind of operation, then speed and memory.
    """

    def millions(count: float) -> str:
        return f"{count / 1e6:.1f}"

    def billions(count: float) -> str:
        return f"{count / 1e9:.2f}"

    lines = [f"{'':<26}{'parameters (M)':>16}{'trained (M)':>14}{'multiply-adds (G)':>20}"]
    for name, part in [*figures["parts"].items(), ("all", figures)]:
        columns = (millions(part["total_parameters"]), millions(part["trainable_parameters"]))
        lines.append(f"{name:<26}{columns[0]:>16}{columns[1]:>14}{billions(part['multiply_adds']):>20}")
    lines += ["", "of these"]
    named = [(name.replace("_", " "), count) for name, count in figures["operations"].items()]
    lines += [f"{name:<26}{billions(count):>50}" for name, count in named]
    lines += ["not among these", f"{'sampling of the maps':<26}{billions(figures['sampling']):>50}"]
    lines += [f"{name:<26}{billions(count):>50}" for name, count in figures["elementwise"].items()]
    lines += [f"{'as counted by layers':<26}{billions(figures['layer_operations']):>50}", ""]
    height, width = figures["size"]
    lines.append(f"one picture of {height} x {width}; {figures['num_labels']} classes")
    speed = figures.get("pictures_per_second")
    measured = "not run" if speed is None else f"{speed:.2f} on {figures['device']}, one picture a batch"
    memory = figures.get("training_memory")
    lines.append(f"pictures a second: {measured}")
    lines.append(f"training memory: {'not run' if memory is None else f'{memory / 1e9:.1f} GB'}")
    return "\n".join(lines)


def _cost(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..benchmarks.cost import hollow_model, measured_cost, model_cost
    from ..modeling.configuration_drmm import DrmmConfig
    from ..training.arguments import load_recipe

    selection = {} if args.top_k_ratio is None else {"top_k_ratio": args.top_k_ratio, "top_k_last_stage": False}
    if args.model.endswith((".yaml", ".yml")):
        recipe = load_recipe(args.model, selection)
        config = DrmmConfig(**recipe.model)
        figures = model_cost(hollow_model(config), *args.size)
        if args.speed:
            import torch

            from ..modeling.modeling_drmm import DrmmForObjectDetection

            device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
            figures |= measured_cost(DrmmForObjectDetection(config).to(device), *args.size)
        if args.output is not None and not (Path(args.output).parent / "recipe.yaml").exists():
            recipe.save(Path(args.output).parent / "recipe.yaml")  # tells `drmm tables` whose costs these are
    else:
        from ..conversion.model_source import find_source
        from ..evaluation.predict import load_detector

        model, _ = load_detector(find_source(args.model), args.device)
        model.config.update(selection)
        figures = model_cost(model, *args.size)
        if args.speed:
            figures |= measured_cost(model, *args.size)
    return figures, cost_table(figures)


def _loader(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..benchmarks.loader import benchmark_loader
    from ..data.coco import categories, load_detection_dataset
    from ..data.labels import LabelMap

    dataset = load_detection_dataset(args.data, args.split)
    figures = benchmark_loader(
        dataset,
        LabelMap.from_categories(categories(dataset)),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        num_pictures=args.num_pictures,
        repetitions=args.repetitions,
        shortest_edge=args.shortest_edge,
        longest_edge=args.longest_edge,
    )
    return figures, loader_table(figures)


def evaluation_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of the evaluation benchmark as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.evaluation.benchmark_evaluation`.

    Returns:
        `str`: A line a step.
    """
    lines = [f"{'step':<24}{'core seconds':>14}{'wall clock':>14}"]
    lines += [
        f"{name:<24}{step['core_seconds']:>14.2f}{step['seconds']:>14.2f}" for name, step in figures["steps"].items()
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"{figures['num_images']} pictures, {figures['num_objects']} objects, {figures['num_detections']} "
            f"detections ({figures['file_megabytes']:.0f} MB of json), AP by {figures['backend']}; memory rose from "
            f"{figures['megabytes_before']:.0f} to {figures['megabytes']:.0f} MB",
        ]
    )


def _evaluation(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..benchmarks.evaluation import benchmark_evaluation

    figures = benchmark_evaluation(args.num_pictures)
    return figures, evaluation_table(figures)


def _spread(summary: Mapping[str, float], digits: int) -> str:
    low, middle, high = (f"{summary[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle} ({low} - {high})"
