"""`drmm benchmark`: measure speed, each kind of measurement a subcommand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .counts import at_least
from .document import add_json


# Of each kind, what stands behind its name.
EXAMPLES = {
    "loader": "DATA --split val",
    "cost": "runs/quickstart/best --speed",
    "eval": "--num-pictures 500",
    "infer": "--model runs/quickstart/best --size 320 320",
    "train": "--recipe scripts/recipes/quickstart_generated.yaml",
    "loss": "--objects 15",
    "pooling": "--boxes 100",
    "paths": "--model runs/quickstart/best --size 320 320",
}


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
    loader.add_argument("--batch-size", type=at_least(1), default=4, metavar="N", help="pictures a batch (default: 4)")
    loader.add_argument(
        "--num-workers", type=at_least(0), default=0, metavar="N", help="processes that read (default: 0, this one)"
    )
    loader.add_argument(
        "--num-pictures", type=at_least(1), default=64, metavar="N", help="pictures a turn (default: 64)"
    )
    loader.add_argument(
        "--repetitions", type=at_least(1), default=5, metavar="N", help="turns of each loader (default: 5)"
    )
    loader.add_argument(
        "--shortest-edge", type=at_least(1), default=800, metavar="PX", help="shorter side (default: 800)"
    )
    loader.add_argument(
        "--longest-edge", type=at_least(1), default=1333, metavar="PX", help="its bound (default: 1333)"
    )
    cost = kinds.add_parser("cost", help="parameters and multiply-adds of a detector; with --speed, pictures a second")
    cost.set_defaults(measure=_cost)
    cost.add_argument(
        "model", metavar="MODEL_OR_RECIPE", help="folder or Hub id of a detector, or a recipe's yaml file"
    )
    cost.add_argument(
        "--size",
        type=at_least(1),
        nargs=2,
        default=[800, 1280],
        metavar=("H", "W"),
        help="model input (default: 800 1280)",
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
    evaluation.add_argument(
        "--num-pictures", type=at_least(1), default=5000, metavar="N", help="pictures (default: 5000)"
    )

    inference = kinds.add_parser(
        "infer", help="a pass from pixels to boxes, beside transformers' detectors; cost curves"
    )
    inference.set_defaults(measure=_inference)
    inference.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL_OR_RECIPE",
        help="detectors (default: R50 on Sparse R-CNN and on AdaMixer)",
    )
    inference.add_argument(
        "--size", type=at_least(1), nargs=2, default=[800, 1344], metavar=("H", "W"), help="input (default: 800 1344)"
    )
    inference.add_argument("--batch-size", type=at_least(1), default=1, metavar="N", help="pictures (default: 1)")
    inference.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        default=["float32"],
        help="of weights and pictures (default: float32)",
    )
    inference.add_argument("--compile", action="store_true", help="also run each model compiled; takes minutes")
    inference.add_argument(
        "--peers", default="", metavar="NAMES", help="models of transformers beside it, as deformable_detr,detr"
    )
    inference.add_argument("--repetitions", type=at_least(1), default=5, metavar="N", help="turns (default: 5)")
    for option, what in (
        ("--heights", "heights of the input; its width grows along"),
        ("--batch-sizes", "numbers of pictures"),
        ("--queries", "numbers of queries"),
        ("--stages", "numbers of stages"),
    ):
        inference.add_argument(option, type=at_least(1), nargs="+", metavar="N", help=f"cost curve over {what}")
    inference.add_argument("--picture", metavar="FILE", help="where to draw the figures")

    training = kinds.add_parser("train", help="the training step, part by part, and beside transformers' detectors")
    training.set_defaults(measure=_training)
    training.add_argument("--recipe", metavar="FILE", help="recipe to measure (default: ResNet-50 on Sparse R-CNN)")
    training.add_argument("--data", metavar="DIR", help="train on these data, as the recipe augments them")
    training.add_argument(
        "--size",
        type=at_least(1),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="draw pictures of this size instead (default: 320 544)",
    )
    training.add_argument(
        "--batch-size", type=at_least(1), metavar="N", help="pictures a step (default: the recipe's, or 1)"
    )
    training.add_argument(
        "--num-workers", type=at_least(0), metavar="N", help="processes that load (default: the recipe's)"
    )
    training.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="autocast to this type")
    training.add_argument("--compile", action="store_true", help="compile the models; takes minutes")
    training.add_argument(
        "--repetitions", type=at_least(1), default=5, metavar="N", help="steps that count (default: 5)"
    )
    training.add_argument(
        "--peers", default="", metavar="NAMES", help="models of transformers to train too, as deformable_detr,detr"
    )
    training.add_argument(
        "--paths", action="store_true", help="also steps with the plain way in the place of each fast path"
    )

    loss = kinds.add_parser("loss", help="the criterion, beside transformers' Deformable DETR loss with its matching")
    loss.set_defaults(measure=_loss)
    loss.add_argument(
        "--queries", type=at_least(1), nargs="+", default=[300], metavar="K", help="queries (default: 300)"
    )
    loss.add_argument(
        "--objects",
        type=at_least(1),
        nargs="+",
        default=[15, 100],
        metavar="N",
        help="objects a picture (default: 15 100)",
    )
    loss.add_argument("--stages", type=at_least(1), default=6, metavar="S", help="stages (default: 6)")
    loss.add_argument("--batch-size", type=at_least(1), default=8, metavar="B", help="pictures (default: 8)")
    loss.add_argument("--classes", type=at_least(1), default=80, metavar="C", help="classes (default: 80)")
    loss.add_argument(
        "--repetitions", type=at_least(1), default=10, metavar="N", help="turns of each loss (default: 10)"
    )

    pooling = kinds.add_parser("pooling", help="regions pooled from a pyramid, beside torchvision's operator")
    pooling.set_defaults(measure=_pooling)
    pooling.add_argument(
        "--size", type=at_least(1), nargs=2, default=[800, 1344], metavar=("H", "W"), help="input (default: 800 1344)"
    )
    pooling.add_argument("--batch-size", type=at_least(1), default=1, metavar="N", help="pictures (default: 1)")
    pooling.add_argument("--boxes", type=at_least(1), default=300, metavar="K", help="boxes a picture (default: 300)")
    pooling.add_argument("--repetitions", type=at_least(1), default=5, metavar="N", help="turns (default: 5)")

    paths = kinds.add_parser("paths", help="a pass without each of its fast paths, beside the pass as it is")
    paths.set_defaults(measure=_paths)
    paths.add_argument(
        "--model",
        nargs="+",
        metavar="MODEL_OR_RECIPE",
        help="detectors (default: R50 on Sparse R-CNN and on AdaMixer)",
    )
    paths.add_argument(
        "--size", type=at_least(1), nargs=2, default=[800, 1344], metavar=("H", "W"), help="input (default: 800 1344)"
    )
    paths.add_argument("--batch-size", type=at_least(1), default=1, metavar="N", help="pictures (default: 1)")
    paths.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of weights and pictures (default: float32)",
    )
    paths.add_argument("--repetitions", type=at_least(1), default=3, metavar="N", help="turns (default: 3)")
    for name, kind in kinds.choices.items():
        kind.add_argument("--output", metavar="FILE", help="where to write the figures as json")
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        kind.epilog = f"example: drmm benchmark {name} {EXAMPLES[name]}"
        add_json(kind)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and write the figures.

    Args:
        args (`argparse.Namespace`): The parsed arguments.

    Returns:
        `int`: 0.
    """
    if args.output is not None:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad place costs none
    figures = args.measure(args)

    from ..benchmarks.tables import TABLES
    from ..evaluation.files import write_json

    args.document = figures
    print(TABLES[args.kind](figures))
    if args.output is not None:
        write_json(figures, args.output)
        print(f"written to {args.output}")
    if getattr(args, "picture", None) is not None:
        from ..visualization.cost_diagram import cost_diagram

        print(f"written to {cost_diagram(figures, args.picture)}")
    return 0


