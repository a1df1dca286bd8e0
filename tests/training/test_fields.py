"""The list of fields is what the dataclasses have, and its defaults are a recipe that says nothing."""

import dataclasses
import inspect
import shlex

import pytest

from drmm_hf import DrmmConfig
from drmm_hf.commands.train import parse_fields
from drmm_hf.training.arguments import DataArguments, TrainingArguments, make_recipe
from drmm_hf.training.fields import recipe_fields


FIELDS = {field.name: field for field in recipe_fields()}


def test_every_field_is_listed_once():
    own = [*inspect.get_annotations(DrmmConfig)]
    own += [field.name for owner in (DataArguments, TrainingArguments) for field in dataclasses.fields(owner)]
    assert sorted(field.name for field in recipe_fields()) == sorted(own)


def test_the_listed_defaults_are_the_recipe_that_says_nothing():
    """Typed as they are listed, by a shell that leaves comments out."""
    typed = [word for field in recipe_fields() for word in shlex.split(str(field), comments=True)]
    recipe = make_recipe({}, {**parse_fields(typed), "epochs": 1})
    assert recipe.data == DataArguments() and recipe.training == TrainingArguments(epochs=1)
    assert DrmmConfig(**recipe.model).to_dict() == DrmmConfig().to_dict()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("num_queries", "--num-queries 300  # model, int: Number K of mixture components, one a query."),
        (
            "neck_type",
            "--neck-type null  # model, fpn | channel_mapping | null: What turns the backbone's four maps into maps "
            "of `hidden_size` channels. By default that of the decoder.",
        ),
        ("loss_weight", "--loss-weight 1.0  # model, float: Factor of the whole loss."),
        ("betas", "--betas '[0.9, 0.999]'  # training, list of float: AdamW's two decay rates."),
        ("schedule_by", "--schedule-by steps  # training, steps | time: Progress of the schedule is"),
    ],
)
def test_a_field_is_one_line(name, line):
    assert str(FIELDS[name]).startswith(line) and "\n" not in str(FIELDS[name])


@pytest.mark.parametrize("name", FIELDS)
def test_a_meaning_is_a_whole_sentence(name):
    meaning = FIELDS[name].meaning
    assert meaning.endswith(".") and len(meaning) > 15
    assert all(meaning.count(first) == meaning.count(last) for first, last in ("()", "[]"))
    assert not meaning.count("`") % 2 and not meaning.count('"') % 2
