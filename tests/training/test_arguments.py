import dataclasses
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from drmm_hf.modeling.configuration_drmm import DrmmConfig
from drmm_hf.training.arguments import DataArguments, TrainingArguments, load_recipe


@pytest.fixture
def write(tmp_path):
    def write_recipe(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write_recipe


@pytest.mark.parametrize(("cores", "workers"), [({3}, 1), ({0, 3}, 2), ({0, 1, 2}, 2)])
def test_pictures_are_loaded_by_no_more_processes_than_there_are_cores_for(monkeypatch, cores, workers):
    """For this process, as under `taskset`; torch warns of more."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    assert DataArguments().num_workers == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: len(cores))
    assert DataArguments().num_workers == workers


MINIMAL = "training: {epochs: 1}\n"


def test_a_recipe_is_read_by_section(write):
    recipe = load_recipe(
        write("model: {num_stages: 3}\ndata: {source: folder}\ntraining: {epochs: 4, batch_size: 8}\n")
    )
    assert recipe.model == {"num_stages": 3}
    assert recipe.data == DataArguments(source="folder")
    assert recipe.training == TrainingArguments(epochs=4, batch_size=8)


def test_overrides_find_their_section_by_name(write):
    recipe = load_recipe(
        write(MINIMAL),
        {"mcm-weight": "0.25", "shortest_edge": "320", "longest-edge": "400", "learning-rate": "5e-5", "epochs": "3"},
    )
    assert recipe.model == {"mcm_weight": 0.25}
    assert (recipe.data.shortest_edge, recipe.data.longest_edge) == (320, 400)
    assert (recipe.training.learning_rate, recipe.training.epochs) == (5e-5, 3)


def test_overrides_are_yaml(write):
    recipe = load_recipe(
        write(MINIMAL),
        {"proposal_grid": "[2, 5]", "num_queries": "10", "max_grad_norm": "null", "trackers": "[]", "init_from": "no"},
    )
    assert recipe.model["proposal_grid"] == [2, 5]
    assert recipe.training.max_grad_norm is None
    assert recipe.training.trackers == []
    assert recipe.training.init_from == "no"


def test_no_field_name_occurs_in_two_sections():
    sections = [
        {entry.name for entry in dataclasses.fields(part)} for part in (DrmmConfig, DataArguments, TrainingArguments)
    ]
    assert sum(map(len, sections)) == len(set().union(*sections))


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("training: {learningrate: 1}", {}, ["training", "'learningrate'", "'learning_rate'"]),
        ("trainings: {epochs: 1}", {}, ["'trainings'", "'training'"]),
        ("data: {sourc: x}", {}, ["data", "'sourc'", "'source'"]),
        ("model: {num_stage: 2}", {}, ["model", "'num_stage'", "'num_stages'"]),
        (MINIMAL, {"batch-sise": "2"}, ["'batch-sise'", "'batch_size'"]),
        ("training: [1, 2]", {}, ["'training'", "mapping"]),
        ("- 1", {}, ["recipe.yaml", "mapping"]),
        ("training: {epochs: 1", {}, ["recipe.yaml", "not valid yaml"]),
        ("training: {epochs: 1, epochs: 2}", {}, ["'epochs'", "twice"]),
        (MINIMAL, {"epochs": "[1"}, ["--epochs", "not valid yaml"]),
        ("training: {epochs: 1, seed: 1.5}", {}, ["training.seed", "1.5", "an integer"]),
        ("training: {epochs: true}", {}, ["training.epochs", "True", "an integer or null"]),
        ("training: {epochs: 1, learning_rate: fast}", {}, ["training.learning_rate", "'fast'", "a finite number"]),
        ("training: {epochs: 1, learning_rate: .inf}", {}, ["training.learning_rate", "inf", "a finite number"]),
        ("training: {epochs: 1, learning_rate: 0}", {}, ["training.learning_rate", "0", "greater than 0"]),
        ("training: {epochs: 1, schedule: linear}", {}, ["training.schedule", "'linear'", "'cosine'"]),
        ("training: {epochs: 1, resume: yes}", {}, ["training.resume", "'yes'", "true or false"]),
        ("training: {epochs: 1, betas: [0.9]}", {}, ["training.betas", "[0.9]", "two numbers"]),
        ("training: {epochs: 1, betas: [0.9, x]}", {}, ["training.betas", "'x'", "a list"]),
        ("training: {epochs: 1, milestones: [0.9, 0.5]}", {}, ["training.milestones", "increasing"]),
        ("training: {epochs: 0}", {}, ["training.epochs", "0", "at least 1"]),
        ("training: {epochs: 1, ema_decay: 1}", {}, ["training.ema_decay", "1.0", "between 0 and 1"]),
        ("training: {epochs: 1, weight_decay: -1}", {}, ["training.weight_decay", "-1.0", "negative"]),
        ("training: {epochs: 1, decay_factor: 2}", {}, ["training.decay_factor", "2.0", "[0, 1]"]),
        ("training: {batch_size: 2}", {}, ["epochs", "max_steps", "max_minutes"]),
        ("training: {epochs: 1, schedule_by: time}", {}, ["schedule_by", "'time'", "max_minutes"]),
        ("training: {max_minutes: 1}", {}, ["schedule_by", "'steps'", "epochs or max_steps"]),
        ("data: {train_images: x}\n" + MINIMAL, {}, ["train_images", "train_annotations"]),
        ("data: {image_size: [3]}\n" + MINIMAL, {}, ["data.image_size", "[3]", "[height, width]"]),
        (
            "data: {shortest_edge: 900, longest_edge: 800}\n" + MINIMAL,
            {},
            ["data.longest_edge", "800", "shortest_edge"],
        ),
        ("data: {shortest_edge: 1}\n" + MINIMAL, {}, ["data.shortest_edge", "1", "at least 32"]),
        ("data: {num_workers: -1}\n" + MINIMAL, {}, ["data.num_workers", "-1", "between 0 and 1024"]),
        ("model: {num_stages: many}\n" + MINIMAL, {}, ["model", "num_stages"]),
        ("model: {num_queries: 5}\n" + MINIMAL, {}, ["model", "proposal_grid", "num_queries=5"]),
    ],
)
def test_errors_name_the_field_the_value_and_the_rule(write, text, overrides, words):
    with pytest.raises(ValueError) as error:
        load_recipe(write(text), overrides)
    assert [word for word in words if word not in str(error.value)] == []


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_ints_become_floats(write):
    training = load_recipe(write("training: {max_minutes: 30, epochs: 1, milestones: [], betas: [0, 0.9]}")).training
    assert isinstance(training.max_minutes, float)
    assert all(isinstance(beta, float) for beta in training.betas)


def test_scalars_mean_what_they_look_like(write):
    training = load_recipe(
        write("training: {epochs: 1, mixed_precision: no, learning_rate: 5e-5, init_from: off}")
    ).training
    assert (training.mixed_precision, training.learning_rate, training.init_from) == ("no", 5e-5, "off")


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12)


@given(
    name=TEXTS | st.sampled_from(["no", "1e3", "null", "true", "", "12", "~", "1.", "-.5", "on"]),
    rate=st.floats(min_value=1e-12, max_value=1e3),
    edges=st.none() | st.lists(st.integers(1, 2000), max_size=4),
    flag=st.booleans(),
)
def test_a_saved_recipe_reads_back_equal(tmp_path_factory, name, rate, edges, flag):
    path = tmp_path_factory.getbasetemp() / "saved.yaml"
    path.write_text(MINIMAL)
    recipe = load_recipe(path)
    recipe.model["id2label"] = {0: "cell", 1: name}
    recipe.data.source, recipe.data.short_edges = name, edges
    recipe.training.learning_rate, recipe.training.resume = rate, flag
    recipe.save(path)
    assert load_recipe(path) == recipe


def test_the_tiny_recipe_is_what_other_yaml_readers_see(tiny_recipe):
    recipe = tiny_recipe()
    plain = yaml.safe_load((Path(__file__).parent / "tiny.yaml").read_text())
    assert recipe.model == plain["model"]
    assert recipe.data == DataArguments(**plain["data"])
