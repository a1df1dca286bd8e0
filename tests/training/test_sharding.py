"""FSDP2 on two gloo processes: the run of DDP, whole models in its checkpoints, exact resume; and what is refused."""

import json
import math
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from conftest import random_labels, random_pictures, tiny_config
from drmm_hf import DrmmForObjectDetection
from drmm_hf.training import loop
from drmm_hf.training.loop import accumulate_gradients, train
from drmm_hf.training.sharding import check_sharding
from training.test_resume import TIMES, Server, use_accelerate_config


# What `accelerate launch` sets for `fsdp_version: 2` and the state dict type that `accelerate config` proposes.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
WAYS = {
    "whole model": FSDP | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
    "layer by layer": FSDP | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},  # by `_no_split_modules`
}
# One epoch of two steps, of 2 batches in each process.
OPTIONS = {"processes": 2, "num_train_images": 16, "save_every_steps": 1, "evaluate_every": 0, "epochs": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("runs"))
    yield server
    server.process.stdin.close()
    server.process.wait(60)


@pytest.fixture(scope="module")
def sharded(server):
    assert server.train("sharded", environment=WAYS["layer by layer"], **OPTIONS) == [0, 0], server.output()
    return server.folder / "sharded"


def lines(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def models(folder):
    files = [f"{name}/{file}" for name in ("last", "best") for file in ("model.safetensors", "model.raw.safetensors")]
    return {file: load_file(folder / file) for file in files}


def test_a_sharded_run_is_the_run_of_ddp(server, sharded):
    assert server.train("plain", **OPTIONS) == [0, 0], server.output()
    found, plain = lines(sharded), lines(server.folder / "plain")
    assert len(found) == len(plain) == 3
    for row, expected in zip(found, plain, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-3)
    for file, weights in models(server.folder / "plain").items():
        for name, tensor in models(sharded)[file].items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-4, msg=f"{file}: {name}")
    _, loading = DrmmForObjectDetection.from_pretrained(sharded / "best", output_loading_info=True)
    assert not any(loading.values())


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_run_ends_with_the_same_bits_however_it_is_sharded(server, sharded, way):
    options = {"environment": WAYS[way], **OPTIONS}
    codes = server.train(way, inside="step-00000001", at_event=1, **options)  # in its second save
    assert codes[0] == -signal.SIGKILL, server.output()
    assert server.train(way, **options) == [0, 0], server.output()
    assert "at step 1" in server.output()
    assert lines(server.folder / way) == lines(sharded)
    for file, weights in models(sharded).items():
        for name, tensor in models(server.folder / way)[file].items():
            assert torch.equal(tensor, weights[name]), f"{file}: {name}"


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Be the only process of an FSDP run, whose tensors are sharded all the same."""
    for name, value in (
        FSDP | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "true"}
    ).items():
        monkeypatch.setenv(name, value)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    use_accelerate_config({"ACCELERATE_USE_FSDP": "true"})
    yield
    if torch.distributed.is_initialized():  # the end of the run parts the processes
        torch.distributed.destroy_process_group()


def test_a_gradient_that_is_not_finite_spares_sharded_weights(alone, tiny_recipe, tmp_path, monkeypatch):
    kept = []

    def break_second_gradient(accelerator, model, batches, channels_last):
        result = accumulate_gradients(accelerator, model, batches, channels_last)
        kept.append([parameter.to_local().clone() for parameter in model.parameters()])
        if len(kept) == 2:
            next(model.parameters()).grad.to_local()[0] = math.nan
        return result

    monkeypatch.setattr(loop, "accumulate_gradients", break_second_gradient)
    summary = train(tiny_recipe(max_steps=3))
    assert (summary["steps"], summary["skipped_steps"]) == (3, 1)
    assert not all(map(torch.equal, kept[0], kept[1]))
    assert all(map(torch.equal, kept[1], kept[2]))
    file = json.loads(next((tmp_path / "run" / "skipped_steps").iterdir()).read_text())
    assert (file["step"], file["grad_norm"]) == (2, "nan")


def test_what_fsdp_cannot_do_is_refused_before_the_run(tiny_recipe, monkeypatch):
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    check_sharding(accelerator, tiny_recipe(compile=True).training)
    for name in ("channels_last", "find_batch_size"):
        with pytest.raises(ValueError, match=f"training.{name} is true: it must be false with FSDP"):
            check_sharding(accelerator, tiny_recipe(**{name: True}).training)
    for name, value, words in (("fsdp_version", 1, "is 1"), ("cpu_ram_efficient_loading", True, "is true")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{name} {words}.* must be"):
            patch.setattr(plugin, name, value)
            check_sharding(accelerator, tiny_recipe().training)


def test_deepspeed_gets_the_recipe_or_is_refused(tiny_recipe):
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"gradient_clipping": 5.0})
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    check_sharding(accelerator, tiny_recipe(max_grad_norm=0.5, batch_size=3, accumulation_steps=4).training)
    assert plugin.deepspeed_config == {
        "gradient_clipping": 0.5,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 1,
    }
    for options in ({"mixed_precision": "bf16"}, {"compile": True}):
        with pytest.raises(ValueError, match=f"training.{next(iter(options))} is .* it must be .* with D"):
            check_sharding(accelerator, tiny_recipe(**options).training)
    plugin.zero_stage = 3
    with pytest.raises(ValueError, match="zero_stage is 3 .* it must be at most 2"):
        check_sharding(accelerator, tiny_recipe().training)


def test_deepspeed_steps_after_the_last_pass_only():
    model = DrmmForObjectDetection(tiny_config()).train()
    accelerator, synchronised = Accelerator(cpu=True), []
    accelerator.backward = lambda loss: synchronised.append(accelerator.sync_gradients)
    batch = {"pixel_values": random_pictures(1), "labels": random_labels(2), "pixel_mask": None}
    accumulate_gradients(accelerator, model, [batch] * 3)
    assert synchronised == [False, False, True]


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_config_that_accelerate_would_pass_over_is_refused(tiny_recipe, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"asks for {name}.* here it would be MULTI_CPU on cpu"):
        check_sharding(accelerator, tiny_recipe().training)


def test_accelerate_reads_the_documented_configs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    found = []
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        (tmp_path / "config.yaml").write_text(block)
        found.append(load_config_from_file(str(tmp_path / "config.yaml")))
    assert [config.distributed_type.value for config in found] == ["MULTI_GPU", "FSDP", "DEEPSPEED"]
    assert found[0].num_machines == 2
    fields = {name.upper(): str(value) for name, value in found[1].fsdp_config.items()}
    layers = WAYS["layer by layer"].items()
    assert {name: fields[name] for name, _ in layers if name.startswith("FSDP_")} == dict(list(layers)[1:])
    assert found[2].deepspeed_config["zero_stage"] == 2
