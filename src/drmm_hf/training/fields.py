"""What can be set in a recipe: every field with type, default and meaning, read from the dataclasses themselves."""

import dataclasses
import inspect
import json
import re
import shlex
import types
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from .arguments import DataArguments, TrainingArguments


# How yaml has the types that it can write; of several types of a field, the others are left out.
_TYPES = {int: "int", float: "float", str: "str", bool: "bool", dict: "mapping", type(None): "null"}


class RecipeField(NamedTuple):
    """A field of a recipe.

    Attributes:
        section (`str`): "model", "data" or "training".
        name (`str`): as in the yaml file.
        type (`str`): what may be written, with choices spelt out.
        default (`str`): as it may be written.
        meaning (`str`): the first sentence of its documentation; where the default is null, what it then follows from.
    """

    section: str
    name: str
    type: str
    default: str
    meaning: str

    @property
    def option(self) -> str:
        """The name as it is typed."""
        return f"--{self.name.replace('_', '-')}"

    def __str__(self):
        """Return one line, so that a list of them can be searched: what is typed to get the default, and a comment."""
        return f"{self.option} {shlex.quote(self.default)}  # {self.section}, {self.type}: {self.meaning}"


def recipe_fields() -> list[RecipeField]:
    """List the fields of a recipe in the order of their documentation.

    Returns:
        `list[RecipeField]`: what the docstrings of `DrmmConfig`, `DataArguments`, `TrainingArguments` explain.
    """
    from ..modeling.configuration_drmm import DrmmConfig

    return [*_fields("model", DrmmConfig), *argument_fields()]


def argument_fields() -> list[RecipeField]:
    """List the fields of a recipe but those of the model, which take seconds to import.

    Returns:
        `list[RecipeField]`: what the docstrings of `DataArguments` and `TrainingArguments` explain.
    """
    return [*_fields("data", DataArguments), *_fields("training", TrainingArguments)]


def _fields(section: str, owner: type) -> list[RecipeField]:
    hints, found = inspect.get_annotations(owner, eval_str=True), []
    own = {field.name: field for field in dataclasses.fields(owner)}
    for name, remark, text in _documented(owner):
        default = _default(own[name])
        shown = default if isinstance(default, str) else json.dumps(default)
        meaning = re.match(r".+?\.(?= |$)", text)[0]
        if default is None and (stated := re.search(r"defaults to (?!`)(.+)", remark)):
            meaning += f" By default {stated[1]}."
        found.append(RecipeField(section, name, _in_words(hints[name]), shown, meaning))
    return found


def _documented(owner: type) -> list[tuple[str, str, str]]:
    """Return name, what stands in parentheses and text of every argument that a docstring explains."""
    arguments = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(owner), re.DOTALL | re.MULTILINE)[1]
    entries = re.findall(r"^    (\w+) \((.+)\):(.*(?:\n(?:     .*)?)*)", arguments, re.MULTILINE)
    return [(name, remark, " ".join(text.split())) for name, remark, text in entries]


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _in_words(hint: Any) -> str | None:
    """Write a type as yaml's; None if yaml cannot write it."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if not (part is int and float in get_args(hint))]
        return " | ".join(filter(None, map(_in_words, parts)))
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_origin(hint) is list:
        return f"list of {_in_words(get_args(hint)[0])}"
    return _TYPES.get(hint)
