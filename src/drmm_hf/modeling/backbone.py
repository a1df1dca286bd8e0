"""Backbone: any `AutoBackbone` with four maps at strides 4, 8, 16, 32, with frozen stages and a batch-norm mode."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoBackbone
from transformers.models.resnet.modeling_resnet import ResNetConvLayer, ResNetShortCut


STRIDES = (4, 8, 16, 32)


def _timm_stages(backbone: nn.Module) -> list[list[nn.Module]]:
    """Split timm's feature network into stem and stages by the modules that its `feature_info` names."""
    network = backbone._backbone
    modules = dict(network.named_modules())
    # Not the containers, which may straddle stages; timm's batch norms own parameters and children.
    parts = [
        module
        for module in modules.values()
        if not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))
    ]
    # timm lists "stages.0" where it may have flattened the network to "stages_0".
    lasts = [modules.get(name) or modules[name.replace(".", "_")] for name in network.feature_info.module_name()]
    ends = [parts.index(list(last.modules())[-1]) for last in lasts]
    starts = [0, *(end + 1 for end in ends)]
    return [parts[start : end + 1] for start, end in zip(starts, ends, strict=False)]


# The modules of each stage, the stem with the first, by `model_type` of the backbone's config.
BACKBONE_STAGES = {
    "resnet": lambda b: [[b.embedder, b.encoder.stages[0]], *([stage] for stage in b.encoder.stages[1:])],
    "swin": lambda b: [
        [b.swin.embeddings, b.swin.encoder.layers[0]],
        *([layer] for layer in b.swin.encoder.layers[1:]),
    ],
    "convnext": lambda b: [[b.embeddings, b.encoder.stages[0]], *([stage] for stage in b.encoder.stages[1:])],
    "timm_backbone": _timm_stages,
}
# Modules that no map passes through. They are frozen: DistributedDataParallel would wait for their gradients.
UNUSED_MODULES = {"swin": lambda b: [b.swin.layernorm]}


class FoldingConvLayer(nn.Module):
    """A ResNet's convolution, batch norm and activation; without gradients the norm goes into the convolution.

    A norm in evaluation mode scales and shifts each channel. Doing so to the weights instead of to the map saves a
    pass over it. Nothing is stored or changed: weights may be loaded and trained at any time.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the normalised and activated convolution of `hidden_states`, `(B, C, H, W)`."""
        convolution, norm = self.convolution, self.normalization
        # Offloaded weights are there only while their own module runs.
        if norm.training or torch.is_grad_enabled() or convolution.weight.is_meta:
            hidden_states = norm(convolution(hidden_states))
        else:
            dtype = torch.promote_types(norm.weight.dtype, torch.float32)
            scale = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
            weight = (convolution.weight * scale[:, None, None, None]).to(convolution.weight.dtype)
            bias = (norm.bias - norm.running_mean * scale).to(weight.dtype)
            hidden_states = F.conv2d(hidden_states, weight, bias, convolution.stride, convolution.padding)
        return self.activation(hidden_states) if hasattr(self, "activation") else hidden_states


def _train_in_float32(convolution: nn.Conv2d, forward, hidden_states: Tensor) -> Tensor:
    """Convolve; under autocast on a CPU in float32 if there will be a backward, 4 times as slow in bfloat16."""
    on_cpu = hidden_states.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (on_cpu and torch.is_grad_enabled() and (hidden_states.requires_grad or convolution.weight.requires_grad)):
        return forward(hidden_states)
    with torch.autocast("cpu", enabled=False):
        return forward(hidden_states.to(convolution.weight.dtype))


class DrmmBackbone(nn.Module):
    """Extract four feature maps; freeze the first stages and fix the batch norms as the config says.

    Args:
        config (`DrmmConfig`): reads `backbone_config`, `freeze_backbone_stages`, `backbone_norm`.

    Raises:
        ValueError: if the backbone does not give four maps, or its stages are not known and some are to be frozen.
    """

    def __init__(self, config):
        super().__init__()
        self.network = AutoBackbone.from_config(config.backbone_config)
        self.norm_mode = config.backbone_norm
        if len(self.network.channels) != len(STRIDES):
            raise ValueError(
                f"backbone_config gives {len(self.network.channels)} feature maps; it must give {len(STRIDES)}, at "
                f"strides {STRIDES} (set out_features or out_indices)."
            )
        self.model_type = config.backbone_config.model_type
        self.num_frozen_stages = config.freeze_backbone_stages
        if self.num_frozen_stages and self.model_type not in BACKBONE_STAGES:
            raise ValueError(
                f"freeze_backbone_stages={self.num_frozen_stages} needs to know the stages of the backbone "
                f"{self.model_type!r}; known are {sorted(BACKBONE_STAGES)}."
            )
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                module.forward = partial(_train_in_float32, module, module.forward)
        if self.model_type == "resnet":
            for module in self.network.modules():
                if isinstance(module, (ResNetConvLayer, ResNetShortCut)):
                    module.__class__ = FoldingConvLayer
                elif isinstance(module, nn.ReLU):
                    module.inplace = True  # it overwrites a sum or a norm's output, which nothing else reads
        self.train(self.training)

    @property
    def channels(self) -> list[int]:
        """Channels of the four maps, finest first."""
        return self.network.channels

    def _batch_norms(self):
        return (module for module in self.network.modules() if isinstance(module, _BatchNorm))

    def _frozen_modules(self) -> list[nn.Module]:
        # Looked up anew each time: a conversion to SyncBatchNorm replaces modules.
        stages = BACKBONE_STAGES[self.model_type](self.network) if self.num_frozen_stages else []
        unused = UNUSED_MODULES.get(self.model_type, lambda network: [])(self.network)
        return unused + [module for stage in stages[: self.num_frozen_stages] for module in stage]

    def train(self, mode: bool = True):
        """Set the mode; what is frozen, and batch norms unless `backbone_norm="train"`, stay in evaluation mode.

        Parameters are frozen here too, because `from_pretrained` makes every loaded parameter trainable, then calls
        `eval`.
        """
        super().train(mode)
        if self.norm_mode != "train":
            for module in self._batch_norms():
                module.eval()
                if self.norm_mode == "frozen":
                    module.requires_grad_(False)
        for module in self._frozen_modules():
            module.eval().requires_grad_(False)
        return self

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the maps at strides 4, 8, 16, 32, each of shape `(B, C_l, H / stride, W / stride)`."""
        if not torch.is_grad_enabled() or torch.is_autocast_enabled(pixel_values.device.type):
            # Convolutions keep this layout and run faster in it; pooling reads the maps as rows of channels. With
            # gradients in float32 it gained nothing, and on CPUs the backward of a strided convolution of 8 channels
            # crashed.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        maps = list(self.network(pixel_values).feature_maps)
        if not torch.compiler.is_compiling():
            height, heights = pixel_values.shape[-2], [level_map.shape[-2] for level_map in maps]
            if any(h not in (height // s, -(-height // s)) for h, s in zip(heights, STRIDES, strict=True)):
                raise ValueError(
                    f"backbone_config gives maps of heights {heights} for pictures of height {height}; their strides "
                    f"must be {STRIDES} (set out_features or out_indices)."
                )
        return maps
