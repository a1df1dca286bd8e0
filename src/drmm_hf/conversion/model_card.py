"""The card of a converted model: what it is, where it comes from, and what the paper states for it."""

from ..modeling.configuration_drmm import DrmmConfig
from .architecture import backbone_name
from .class_names import class_names, coco_categories


METHODS = {
    ("sparse_rcnn", "mixture"): "D-RMM on Sparse R-CNN",
    ("adamixer", "mixture"): "D-RMM on AdaMixer",
    ("sparse_rcnn", "box"): "Sparse R-CNN",
    ("adamixer", "box"): "AdaMixer",
}
# Table 5 of the paper, COCO val2017: AP, AP50, AP75, APs, APm, APl in per cent.
TABLE_5 = {
    ("Sparse R-CNN", "ResNet-50"): (45.0, 64.1, 49.0, 27.8, 47.6, 59.7),
    ("Sparse R-CNN", "ResNet-101"): (46.4, 65.6, 50.7, 28.6, 49.4, 61.3),
    ("Sparse R-CNN", "Swin-T"): (47.4, 67.1, 52.0, 30.1, 50.3, 63.1),
    ("AdaMixer", "ResNet-50"): (47.0, 66.0, 51.1, 30.1, 50.2, 61.8),
    ("AdaMixer", "ResNet-101"): (48.0, 67.0, 52.4, 30.0, 51.2, 63.7),
    ("AdaMixer", "Swin-T"): (48.9, 68.5, 53.5, 31.5, 52.0, 64.2),
    ("D-RMM on Sparse R-CNN", "ResNet-50"): (47.0, 64.8, 51.6, 30.5, 50.4, 61.1),
    ("D-RMM on Sparse R-CNN", "ResNet-101"): (48.0, 65.7, 52.6, 30.4, 51.4, 63.5),
    ("D-RMM on Sparse R-CNN", "Swin-T"): (49.9, 68.1, 55.1, 32.1, 53.6, 64.6),
    ("D-RMM on AdaMixer", "ResNet-50"): (48.4, 66.3, 52.8, 31.0, 52.1, 64.0),
    ("D-RMM on AdaMixer", "ResNet-101"): (49.2, 67.3, 53.5, 31.4, 53.1, 65.4),
    ("D-RMM on AdaMixer", "Swin-T"): (50.7, 69.0, 55.5, 33.5, 54.4, 66.3),
}

_CARD = """\
---
library_name: transformers
pipeline_tag: object-detection
tags:
- drmm
- object-detection
---

# {title}

Converted by `drmm convert` from a checkpoint of the {family} family. What became of every tensor is in
[conversion.json](conversion.json). The weights, and their licence, are their authors'.

| | |
|---|---|
| checkpoint | `{source}` |
| sha256 | `{sha256}` |
| decoder, head | {config.decoder_type}, {config.head_type} |
| backbone | {backbone} |
| queries, stages | {config.num_queries}, {config.num_stages} |
| classes | {config.num_labels} |

## Expected result

{expected}

## Use

```python
from drmm_hf import DrmmForObjectDetection, DrmmImageProcessor

model = DrmmForObjectDetection.from_pretrained(FOLDER).eval()
processor = DrmmImageProcessor.from_pretrained(FOLDER)
```
"""


def title(config: DrmmConfig) -> str:
    """Name a detector, as in "D-RMM on Sparse R-CNN, ResNet-50"."""
    return f"{METHODS[config.decoder_type, config.head_type]}, {backbone_name(config.backbone_config)}"


def stated_result(config: DrmmConfig) -> tuple[float, ...] | None:
    """Return the row of Table 5 that a configuration is of.

    Args:
        config (`DrmmConfig`): of the converted detector.

    Returns:
        `tuple[float, ...]` or `None`: AP, AP50, AP75, APs, APm, APl in per cent; None if the paper states nothing.
    """
    same_sizes = (config.num_queries, config.num_stages, config.hidden_size, config.top_k_ratio) == (300, 6, 256, None)
    if not same_sizes or class_names(config) != list(coco_categories().values()):
        return None
    method = METHODS[config.decoder_type, config.head_type]
    return TABLE_5.get((method, backbone_name(config.backbone_config)))


def expected_result(config: DrmmConfig, name: str = "FOLDER") -> str:
    """Say what the paper states for a detector, as the paper's statement.

    Args:
        config (`DrmmConfig`): of the converted detector.
        name (`str`): its folder or id, for the command that measures it.

    Returns:
        `str`: Markdown.
    """
    stated = stated_result(config)
    if stated is None:
        return "The paper states no figure for this architecture and these classes. Nothing was measured here."
    names = ("AP50", "AP75", "APs", "APm", "APl")
    others = ", ".join(f"{figure} {value}" for figure, value in zip(names, stated[1:], strict=True))
    return (
        f"The paper states AP {stated[0]} ({others}) for this architecture on COCO val2017 (Table 5, "
        "36 epochs). That is the paper's figure; it was not measured with this conversion. To measure:\n\n"
        f"```bash\ndrmm evaluate {name} COCO --split val2017 --output OUT\n```"
    )


def model_card(config: DrmmConfig, source: str, family: str, sha256: str) -> str:
    """Write the card of a converted detector.

    Args:
        config (`DrmmConfig`): of the detector.
        source (`str`): name of the checkpoint file.
        family (`str`): whose names the checkpoint has.
        sha256 (`str`): of the checkpoint file.

    Returns:
        `str`: Markdown with the Hub's header.
    """
    return _CARD.format(
        title=title(config),
        source=source,
        family=family,
        sha256=sha256,
        config=config,
        backbone=backbone_name(config.backbone_config),
        expected=expected_result(config),
    )
