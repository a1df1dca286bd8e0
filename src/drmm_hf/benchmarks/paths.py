"""What each fast path of a pass gives: the same pass with the plain way in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling import adamixer_stage, criteria, decoder, sparse_rcnn_stage
from ..modeling.backbone import FoldingConvLayer
from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.modeling_drmm import DrmmForObjectDetection
from .inference import PARTS, Pass
from .measuring import Seconds, check_least, environment, summary, take_turns
from .pooling import pool_by_level


def _norm_as_layer(layer: FoldingConvLayer, hidden_states: Tensor) -> Tensor:
    hidden_states = layer.normalization(layer.convolution(hidden_states))
    return layer.activation(hidden_states) if hasattr(layer, "activation") else hidden_states


def _channels_first(model: DrmmForObjectDetection) -> Iterator[None]:
    network = model.model.backbone.network
    hook = network.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _pool_by_level(maps: list[Tensor], boxes: Tensor, *_: Any) -> Tensor:
    maps = [one.to(boxes.dtype) for one in maps]  # torchvision takes one type, autocast makes two
    return pool_by_level(maps, boxes).unflatten(0, boxes.shape[:2])


def sample_by_level(maps: list[Tensor], points: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Sample each level by `grid_sample` and add them up; see `drmm_hf.modeling.adamixer_stage.sample_maps`.

    Args:
        maps (`list[torch.Tensor]`): Maps of shape `(B, C, H_l, W_l)`, finest first.
        points (`torch.Tensor` of shape `(B, K, groups, P, 3)`): x and y in pixels of the model input, and z.
        strides (`tuple[int, ...]`): Pixels per cell of each map.

    Returns:
        `torch.Tensor` of shape `(B, K, groups, P, C / groups)`.
    """
    batch, _, groups, _, _ = points.shape
    stride = points.new_tensor(strides)
    level_weight = F.softmax(-((points[..., 2:] - stride.log2()) ** 2) / 2, dim=-1).transpose(1, 2).flatten(0, 1)
    xy, total = points[..., :2].transpose(1, 2).flatten(0, 1), 0
    for level, (features, pixels) in enumerate(zip(maps, strides, strict=True)):
        height, width = features.shape[-2:]
        grid = 2 * xy / (pixels * xy.new_tensor([width, height])) - 1
        by_group = features.to(points.dtype).unflatten(1, (groups, -1)).flatten(0, 1)
        sampled = F.grid_sample(by_group, grid, padding_mode="zeros", align_corners=False)
        total = total + sampled.permute(0, 2, 3, 1) * level_weight[..., level, None]
    return total.unflatten(0, (batch, groups)).transpose(1, 2)


