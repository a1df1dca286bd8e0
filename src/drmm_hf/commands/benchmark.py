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

    evaluation = kinds.add_parser("eval", help="seconds of each step from detections to figures")
    evaluation.set_defaults(measure=_evaluation)
    evaluation.add_argument("--num-pictures", type=int, default=5000, metavar="N", help="pictures (default: 5000)")

    training = kinds.add_parser("train", help="the training step, part by part, and beside transformers' detectors")
    training.set_defaults(measure=_training)
    training.add_argument("--recipe", metavar="FILE", help="recipe to measure (default: ResNet-50 on Sparse R-CNN)")
    training.add_argument("--data", metavar="DIR", help="train on these data, as the recipe augments them")
    training.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="draw pictures of this size instead (default: 320 544)",
    )
    training.add_argument("--batch-size", type=int, metavar="N", help="pictures a step (default: the recipe's, or 1)")
    training.add_argument("--num-workers", type=int, metavar="N", help="processes that load (default: the recipe's)")
    training.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="autocast to this type")
    training.add_argument("--compile", action="store_true", help="compile the models; takes minutes")
    training.add_argument("--repetitions", type=int, default=5, metavar="N", help="steps that count (default: 5)")
    training.add_argument(
        "--peers", default="", metavar="NAMES", help="models of transformers to train too, as deformable_detr,detr"
    )

    loss = kinds.add_parser("loss", help="the criterion, beside transformers' Deformable DETR loss with its matching")
    loss.set_defaults(measure=_loss)
    loss.add_argument("--queries", type=int, nargs="+", default=[300], metavar="K", help="queries (default: 300)")
    loss.add_argument(
        "--objects", type=int, nargs="+", default=[15, 100], metavar="N", help="objects a picture (default: 15 100)"
    )
    loss.add_argument("--stages", type=int, default=6, metavar="S", help="stages (default: 6)")
    loss.add_argument("--batch-size", type=int, default=8, metavar="B", help="pictures (default: 8)")
    loss.add_argument("--classes", type=int, default=80, metavar="C", help="classes (default: 80)")
    loss.add_argument("--repetitions", type=int, default=10, metavar="N", help="turns of each loss (default: 10)")
    for kind in kinds.choices.values():
        kind.add_argument("--output", metavar="FILE", help="where to write the figures as json")


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


def training_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of the training benchmark as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.training.benchmark_training`.

    Returns:
        `str`: A line a part of the step, then a line a model: medians, and the spread in brackets.
    """
    from ..benchmarks.peers import PEERS

    on_cpu = figures["device"] == "cpu"
    lines = [f"{'part':<18}{'ms':>26}{'share':>8}" + (f"{'ms of processors':>26}{'share':>8}" if on_cpu else "")]
    for name, part in figures["parts"].items():
        columns = [("seconds", "share"), *([("processor_seconds", "processor_share")] if on_cpu else [])]
        lines.append(
            f"{name.replace('_', ' '):<18}"
            + "".join(f"{_spread(part[time], 1, 1000):>26}{part[share]['median']:>8.1%}" for time, share in columns)
        )
    lines.append(f"{'pictures a second':<18}{_spread(figures['pictures_per_second'], 2):>26}")
    clock = "processor_seconds" if on_cpu else "seconds"
    lines += [
        "",
        f"{'one step':<22}{'seconds' + (' of processors' if on_cpu else ''):>24}{'ratio':>22}{'TFLOP':>8}"
        f"{'of roofline':>22}{'state MiB':>11}{'step MiB':>10}",
    ]
    for name, model in figures["models"].items():
        lines.append(
            f"{PEERS.get(name, 'drmm-hf'):<22}{_spread(model[clock], 2):>24}{_spread(model['ratio'], 2):>22}"
            f"{model['flops'] / 1e12:>8.3f}{_spread(model['roofline_share'], 2):>22}"
            f"{_mebibytes(model['state_bytes']):>11}{_mebibytes(model['step_bytes']):>10}"
        )
    height, width = figures["padded_size"]
    return "\n".join(
        [
            *lines,
            "",
            f"{figures['batch_size']} x {height} x {width}, {figures['objects']} objects, precision "
            f"{figures['dtype']}, {'compiled, ' if figures['compile'] else ''}{figures['device']}, "
            f"{figures['threads']} threads, {figures['num_workers']} loader workers, "
            f"{figures['repetitions']} steps each",
            f"matrices multiply at {_spread(figures['matmul'], 0, 1e-9)} GFLOP/s{' of one core' if on_cpu else ''}; "
            "FLOPs are of products of matrices and convolutions, not of pooling, norms and the optimiser",
            "state: weights, optimiser, moving average; step: gradients, activations and the rest at their peak",
        ]
    )


def loss_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of the loss benchmark as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.loss.benchmark_loss`.

    Returns:
        `str`: A line a case: medians, and the spread in brackets.
    """
    on_cpu = figures["device"] == "cpu"
    clock = "processor_seconds" if on_cpu else "seconds"
    lines = [
        f"{'queries':>7}{'objects':>8}{'drmm-hf ms':>26}{'Deformable DETR ms':>28}{'ratio':>22}{'MiB':>7}"
        f"{'its MiB':>9}"
    ]
    for case in figures["cases"]:
        ours, theirs = case["drmm"], case["deformable_detr"]
        lines.append(
            f"{case['num_queries']:>7}{case['num_objects']:>8}{_spread(ours[clock], 1, 1000):>26}"
            f"{_spread(theirs[clock], 1, 1000):>28}{_spread(case['ratio'], 1):>22}"
            f"{_mebibytes(ours['peak_bytes']):>7}{_mebibytes(theirs['peak_bytes']):>9}"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"forward and backward, {figures['num_stages']} stages, {figures['batch_size']} pictures, "
            f"{figures['num_labels']} classes, {figures['device']}, {figures['threads']} threads, "
            f"{figures['repetitions']} turns each{', processor time' if on_cpu else ''}",
        ]
    )


def _training(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..benchmarks.training import DEFAULT_RECIPE, benchmark_training, drawn_pictures
    from ..training.arguments import load_recipe, make_recipe

    if args.data is not None and args.size is not None:
        raise ValueError("data and size are both given: drawn pictures have a size, those of data have their own")
    fields = {
        "source": args.data,
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "mixed_precision": {"float32": '"no"', "bfloat16": "bf16", "float16": "fp16"}.get(args.dtype),
        "compile": args.compile or None,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    if args.data is None:
        fields = drawn_pictures(*(args.size or (320, 544)), num_pictures=8 * (args.batch_size or 1)) | fields
    recipe = make_recipe(DEFAULT_RECIPE, fields) if args.recipe is None else load_recipe(args.recipe, fields)
    peers = [name for name in args.peers.split(",") if name]
    figures = benchmark_training(recipe, repetitions=args.repetitions, peers=peers)
    return figures, training_table(figures)


def _loss(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..benchmarks.loss import benchmark_loss

    figures = benchmark_loss(
        num_queries=args.queries,
        num_objects=args.objects,
        num_stages=args.stages,
        batch_size=args.batch_size,
        num_labels=args.classes,
        repetitions=args.repetitions,
    )
    return figures, loss_table(figures)


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


def _spread(summary: Mapping[str, float], digits: int, factor: float = 1) -> str:
    low, middle, high = (f"{factor * summary[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle} ({low} - {high})"


def _mebibytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**20:.0f}"
