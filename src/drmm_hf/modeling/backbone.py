"""Backbone: any `AutoBackbone` with four maps at strides 4, 8, 16, 32, with frozen stages and a batch-norm mode."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoBackbone


STRIDES = (4, 8, 16, 32)


def _timm_stages(backbone: nn.Module) -> list[list[nn.Module]]:
    """Split timm's feature network into stem and stages by the modules that its `feature_info` names."""
    network = backbone._backbone
    # Not the containers, which may straddle stages; timm's batch norms own parameters and children.
    parts = [
        module
        for module in network.modules()
        if not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))
    ]
    ends = [
        parts.index(list(network.get_submodule(name).modules())[-1]) for name in network.feature_info.module_name()
    ]
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
        model_type = config.backbone_config.model_type
        self._frozen = UNUSED_MODULES[model_type](self.network) if model_type in UNUSED_MODULES else []
        if config.freeze_backbone_stages:
            if model_type not in BACKBONE_STAGES:
                raise ValueError(
                    f"freeze_backbone_stages={config.freeze_backbone_stages} needs to know the stages of the backbone "
                    f"{model_type!r}; known are {sorted(BACKBONE_STAGES)}."
                )
            stages = BACKBONE_STAGES[model_type](self.network)[: config.freeze_backbone_stages]
            self._frozen += [module for stage in stages for module in stage]
        self.train(self.training)

    @property
    def channels(self) -> list[int]:
        """Channels of the four maps, finest first."""
        return self.network.channels

    def _batch_norms(self):
        return (module for module in self.network.modules() if isinstance(module, _BatchNorm))

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
        for module in self._frozen:
            module.eval().requires_grad_(False)
        return self

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the maps at strides 4, 8, 16, 32, each of shape `(B, C_l, H / stride, W / stride)`."""
        maps = list(self.network(pixel_values).feature_maps)
        if not torch.compiler.is_compiling():
            height = pixel_values.shape[-2]
            for level_map, stride in zip(maps, STRIDES, strict=True):
                if level_map.shape[-2] not in (height // stride, -(-height // stride)):
                    raise ValueError(
                        f"backbone_config gives a map of height {level_map.shape[-2]} for a picture of height {height}; "
                        f"its maps must have strides {STRIDES} (set out_features or out_indices)."
                    )
        return maps
