"""The detectors of transformers that benchmarks run beside D-RMM: built from their default configurations, random."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForObjectDetection, PreTrainedModel


# By `model_type`, what the default configuration is.
PEERS = {
    "deformable_detr": "Deformable DETR R50",
    "detr": "DETR R50",
    "conditional_detr": "Conditional DETR R50",
    "rt_detr": "RT-DETR R50",
    "d_fine": "D-FINE L",
}


def build_peer(name: str, num_labels: int) -> PreTrainedModel:
    """Build a peer with random weights, to be trained with its own loss after every layer of its decoder.

    Args:
        name (`str`): One of `PEERS`.
        num_labels (`int`): Number of classes.

    Returns:
        `PreTrainedModel`: The model, in float32.

    Raises:
        ValueError: If the peer is not known.
    """
    if name not in PEERS:
        raise ValueError(f"peer is {name!r}, must be one of {', '.join(PEERS)}")
    config = AutoConfig.for_model(name, num_labels=num_labels, auxiliary_loss=True)
    return AutoModelForObjectDetection.from_config(config)
