"""The figures of the benchmarks as lines of text: medians, and in brackets the least and the most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .inference import PARTS, slope
from .peers import PEERS


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


def training_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of the training benchmark as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.training.benchmark_training`.

    Returns:
        `str`: A line a part of the step, then a line a model: medians, and the spread in brackets.
    """
    on_cpu = figures["device"] == "cpu"
    lines = [f"{'part':<18}{'ms':>28}{'share':>8}" + (f"{'ms of processors':>28}{'share':>8}" if on_cpu else "")]
    for name, part in figures["parts"].items():
        columns = [("seconds", "share"), *([("processor_seconds", "processor_share")] if on_cpu else [])]
        lines.append(
            f"{name.replace('_', ' '):<18}"
            + "".join(f"{_spread(part[time], 1, 1000):>28}{part[share]['median']:>8.1%}" for time, share in columns)
        )
    lines.append(f"{'pictures a second':<18}{_spread(figures['pictures_per_second'], 2):>28}")
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
    for name, step in figures["without"].items():
        lines.append(f"{'  without ' + name:<36}{_spread(step[clock], 2):>20}{_spread(step['ratio'], 2):>22}")
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
    for queries in dict.fromkeys(case["num_queries"] for case in figures["cases"]):
        cases = [case for case in figures["cases"] if case["num_queries"] == queries]
        if len({case["num_objects"] for case in cases}) > 1:
            (start, rise), (_, rise_of_theirs) = (
                slope([(case["num_objects"], 1000 * case[name][clock]["median"]) for case in cases])
                for name in ("drmm", "deformable_detr")
            )
            lines.append(
                f"{queries} queries: about {start:.0f} ms and {rise:.2f} more for each object of a picture; "
                f"Deformable DETR {rise_of_theirs:.1f}"
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


def inference_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of the inference benchmark as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.inference.benchmark_inference`.

    Returns:
        `str`: A line a detector and type, with the shares of its parts below; then a line a point of each curve, with
        the slope.
    """
    clock = "processor_seconds" if figures["device"] == "cpu" else "seconds"
    width = max(24, *(len(one["name"]) + 2 for one in figures["contestants"]))
    # Threads wait for each other, which costs processors and no time of the clock on the wall.
    with_wall = clock == "processor_seconds" and figures["threads"] > 1
    lines = [
        f"{'one pass':<{width}}{'type':<18}{'ms':>24}{'ratio':>20}{'GFLOP':>7}{'of roofline':>20}{'MiB':>6}"
        f"{'params (M)':>12}" + (f"{'ms of wall clock':>24}" if with_wall else "")
    ]
    for one in figures["contestants"]:
        kind = one["dtype"] + (" compiled" if one["compiled"] else "")
        lines.append(
            f"{one['name']:<{width}}{kind:<18}{_spread(one[clock], 0, 1000):>24}{_spread(one['ratio'], 2):>20}"
            f"{one['flops'] / 1e9:>7.0f}{_spread(one['roofline_share'], 2):>20}{_mebibytes(one['bytes']):>6}"
            f"{one['num_parameters'] / 1e6:>12.1f}" + (f"{_spread(one['seconds'], 0, 1000):>24}" if with_wall else "")
        )
    lines.append("")
    for one in figures["contestants"]:
        if one["parts"]:
            shares = ", ".join(f"{name} {share['median']:.0%}" for name, share in one["parts"].items())
            lines.append(f"{one['name']}, {one['dtype']}: {shares}")
    of = figures["curves_of"]
    for axis, points in figures["curves"].items():
        lines += ["", f"{axis.replace('_', ' '):<{width}}{'ms':>24}{'GFLOP':>9}{'MiB':>7}"]
        lines += [
            f"{point['value']:<{width}}{_spread(point[clock], 0, 1000):>24}{point['flops'] / 1e9:>9.0f}"
            f"{_mebibytes(point['bytes']):>7}"
            for point in points
        ]
        if len({point["value"] for point in points}) > 1:
            # Pixels are what grows with the height, its square.
            unit, power = ("1000 rows squared", 2) if axis == "height" else (f"one of {axis}", 1)
            scale = 1e-6 if axis == "height" else 1
            positions = [scale * point["value"] ** power for point in points]
            times = [1000 * point[clock]["median"] for point in points]
            start, rise = slope(list(zip(positions, times, strict=True)))
            lines.append(f"about {start:.0f} ms and {rise:.1f} more for each {unit.replace('_', ' ')}")
    height, breadth = figures["size"]
    on_cpu = figures["device"] == "cpu"
    rates = ", ".join(f"{_spread(rate, 0, 1e-9)} in {dtype}" for dtype, rate in figures["matmul"].items())
    lines += [
        "",
        f"{figures['batch_size']} x {height} x {breadth}, {figures['num_labels']} classes, {figures['device']}, "
        f"{figures['threads']} threads, {figures['repetitions']} turns each{', processor time' if on_cpu else ''}",
        f"matrices multiply at {rates} GFLOP/s{' of one core' if on_cpu else ''}",
    ]
    if figures["curves"]:
        lines.append(f"curves: {of['name']}, {of['dtype']}")
    return "\n".join(lines)


def _spread(summary: Mapping[str, float], digits: int, factor: float = 1) -> str:
    low, middle, high = (f"{factor * summary[key]:.{digits}f}" for key in ("min", "median", "max"))
    return f"{middle} ({low} - {high})"


def _mebibytes(number: int | None) -> str:
    return "-" if number is None else f"{number / 2**20:.0f}"


def pooling_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of the pooling benchmark as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.pooling.benchmark_pooling`.

    Returns:
        `str`: A line for each direction and one for the memory.
    """
    lines = [f"{'':<12}{'drmm-hf ms':>26}{'torchvision ms':>26}{'ratio':>22}"]
    for part in ("forward", "backward"):
        times = [_spread(figures[name][part], 1, 1000) for name in ("drmm", "torchvision")]
        lines.append(f"{part:<12}{times[0]:>26}{times[1]:>26}{_spread(figures['ratio'][part], 2):>22}")
    memory = [_mebibytes(figures[name]["bytes"]) for name in ("drmm", "torchvision")]
    height, width = figures["size"]
    on_cpu = figures["device"] == "cpu"
    return "\n".join(
        [
            *lines,
            f"{'MiB':<12}{memory[0]:>26}{memory[1]:>26}",
            "",
            f"{figures['num_boxes']} boxes of each of {figures['batch_size']} pictures of {height} x {width}, "
            f"{figures['channels']} channels, {figures['device']}, {figures['threads']} threads, "
            f"{figures['repetitions']} turns each{', processor time' if on_cpu else ''}",
            f"largest difference of the results: {figures['difference']:.1e}",
        ]
    )


def paths_table(figures: Mapping[str, Any]) -> str:
    """Return the figures of the benchmark of fast paths as lines of text.

    Args:
        figures (`Mapping`): From `drmm_hf.benchmarks.paths.benchmark_paths`.

    Returns:
        `str`: For each detector a line for each path that is left out.
    """
    lines = []
    for name, rows in figures["detectors"].items():
        lines.append(f"{name + ', without':<36}{'ms':>22}{'ratio':>20}" + "".join(f"{part:>10}" for part in PARTS))
        for left_out, row in rows.items():
            parts = "".join(f"{1000 * row[part]['median']:>10.0f}" for part in PARTS)
            lines.append(f"{left_out:<36}{_spread(row['cost'], 0, 1000):>22}{_spread(row['ratio'], 2):>20}{parts}")
        lines.append("")
    height, width = figures["size"]
    on_cpu = figures["device"] == "cpu"
    return "\n".join(
        [
            *lines,
            f"{figures['batch_size']} x {height} x {width}, {figures['dtype']}, {figures['device']}, "
            f"{figures['threads']} threads, {figures['repetitions']} turns each{', processor time' if on_cpu else ''}",
        ]
    )


TABLES = {
    "paths": paths_table,
    "pooling": pooling_table,
    "infer": inference_table,
    "train": training_table,
    "loss": loss_table,
    "loader": loader_table,
    "eval": evaluation_table,
    "cost": cost_table,
}
