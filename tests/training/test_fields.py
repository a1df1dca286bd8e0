"""The list of fields is what the dataclasses have, and its defaults are a recipe that says nothing."""

import dataclasses
import inspect

import pytest

from drmm_hf import DrmmConfig
from drmm_hf.training.arguments import DataArguments, TrainingArguments, load_recipe
from drmm_hf.training.fields import recipe_fields


FIELDS = {field.name: field for field in recipe_fields()}


def test_every_field_is_listed_once():
    own = [*inspect.get_annotations(DrmmConfig)]
    own += [field.name for owner in (DataArguments, TrainingArguments) for field in dataclasses.fields(owner)]
    assert sorted(field.name for field in recipe_fields()) == sorted(own)


def test_the_listed_defaults_are_the_recipe_that_says_nothing(tmp_path):
    sections = {"model": [], "data": [], "training": []}
    for field in recipe_fields():
        if not field.default.startswith("("):
            sections[field.section].append(f"  {field.name}: {field.default}\n")
    text = "".join(f"{section}:\n{''.join(lines)}" for section, lines in sections.items())
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml", {"epochs": 1})
    assert recipe.data == DataArguments() and recipe.training == TrainingArguments(epochs=1)
    assert DrmmConfig(**recipe.model).to_dict() == DrmmConfig().to_dict()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("num_queries", "model.num_queries: int = 300  # Number K of mixture components, one a query."),
        (
            "neck_type",
            "model.neck_type: fpn | channel_mapping | null = (that of the decoder)  # What turns the backbone's four "
            "maps into maps of `hidden_size` channels.",
        ),
        ("loss_weight", "model.loss_weight: float = 1.0  # Factor of the whole loss."),
        ("betas", "training.betas: list of float = [0.9, 0.999]  # AdamW's two decay rates."),
        ("schedule_by", 'training.schedule_by: steps | time = "steps"  # Progress of the schedule is'),
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
