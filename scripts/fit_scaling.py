"""Fit how memory and arithmetic grow with pictures and queries, and predict larger trainings, for docs/scaling.md.

Bytes and floating-point operations are counted operation by operation, forward and backward, on tensors without data
(`FakeTensorMode`): exact for what the model allocates, on any device, in seconds; workspaces inside kernels are not in
it. `--check` computes one point and reads the resident memory of this process beside the count. `--loader` times the
loader. Each part is kept in OUTPUT and not measured again; then all are fitted by least squares and printed with their
residuals, and what follows for other machines is printed as predictions.

    python scripts/fit_scaling.py OUTPUT [--count] [--check] [--loader]
"""

import argparse
import json
import weakref
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers.initialization import no_init_weights

from drmm_hf import DrmmConfig, DrmmForObjectDetection, DrmmImageProcessor
from drmm_hf.benchmarks.measuring import peak_memory, processor_seconds
from drmm_hf.benchmarks.training import drawn_pictures
from drmm_hf.data.coco import categories
from drmm_hf.data.generated import generate_shapes
from drmm_hf.data.labels import LabelMap
from drmm_hf.modeling.criteria import Targets, reduce_terms
from drmm_hf.training.arguments import make_recipe
from drmm_hf.training.build import training_loader


GIB = 2**30
OBJECTS = 10  # ground truths a picture
# Height, width, pictures, queries, stages.
FULL, HALF = (800, 1344), (480, 800)
POINTS = {
    "float32": [
        (320, 512, 1, 300, 6),
        (640, 1056, 1, 300, 6),
        (*HALF, 1, 300, 6),
        (*FULL, 1, 300, 6),
        (*FULL, 2, 300, 6),
        (*HALF, 1, 1000, 6),
        (*HALF, 1, 2000, 6),
        (*HALF, 2, 1000, 3),
    ],
    "bfloat16": [(*HALF, 1, 300, 6), (*FULL, 1, 300, 6), (*HALF, 2, 1000, 3), (*HALF, 1, 2000, 6)],
    "bfloat16, checkpointed": [(*HALF, 1, 300, 6), (*FULL, 1, 300, 6), (*HALF, 2, 1000, 3), (*HALF, 1, 2000, 6)],
}


class TensorMemory(TorchDispatchMode):
    """Count operations that are no views, and follow the bytes of all storages that they make, and the most at once.

    Args:
        *known (`torch.Tensor`): What is there before and does not count.
    """

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.live = {id(tensor.untyped_storage()): tensor for tensor in known}
        self.now = self.peak = self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run an operation and take in what it returns."""
        out = function(*args, **(kwargs or {}))
        self.operations += not getattr(function, "is_view", False)
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and id(value.untyped_storage()) not in self.live:
                storage = value.untyped_storage()
                self.live[id(storage)] = weakref.finalize(storage, self._free, id(storage), storage.nbytes())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return out

    def _free(self, key, size):
        del self.live[key]
        self.now -= size


def one_pass(model: DrmmForObjectDetection, pictures: torch.Tensor, autocast: bool) -> None:
    """Go forward and backward; targets are made here, since the check of labels looks at values."""
    batch, _, height, width = pictures.shape
    corners = torch.rand(batch, OBJECTS, 2) * 0.5
    targets = Targets(
        torch.cat([corners, corners + 0.3], -1) * torch.tensor([width, height, width, height]),
        torch.zeros(batch, OBJECTS, dtype=torch.int64),
        torch.ones(batch, OBJECTS, dtype=torch.bool),
        torch.tensor([[height, width]]).expand(batch, -1),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = model.model(pictures)
    loss, _ = reduce_terms(model.loss_function(outputs.stages, targets, model.config), targets, model.config)
    loss.backward()


def build(queries: int, stages: int, form: str) -> DrmmForObjectDetection:
    """Build the paper's ResNet-50 detector on Sparse R-CNN, its stem and first stage frozen."""
    grid = {"proposal_grid": None} if queries != 300 else {}
    config = DrmmConfig(num_queries=queries, num_stages=stages, freeze_backbone_stages=1, **grid)
    model = DrmmForObjectDetection(config).train()
    if "checkpointed" in form:
        model.gradient_checkpointing_enable()
    return model


