import pytest
import torch
import yaml
from safetensors.torch import load_file

from drmm_hf import DrmmForObjectDetection
from drmm_hf.training.loop import train


FULL = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


@pytest.fixture
def memory(monkeypatch):
    """Return a function that lets forward passes of more than so many pictures fail, and the sizes that were tried."""
    forward, tried = DrmmForObjectDetection.forward, []

    def limit(most):
        def limited(model, pixel_values, *args, **kwargs):
            if model.training:
                tried.append(tuple(pixel_values.shape))
            if len(pixel_values) > most:
                raise RuntimeError(FULL)
            return forward(model, pixel_values, *args, **kwargs)

        monkeypatch.setattr(DrmmForObjectDetection, "forward", limited)
        return tried

    return limit


def test_the_largest_divisor_that_fits_is_found_and_leaves_no_trace(tiny_recipe, tmp_path, memory, capsys):
    """6 pictures a step: 6 and 3 do not fit. The run is the one of a recipe that has the batch size found."""
    options = {"batch_size": 3, "num_train_images": 12, "ema_decay": 0.5, "backbone_norm": "train"}
    tried = memory(2)
    train(tiny_recipe(find_batch_size=True, **options))
    assert tried[:4] == [(6, 3, 64, 64), (3, 3, 64, 64), (2, 3, 64, 64), (2, 3, 64, 64)]
    said = capsys.readouterr().out
    assert "batch size 3: does not fit into memory\nbatch size 2: fits" in said
    assert "effective batch 6: 2 pictures x 3 accumulation steps x 1 processes" in said
    stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]
    assert (stored["batch_size"], stored["accumulation_steps"], stored["find_batch_size"]) == (2, 3, False)

    train(tiny_recipe(output_dir=str(tmp_path / "told"), **options | {"batch_size": 2, "accumulation_steps": 3}))
    for file in ("last/model.safetensors", "last/training_state/model.safetensors"):
        expected = load_file(tmp_path / "told" / file)
        assert all(torch.equal(t, expected[name]) for name, t in load_file(tmp_path / "run" / file).items())

    tried.clear()  # the same command goes on with what was found, though all would fit now
    memory(6)
    train(tiny_recipe(find_batch_size=True, resume=True, **options | {"epochs": 3}))
    assert {shape[0] for shape in tried} == {2}
    assert "batch_size was" not in capsys.readouterr().out


def test_errors_other_than_memory_are_not_taken_for_it(tiny_recipe, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(DrmmForObjectDetection, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tiny_recipe(find_batch_size=True))


def test_no_size_that_fits_is_an_error(tiny_recipe, memory):
    memory(0)
    with pytest.raises(ValueError, match="not even one picture of 64 x 64 pixels fits into memory"):
        train(tiny_recipe(find_batch_size=True))