def _detectors(models: list[str] | None) -> dict[str, Any]:
    """Return configs of models and recipes by their names; of D-RMM on ResNet-50 if none are named."""
    from ..conversion.model_source import find_source
    from ..modeling.configuration_drmm import DrmmConfig
    from ..training.arguments import load_recipe

    if not models:
        return {
            "D-RMM R50, Sparse R-CNN": DrmmConfig(),
            "D-RMM R50, AdaMixer": DrmmConfig(decoder_type="adamixer", proposal_grid=None),
        }
    configs = {}
    for model in models:
        if model.endswith((".yaml", ".yml")):
            configs[model] = DrmmConfig(**load_recipe(model).model)
            continue
        source = find_source(model)
        kind = DrmmConfig.get_config_dict(source)[0].get("model_type")
        if kind != "drmm":
            raise ValueError(
                f"model {model!r} is a {kind!r}; the rule is a D-RMM or a recipe. Others run with --peers."
            )
        configs[model] = DrmmConfig.from_pretrained(source)
    return configs


def _inference(args: argparse.Namespace) -> dict[str, Any]:
    from ..benchmarks.inference import benchmark_inference

    growing = {"height": args.heights, "batch_size": args.batch_sizes}
    growing |= {"num_queries": args.queries, "num_stages": args.stages}
    return benchmark_inference(
        _detectors(args.model),
        height=args.size[0],
        width=args.size[1],
        batch_size=args.batch_size,
        dtypes=args.dtype,
        peers=[name for name in args.peers.split(",") if name],
        compile=args.compile,
        repetitions=args.repetitions,
        growing={axis: values for axis, values in growing.items() if values},
    )


def _cost(args: argparse.Namespace) -> dict[str, Any]:
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
    return figures


def _training(args: argparse.Namespace) -> dict[str, Any]:
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
    return benchmark_training(recipe, repetitions=args.repetitions, peers=peers, paths=args.paths)


def _paths(args: argparse.Namespace) -> dict[str, Any]:
    from ..benchmarks.paths import benchmark_paths

    height, width = args.size
    return benchmark_paths(
        _detectors(args.model),
        height=height,
        width=width,
        batch_size=args.batch_size,
        dtype=args.dtype,
        repetitions=args.repetitions,
    )


def _pooling(args: argparse.Namespace) -> dict[str, Any]:
    from ..benchmarks.pooling import benchmark_pooling

    height, width = args.size
    return benchmark_pooling(
        height=height,
        width=width,
        batch_size=args.batch_size,
        num_boxes=args.boxes,
        repetitions=args.repetitions,
    )


def _loss(args: argparse.Namespace) -> dict[str, Any]:
    from ..benchmarks.loss import benchmark_loss

    figures = benchmark_loss(
        num_queries=args.queries,
        num_objects=args.objects,
        num_stages=args.stages,
        batch_size=args.batch_size,
        num_labels=args.classes,
        repetitions=args.repetitions,
    )
    return figures


def _loader(args: argparse.Namespace) -> dict[str, Any]:
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
    return figures


def _evaluation(args: argparse.Namespace) -> dict[str, Any]:
    from ..benchmarks.evaluation import benchmark_evaluation

    figures = benchmark_evaluation(args.num_pictures)
    return figures