def count(form: str, point: tuple[int, ...]) -> dict:
    """Count the bytes at the peak of a pass, gradients of the weights included, and its operations.

    Args:
        form (`str`): Key of `POINTS`.
        point (`tuple[int, ...]`): Height, width, pictures, queries, stages.

    Returns:
        `dict`: `form`, `point`, `bytes`, `flops`, `operations` and the numbers of `parameters` and `trained` ones.
    """
    height, width, batch, queries, stages = point
    with FakeTensorMode(), no_init_weights():
        model = build(queries, stages, form)
        pictures = torch.empty(batch, 3, height, width)
        memory = TensorMemory(pictures, *model.parameters(), *model.buffers())
        with memory:
            one_pass(model, pictures, form != "float32")
        # In a pass of its own: under checkpointing the counter keeps alive what is computed again.
        with FlopCounterMode(display=False) as counter:
            one_pass(model, pictures, form != "float32")
        # Attention's fused kernel on CPUs has no formula there: two products forward, four backward.
        attention = 3 * stages * batch * 4 * queries**2 * model.config.hidden_size
        sizes = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "operations": memory.operations,
        }
    return {
        "form": form,
        "point": point,
        "bytes": memory.peak,
        "flops": counter.get_total_flops() + attention,
        **sizes,
    }


def check(point: tuple[int, ...]) -> dict:
    """Compute a pass in float32 and read what it adds to the resident memory of this process."""
    height, width, batch, queries, stages = point
    model = build(queries, stages, "float32")
    pictures = torch.randn(batch, 3, height, width)
    one_pass(model, pictures, False)
    model.zero_grad()
    memory = peak_memory(lambda: one_pass(model, pictures, False), torch.device("cpu"))
    return {"point": point, "bytes": memory.added}


def time_loader(num_pictures: int = 96) -> dict:
    """Load JPEGs of COCO's size with the paper's augmentation; return pictures of one core's second."""
    dataset = generate_shapes(num_pictures, seed=0, image_size=(480, 640), noise=10.0)
    images = []
    for row in dataset:
        buffer = BytesIO()
        row["image"].save(buffer, "jpeg", quality=90)
        images.append({"bytes": buffer.getvalue(), "path": None})
    dataset = dataset.remove_columns("image").add_column("image", images)
    edges = list(range(480, 801, 32))
    fields = drawn_pictures(800, 1333, num_pictures) | {
        "augmentation": "paper",
        "short_edges": edges,
        "num_workers": 0,
    }
    recipe = make_recipe({"training": {"max_steps": 1}}, fields)
    size = {"shortest_edge": 800, "longest_edge": 1333}
    loader = training_loader(
        dataset, LabelMap.from_categories(categories(dataset)), DrmmImageProcessor(size=size), recipe
    )
    next(iter(loader))
    before = processor_seconds()
    pixels = sum(batch["pixel_values"][:, 0].numel() for batch in loader)
    kilobytes = sum(len(image["bytes"]) for image in images) / num_pictures / 1024
    seconds = processor_seconds() - before
    return {"pictures_per_core_second": num_pictures / seconds, "pixels": pixels / num_pictures, "jpeg_kib": kilobytes}


def features(point: tuple[int, ...]) -> list[float]:
    """Return what memory and operations are linear in: 1, input pixels, query-stages; the last two times pictures."""
    height, width, batch, queries, stages = point
    return [1.0, batch * height * width, batch * stages * queries]


def fit(entries: list[dict], name: str) -> np.ndarray:
    """Fit a quantity by least squares of relative errors; return the coefficients of `features`."""
    values = np.array([entry[name] for entry in entries], dtype=float)
    rows = np.array([features(entry["point"]) for entry in entries]) / values[:, None]
    scale = np.abs(rows).max(0)
    return np.linalg.lstsq(rows / scale, np.ones(len(values)), rcond=None)[0] / scale


def at(coefficients: np.ndarray, point: tuple[int, ...]) -> float:
    """Evaluate a fit."""
    return float(np.dot(coefficients, features(point)))


# Assumptions about machines that were not at hand; docs/scaling.md says where they are from.
GPU_FLOPS = 989e12  # bfloat16, dense, H100 SXM
UTILISATION = (0.1, 0.25)  # share of it that a step reaches, all included
HOST_SECONDS = (5e-6, 1e-5)  # of the host to issue one, forward or backward
NVLINK, NETWORK = 450e9, 25e9  # bytes a second and direction, of a GPU in its node, and of a node


