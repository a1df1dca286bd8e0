"""The map between a dataset's category ids (any integers) and the model's class labels (0 .. C-1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class LabelMap:
    """Map category ids of a dataset to contiguous class labels and back.

    Args:
        category_ids (`tuple[int, ...]`): The dataset's own ids; the position is the class label.
        names (`tuple[str, ...]`): One name a class, in the same order.

    Raises:
        ValueError: If the two lengths differ, nothing is listed, or an id or a name occurs twice.
    """

    category_ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that the map can be inverted."""
        if len(self.category_ids) != len(self.names):
            raise ValueError(f"category_ids ({len(self.category_ids)}) and names ({len(self.names)}) differ in length")
        if not self.category_ids:
            raise ValueError("category_ids is empty: a label map needs at least one class")
        for field, values in (("category_ids", self.category_ids), ("names", self.names)):
            repeated = sorted({value for value in values if values.count(value) > 1})
            if repeated:
                raise ValueError(f"{field} holds {repeated[0]!r} more than once: every class needs its own")

    @classmethod
    def from_categories(cls, categories: Iterable[Mapping[str, Any]]) -> LabelMap:
        """Build the map from COCO categories, in the order of the file.

        Args:
            categories (`Iterable[Mapping]`): Records with `id` and `name`.

        Returns:
            `LabelMap`: The first record is class label 0.
        """
        records = list(categories)
        return cls(tuple(int(record["id"]) for record in records), tuple(str(record["name"]) for record in records))

    @classmethod
    def from_config(cls, config: Any) -> LabelMap:
        """Read the map back from a model configuration.

        Args:
            config (`PreTrainedConfig`): Any configuration with `id2label`; without a `category_ids` field (or with
                None in it) the labels are their own category ids.

        Returns:
            `LabelMap`: The map the model was trained with.
        """
        id2label = {int(label): name for label, name in config.id2label.items()}
        if sorted(id2label) != list(range(len(id2label))):
            raise ValueError(f"config.id2label has the labels {sorted(id2label)}, must be 0 to {len(id2label) - 1}")
        names = tuple(id2label[label] for label in range(len(id2label)))
        category_ids = getattr(config, "category_ids", None)
        return cls(tuple(range(len(names))) if category_ids is None else tuple(map(int, category_ids)), names)

    def label(self, category_id: int) -> int:
        """Return the class label of a category id.

        Args:
            category_id (`int`): An id of the dataset.

        Returns:
            `int`: The class label, 0 to C-1.

        Raises:
            ValueError: If the id is not in the map.
        """
        try:
            return self._labels[category_id]
        except KeyError:
            raise ValueError(
                f"category id {category_id!r} is not in the label map {list(self.category_ids)}"
            ) from None

    def category_id(self, label: int) -> int:
        """Return the category id of a class label.

        Args:
            label (`int`): A class label, 0 to C-1.

        Returns:
            `int`: The id of the dataset.

        Raises:
            ValueError: If the label is out of range.
        """
        if not 0 <= label < len(self):
            raise ValueError(f"label {label!r} is out of range: the label map has the labels 0 to {len(self) - 1}")
        return self.category_ids[label]

    @cached_property
    def _labels(self) -> dict[int, int]:
        return {category_id: label for label, category_id in enumerate(self.category_ids)}

    @property
    def id2label(self) -> dict[int, str]:
        """Class label to name, as a model configuration stores it."""
        return dict(enumerate(self.names))

    @property
    def label2id(self) -> dict[str, int]:
        """Name to class label, as a model configuration stores it."""
        return {name: label for label, name in enumerate(self.names)}

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.category_ids)

    def __str__(self) -> str:
        """Return a table with a line a class: label, category id, name."""
        rows = [("label", "category id", "name")]
        rows += [(str(label), str(self.category_ids[label]), name) for label, name in enumerate(self.names)]
        return "\n".join(f"{label:>5}  {category_id:>11}  {name}" for label, category_id, name in rows)