class _MapsAlone(list):
    """Maps without the table that the decoder makes for all stages: each stage makes its own."""

    def __init__(self, maps: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__(maps)
        self.table = maps[0].new_empty(0, dtype=dtype)


def _no_table(model: DrmmForObjectDetection) -> Any:
    return patch.object(decoder, "FeatureMaps", _MapsAlone)


@contextmanager
def _plain(module: Any, name: str, function: Callable[..., Tensor], model: DrmmForObjectDetection) -> Iterator[None]:
    with _no_table(model), patch.object(module, name, function):  # the table is there for the sums alone
        yield


def _depthwise_convolutions(model: DrmmForObjectDetection) -> list[nn.Module]:
    return [module for module in model.model.backbone.modules() if isinstance(module.forward, partial)]


@contextmanager
def _as_autocast_says(model: DrmmForObjectDetection) -> Iterator[None]:
    with ExitStack() as stack:
        for module in _depthwise_convolutions(model):
            stack.enter_context(patch.object(module, "forward", module.forward.args[1]))
        yield


# By what is taken away: how, for a model.
PATHS: dict[str, Callable[[DrmmForObjectDetection], Any]] = {
    "norms in convolutions": lambda model: patch.object(FoldingConvLayer, "forward", _norm_as_layer),
    "channels last": contextmanager(_channels_first),
    "one table for all stages": _no_table,
    "one sum a region": partial(_plain, sparse_rcnn_stage, "pool_regions", _pool_by_level),
    "one sum a point": partial(_plain, adamixer_stage, "sample_maps", sample_by_level),
}
OF_TRAINING: dict[str, Callable[[DrmmForObjectDetection], Any]] = {
    "channels last": PATHS["channels last"],
    "one table for all stages": PATHS["one table for all stages"],
    "one sum a region": PATHS["one sum a region"],
    "one sum a point": PATHS["one sum a point"],
    "loss without a matrix": lambda model: patch.object(criteria, "sum_components", criteria.sum_matrix),
    "depthwise in float32": _as_autocast_says,
}
OF_DECODER = {"sparse_rcnn": "one sum a region", "adamixer": "one sum a point"}


def paths_of(config: DrmmConfig) -> dict[str, tuple[str, ...]]:
    """Return by its name what each contestant lacks: nothing, one of the decoder's fast paths, all of them."""
    paths = [name for name in PATHS if name not in OF_DECODER.values() or name == OF_DECODER[config.decoder_type]]
    if config.backbone_config.model_type != "resnet":
        paths.remove("norms in convolutions")
    return {"nothing": (), **{name: (name,) for name in paths}, "all of these": tuple(paths)}


def training_paths_of(model: DrmmForObjectDetection, mixed_precision: str) -> dict[str, tuple[str, ...]]:
    """Return by its name what each training step lacks: one of the fast paths, all of them.

    Args:
        model (`DrmmForObjectDetection`): The model.
        mixed_precision (`str`): `"no"`, `"bf16"` or `"fp16"`, the type of autocast.
    """
    config = model.config
    absent = {*OF_DECODER.values()} - {OF_DECODER[config.decoder_type]}
    if config.head_type != "mixture" or config.coordinate_distribution != "cauchy":
        absent.add("loss without a matrix")
    if mixed_precision == "no":
        absent |= {"channels last", "depthwise in float32"}
    elif not _depthwise_convolutions(model):
        absent.add("depthwise in float32")
    paths = [name for name in OF_TRAINING if name not in absent]
    return {**{name: (name,) for name in paths}, "all of these": tuple(paths)}


@contextmanager
def without(model: DrmmForObjectDetection, paths: tuple[str, ...]) -> Iterator[None]:
    """Let a model compute plainly within.

    Args:
        model (`DrmmForObjectDetection`): The model, without groups of queries.
        paths (`tuple[str, ...]`): Names in `PATHS` or `OF_TRAINING`.
    """
    with ExitStack() as stack:
        for name in paths:
            stack.enter_context((PATHS | OF_TRAINING)[name](model))
        yield


def benchmark_paths(
    configs: Mapping[str, DrmmConfig],
    *,
    height: int = 800,
    width: int = 1344,
    batch_size: int = 1,
    dtype: str = "float32",
    repetitions: int = 3,
) -> dict[str, Any]:
    """Measure passes without fast paths beside the pass as it is, all in turns.

    Args:
        configs (`Mapping[str, DrmmConfig]`): Detectors by a name.
        height (`int`): Of the model input, pixels.
        width (`int`): The same.
        batch_size (`int`): Pictures.
        dtype (`str`): Type of weights and pictures.
        repetitions (`int`): Turns that count, after one that does not.

    Returns:
        `dict`: The settings and the environment; `detectors`: by name and by what is left out (`PATHS`), summaries of
        `cost`, in the clock that counts, of its `ratio` to the pass with nothing left out, and of the cost of each of
        `inference.PARTS`.

    Raises:
        ValueError: If a number is out of range.
    """
    numbers = {"height": height, "width": width, "batch_size": batch_size, "repetitions": repetitions}
    check_least({name: (value, 1) for name, value in numbers.items()})
    device, detectors = torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}
    for name, config in configs.items():
        one = Pass(DrmmForObjectDetection(config), dtype, device, batch_size, height, width)
        turns = {left_out: partial(_turn, one, paths) for left_out, paths in paths_of(config).items()}
        taken = take_turns(turns, repetitions, title=name)
        costs = {
            left_out: [{part: seconds.cost(device) for part, seconds in turn.items()} for turn in values]
            for left_out, values in taken.items()
        }
        totals = {left_out: [sum(turn.values()) for turn in values] for left_out, values in costs.items()}
        detectors[name] = {
            left_out: {
                "cost": summary(totals[left_out]),
                "ratio": summary([a / b for a, b in zip(totals[left_out], totals["nothing"], strict=True)]),
                **{part: summary([turn[part] for turn in values]) for part in PARTS},
            }
            for left_out, values in costs.items()
        }
    return {
        **environment(device, "torchvision", "transformers"),
        "size": [height, width],
        "batch_size": batch_size,
        "dtype": dtype,
        "repetitions": repetitions,
        "detectors": detectors,
    }


def _turn(one: Pass, paths: tuple[str, ...]) -> dict[str, Seconds]:
    with without(one.model, paths):
        return one.timed_parts()