def step_seconds(form: str, point: tuple[int, ...], fits: dict, operations: int) -> list[float]:
    """Predict the time of a step on one GPU, at best and at worst: of the GPU or of the host that feeds it."""
    flops = at(fits[form]["flops"], point)
    host, shares = (operations * seconds for seconds in HOST_SECONDS), UTILISATION[::-1]
    return [max(flops / (GPU_FLOPS * share), launch) for share, launch in zip(shares, host, strict=True)]


def gpu_bytes(form: str, point: tuple[int, ...], fits: dict, sizes: dict, shards: int = 1, ema: bool = False) -> float:
    """Predict the memory of one GPU: weights, Adam's states, buckets of DDP (none where sharded), average, a pass."""
    states = 4 * sizes["parameters"] + 8 * sizes["trained"] + (4 * sizes["trained"] if shards == 1 else 0)
    return states / shards + (4 * sizes["parameters"] if ema else 0) + at(fits[form]["bytes"], point)


def reduce_seconds(bytes_: float, nodes: int, gpus: int = 8) -> float:
    """Predict the time of an all-reduce: a ring in the node, and one over nodes where there are several."""
    inside = 2 * (gpus - 1) / gpus * bytes_ / NVLINK
    return inside + (2 * (nodes - 1) / nodes * bytes_ / NETWORK if nodes > 1 else 0)


