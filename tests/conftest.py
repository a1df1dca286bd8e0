"""What tests of the model share: a tiny configuration, pictures and labels, all seeded."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import settings
from transformers import ResNetConfig

from drmm_hf import DrmmConfig


# On tensors this small, threads only get in each other's way.
torch.set_num_threads(1)

# The same commit gets the same verdict; HYPOTHESIS_PROFILE=random looks for examples nobody has tried yet.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Let each test choose its own precision: Accelerate keeps one state a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tiny_resnet() -> ResNetConfig:
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=STAGES
    )


def tiny_config(**overrides) -> DrmmConfig:
    """Return the configuration of a detector of 12 queries, 2 stages and 3 classes on a ResNet 8 channels wide."""
    fields = {
        "num_queries": 12,
        "proposal_grid": [3, 4],
        "num_stages": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "dynamic_size": 4,
        "backbone_config": tiny_resnet(),
    }
    if not overrides.keys() & {"num_labels", "id2label"}:
        fields["num_labels"] = 3
    return DrmmConfig(**(fields | overrides))


def random_pictures(batch_size: int = 2, height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_labels(*counts: int, num_labels: int = 3, seed: int = 0, dtype=torch.float32) -> list[dict]:
    """Return labels of `len(counts)` pictures, the i-th with `counts[i]` boxes inside the picture."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for count in counts:
        size = 0.1 + 0.4 * torch.rand(count, 2, generator=generator)
        centre = size / 2 + (1 - size) * torch.rand(count, 2, generator=generator)
        classes = torch.randint(0, num_labels, (count,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat([centre, size], 1).to(dtype)})
    return labels


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Serve a stand-in for the Hub to this process, with a token that may write."""
    import transformers.utils.hub
    from huggingface_hub import constants

    from hub_stand_in import WRITER, hub_stand_in

    with hub_stand_in() as (hub, endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in knows LFS
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        hub.endpoint = endpoint
        yield hub
