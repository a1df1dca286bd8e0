"""What a detector costs: parameters, multiply-adds and, measured on the machine at hand, speed and training memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..modeling.configuration_drmm import DrmmConfig
from ..modeling.modeling_drmm import DrmmForObjectDetection
from ..modeling.query_layers import DrmmSelfAttention


_CONVOLUTION, _LINEAR = ("aten.convolution",), ("aten.addmm", "aten.mm")
_SAMPLING = ("aten._embedding_bag", "aten._embedding_bag_forward_only")


def _embedding_bag_flops(weight, indices, *_, out_shape=None, **__) -> int:
    """Count what torch's counter leaves out: a multiply-add for each index and channel."""
    return 2 * torch.Size(indices).numel() * weight[1]


def _attention_flops(query, key, value, *_, out_shape=None, **__) -> int:
    """Count attention on CPUs, which torch's counter knows on GPUs only."""
    return sdpa_flop_count(query, key, value)


_FORMULAS = {
    torch.ops.aten._embedding_bag: _embedding_bag_flops,
    torch.ops.aten._embedding_bag_forward_only: _embedding_bag_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}


def hollow_model(config: DrmmConfig) -> DrmmForObjectDetection:
    """Build a model without memory for its weights, which costs can be counted of.

    Args:
        config (`DrmmConfig`): The architecture.

    Returns:
        `DrmmForObjectDetection`: Its tensors have shapes and no values.
    """
    with torch.device("meta"):
        model = DrmmForObjectDetection(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model.to_empty(device="cpu").eval()


def model_cost(model: nn.Module, height: int, width: int) -> dict[str, Any]:
    """Count parameters and operations of one picture.

    Nothing is computed: the tensors that pass through have shapes alone. Multiply-adds are those of convolutions and
    matrix products, half of what `torch.utils.flop_counter` counts.

    Args:
        model (`nn.Module`): A transformers detector, or one from `hollow_model`.
        height (`int`): Of the model input, pixels.
        width (`int`): Likewise.

    Returns:
        `dict`: `size`, `num_labels`; `total_parameters`, `trainable_parameters`, `multiply_adds` and `flops`, twice
        that; `parts`, the first three by part of the model; `operations`, the multiply-adds by kind: `convolutions`,
        `linear_layers`, `attention` (its linear layers and its products) and `other_products`. Not among them are
        `sampling`, multiply-adds of pooling and sampling the maps, and `elementwise`, operations of `norms` (2 an
        element, as scale and shift), `activations`, `pooling` and `biases` of convolutions. `layer_operations` are
        those of convolutions, linear layers and elementwise layers, all that a counter sees that looks at layers
        alone: MMDetection's, whose figures are Table 11's.

    Raises:
        ValueError: If a side is below 32 pixels, the coarsest stride.

    Source: Table 11, which counts a picture of 800 x 1280.
    """
    if min(height, width) < 32:
        raise ValueError(f"size is {height} x {width}; the rule is sides of at least 32 pixels.")
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    elementwise: Counter[str] = Counter()
    hooks = [module.register_forward_hook(_elementwise_hook(elementwise)) for module in model.modules()]
    parameter, was_training = next(model.parameters()), model.training
    hollow_mode = getattr(parameter, "fake_mode", None) or FakeTensorMode(allow_non_fake_inputs=True)
    model.eval()
    # Gradients are on so that norms run as layers; without, ResNet's are folded into convolutions.
    with hollow_mode, torch.enable_grad():
        pixel_values = torch.empty(1, 3, height, width, dtype=parameter.dtype, device=parameter.device)
        with counter:
            model(pixel_values)
    for hook in hooks:
        hook.remove()
    model.train(was_training)

    counts = {
        name: Counter({str(op): n // 2 for op, n in ops.items()}) for name, ops in counter.get_flop_counts().items()
    }
    root = type(model).__name__
    everything = counts[root]
    names = [f"{root}.{name}" for name, module in model.named_modules() if isinstance(module, DrmmSelfAttention)]
    attention = sum((counts[name] for name in names), Counter())
    outside = everything - attention
    operations = {
        "convolutions": _total(outside, _CONVOLUTION),
        "linear_layers": _total(outside, _LINEAR),
        "attention": attention.total(),
    }
    sampling = _total(everything, _SAMPLING)
    multiply_adds = everything.total() - sampling
    operations["other_products"] = multiply_adds - sum(operations.values())
    layers = operations["convolutions"] + operations["linear_layers"] + elementwise.total()
    return {
        "size": [height, width],
        "num_labels": model.config.num_labels,
        **_parameters(model),
        "multiply_adds": multiply_adds,
        "flops": 2 * multiply_adds,
        "parts": {
            name: _parameters(*modules)
            | {"multiply_adds": sum(_without_sampling(counts.get(f"{root}.{path}")) for path in paths)}
            for name, (paths, modules) in _parts(model).items()
        },
        "operations": operations,
        "sampling": sampling,
        "elementwise": dict(elementwise),
        "layer_operations": layers,
    }


def measured_cost(model: nn.Module, height: int, width: int, repetitions: int = 5) -> dict[str, Any]:
    """Measure speed, and on a GPU the memory of training, on the machine at hand.

    Args:
        model (`nn.Module`): A transformers detector with weights, where it is to run.
        height (`int`): Of the model input, pixels.
        width (`int`): Likewise.
        repetitions (`int`): Pictures that are timed, after one that is not.

    Returns:
        `dict`: `pictures_per_second`, of the network with one picture a batch, by the median time; `device`; and
        `training_memory`, bytes that a step with 2 pictures of this size takes at most, None without a GPU.

    Source: Tables 1, 6 and 11.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    is_cuda = device.type == "cuda"
    pixel_values = torch.rand(1, 3, height, width, dtype=dtype, device=device)
    was_training, seconds = model.training, []
    model.eval()
    with torch.no_grad():
        for _ in range(repetitions + 1):
            start = time.perf_counter()
            model(pixel_values)
            if is_cuda:
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    model.train(was_training)
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "pictures_per_second": 1 / median(seconds[1:]),
        "device": torch.cuda.get_device_name(device) if is_cuda else cpu,
        "training_memory": _training_memory(model, height, width) if is_cuda else None,
    }


def _training_memory(model: nn.Module, height: int, width: int) -> int:
    """Return the most bytes that a training step with 2 pictures and 10 objects each holds on a GPU."""
    parameter = next(model.parameters())
    label = {
        "class_labels": torch.zeros(10, dtype=torch.int64, device=parameter.device),
        "boxes": torch.full((10, 4), 0.5, device=parameter.device),
    }
    was_training = model.training
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.0)
    torch.cuda.reset_peak_memory_stats(parameter.device)
    for _ in range(2):  # the optimiser's state is there from the second step on
        pixel_values = torch.rand(2, 3, height, width, dtype=parameter.dtype, device=parameter.device)
        model(pixel_values, labels=[label, label]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.train(was_training)
    return torch.cuda.max_memory_allocated(parameter.device)


def _elementwise_hook(counts: Counter[str]):
    """Return a hook that counts the operations of layers that are no products."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            counts["norms"] += 2 * inputs[0].numel()
        elif isinstance(module, (nn.ReLU, nn.GELU)):
            counts["activations"] += output.numel()
        elif isinstance(module, nn.MaxPool2d):
            counts["pooling"] += inputs[0].numel()
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            counts["biases"] += output.numel()

    return hook


def _parts(model: nn.Module) -> dict[str, tuple[list[str], list[nn.Module]]]:
    """Split a model: paths and modules of each part, D-RMM's heads apart from the stages they follow."""
    base = model.base_model
    prefix = f"{model.base_model_prefix}." if base is not model else ""
    parts = {name: ([prefix + name], [module]) for name, module in base.named_children()}
    if isinstance(model, DrmmForObjectDetection):
        parts.pop("decoder")
        for name, attribute in (("stages", "stage"), ("heads", "head")):
            paths = [f"{prefix}decoder.layers.{index}.{attribute}" for index in range(len(base.decoder.layers))]
            parts[name] = (paths, [model.get_submodule(path) for path in paths])
    return parts


def _parameters(*modules: nn.Module) -> dict[str, int]:
    """Count parameters, all and those that are trained."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return {
        "total_parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
    }


def _total(counts: Mapping[str, int], operations: tuple[str, ...]) -> int:
    return sum(counts.get(name, 0) for name in operations)


def _without_sampling(counts: Counter[str] | None) -> int:
    return 0 if counts is None else counts.total() - _total(counts, _SAMPLING)