def draw(counted: list[dict], fits: dict, checked: dict | None, path: Path) -> None:
    """Draw memory against size and against queries: counted points and fits, and a point that was computed."""
    figure = Figure(figsize=(10, 3.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    styles = {"float32": ("#0072b2", "o"), "bfloat16": ("#e69f00", "s"), "bfloat16, checkpointed": ("#009e73", "^")}
    for form, (colour, marker) in styles.items():
        points = [(entry["point"], entry["bytes"] / GIB) for entry in counted if entry["form"] == form]
        sizes = [(h * w / 1e6, y) for (h, w, b, k, s), y in points if (b, k, s) == (1, 300, 6)]
        queries = [(k, y) for (h, w, b, k, s), y in points if (h, w, b, s) == (*HALF, 1, 6)]
        for axes, shown in ((left, sizes), (right, queries)):
            axes.plot(*zip(*shown, strict=True), color=colour, marker=marker, linestyle="none", label=form)
        megapixels, ks = np.linspace(0.1, 1.2, 50), np.linspace(50, 2100, 50)
        left.plot(
            megapixels, [at(fits[form]["bytes"], (1, m * 1e6, 1, 300, 6)) / GIB for m in megapixels], color=colour
        )
        right.plot(ks, [at(fits[form]["bytes"], (*HALF, 1, k, 6)) / GIB for k in ks], color=colour)
    if checked is not None:
        height, width, _, queries, _ = checked["point"]
        for axes, x in ((left, height * width / 1e6), (right, queries)):
            axes.plot(x, checked["bytes"] / GIB, "o", color="#0072b2", mfc="white", label="float32, resident on a CPU")
    left.set(
        xlabel="megapixels of the padded picture", ylabel="GiB at the peak of a pass", ylim=(0, None), xlim=(0, 1.25)
    )
    right.set(xlabel="queries", ylim=(0, None), xlim=(0, 2150))
    left.set_title("One picture, 300 queries", loc="left", fontweight="bold")
    right.set_title(f"One picture of {HALF[0]} x {HALF[1]}", loc="left", fontweight="bold")
    left.legend(frameon=False, title="points counted, lines fitted", alignment="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#d9dde3", linewidth=0.7)
    figure.savefig(path)


def report(results: dict, output: Path) -> None:
    """Fit, print tables for docs/scaling.md and draw the picture."""
    counted = [{**entry, "point": tuple(entry["point"])} for entry in results["counted"]]
    forms = list(dict.fromkeys(entry["form"] for entry in counted))
    fits = {f: {n: fit([e for e in counted if e["form"] == f], n) for n in ("bytes", "flops")} for f in forms}
    sizes = next(e for e in counted if e["form"] == "bfloat16" and e["point"][3:] == (300, 6))
    print(f"parameters {sizes['parameters']:,}, trained {sizes['trained']:,}, operations {sizes['operations']:,}")
    table(
        "precision",
        "MiB: constant",
        "a megapixel",
        "a query and stage",
        "GFLOP: constant",
        "a megapixel",
        "a query and stage",
    )
    for form in forms:
        m, f = fits[form]["bytes"] / 2**20, fits[form]["flops"] / 1e9
        row(form, f"{m[0]:.0f}", f"{m[1] * 1e6:.0f}", f"{m[2]:.3f}", f"{f[0]:.0f}", f"{f[1] * 1e6:.0f}", f"{f[2]:.3f}")
    table("precision", "picture", "pictures", "queries", "stages", "GiB", "fit", "TFLOP", "fit")
    for e in counted:
        h, w, b, k, s = e["point"]
        off = [f"{at(fits[e['form']][n], e['point']) / e[n] - 1:+.1%}" for n in ("bytes", "flops")]
        row(e["form"], f"{h} x {w}", b, k, s, f"{e['bytes'] / GIB:.2f}", off[0], f"{e['flops'] / 1e12:.3f}", off[1])
    if "check" in results:
        point, real = tuple(results["check"]["point"]), results["check"]["bytes"] / GIB
        (same,) = (e["bytes"] / GIB for e in counted if (e["form"], e["point"]) == ("float32", point))
        print(f"\ncomputed on the CPU at {point}: {real:.2f} GiB resident, {same:.2f} counted")
    if "loader" in results:
        one = results["loader"]
        print(
            f"\nloader: {one['pictures_per_core_second']:.1f} pictures a second of one core, "
            f"{one['pixels'] / 1e6:.2f} padded megapixels each, JPEGs of {one['jpeg_kib']:.0f} KiB"
        )
    predict(fits, sizes, results.get("loader", {}).get("pictures_per_core_second"))
    draw(counted, fits, results.get("check"), output / "scaling_memory.png")


def predict(fits: dict, sizes: dict, loader_rate: float | None) -> None:
    """Print what the fits and the assumptions say about GPUs."""
    print("\npredicted memory of a GPU, GiB, with DDP; in brackets with FSDP2 on 8")
    table("pictures a GPU", "queries", *fits)
    for batch, queries in ((2, 300), (8, 300), (16, 300), (2, 2000), (8, 2000), (2, 3600)):
        point = (*FULL, batch, queries, 6)
        cells = [[gpu_bytes(form, point, fits, sizes, shards) / GIB for shards in (1, 8)] for form in fits]
        row(batch, queries, *(f"{whole:.1f} ({sharded:.1f})" for whole, sharded in cells))
    print("\npredicted steps in bfloat16, milliseconds")
    columns = (
        "pictures/s of 8",
        "of 32",
        "COCO, hours on 8",
        "on 32",
        "Objects365, hours on 8",
        "on 32",
        "cores a GPU",
    )
    table("pictures a GPU", "queries", "compute", "all-reduce, 1 node", "4 nodes", *columns)
    for batch, queries in ((2, 300), (8, 300), (2, 2000), (8, 2000)):
        point = (*FULL, batch, queries, 6)
        times = step_seconds("bfloat16", point, fits, sizes["operations"])
        reductions = [reduce_seconds(4 * sizes["trained"], nodes) for nodes in (1, 4)]
        # The reduction overlaps with the backward pass, two thirds of the computation.
        rates = [
            [8 * nodes * batch / (seconds / 3 + max(2 * seconds / 3, reduction)) for seconds in times[::-1]]
            for nodes, reduction in zip((1, 4), reductions, strict=True)
        ]
        row(
            *(batch, queries, between([1000 * seconds for seconds in times])),
            *(f"{1000 * reduction:.1f}" for reduction in reductions),
            *(between(pair) for pair in rates),
            *(between([36 * n / r / 3600 for r in pair[::-1]]) for n in (118e3, 1.7e6) for pair in rates),
            "-" if loader_rate is None else between([rate / 8 / loader_rate for rate in rates[0]]),
        )


def table(*columns: str) -> None:
    """Print the head of a table."""
    print()
    row(*columns)
    row(*("---" for _ in columns))


def row(*cells) -> None:
    """Print a line of a table."""
    print("|", *(f"{cell} |" for cell in cells))


def between(pair: list[float]) -> str:
    """Return two numbers as a range."""
    return " - ".join(f"{value:.{0 if value >= 20 else 1}f}" for value in pair)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    for part in ("count", "check", "loader"):
        parser.add_argument(f"--{part}", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "scaling.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    if args.count:
        work = [(form, point) for form, points in POINTS.items() for point in points]
        results["counted"] = [count(*one) for one in tqdm(work)]
    if args.check:
        results["check"] = check((*HALF, 1, 300, 6))
    if args.loader:
        results["loader"] = time_loader()
    file.write_text(json.dumps(results, indent=1))
    if "counted" in results:
        report(results, args.output)
