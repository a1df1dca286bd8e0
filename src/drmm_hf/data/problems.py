"""What can be wrong with data: every kind by name, the record of what was found, and the one policy about it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


logger = logging.getLogger(__name__)

Policy = Literal["error", "skip"]

KINDS = {
    "unreadable_annotations": (
        "annotations that cannot be read",
        "nothing of this split can be used before the file is mended",
    ),
    "bad_record": ("records that break their format", "write the fields that the message asks for"),
    "outside_folder": ("file names that leave the data folder", "name files relative to it, without '..'"),
    "missing_picture": ("pictures that do not exist", "add the files, or delete their records"),
    "missing_annotation": (
        "listed pictures without an annotation file",
        "add the file, or take the name off the list",
    ),
    "unreadable_picture": ("pictures that cannot be decoded", "fetch the files again, or delete their records"),
    "unsupported_picture": ("pictures that are not of 8 bits", "convert them to 8 bits"),
    "wrong_size": (
        "pictures of another size than their annotations say",
        "boxes are wrong too if the pictures were resized: resize both",
    ),
    "duplicate_image_id": ("image ids that two pictures claim", "give every picture its own id"),
    "duplicate_annotation_id": ("annotation ids that occur twice", "give every annotation its own id"),
    "unknown_image": ("annotations of pictures that are not listed", "list the pictures, or delete the annotations"),
    "unknown_category": ("annotations of unknown categories", "add the categories, or correct the ids"),
    "box_not_finite": ("boxes that are not 4 finite numbers", "correct the boxes"),
    "box_without_area": (
        "boxes without area inside their picture",
        "correct boxes that are empty, inverted or outside; look whether they are in another format",
    ),
    "corners": (
        "splits whose boxes are [left, top, right, bottom]",
        "write [left, top, width, height], as COCO has them",
    ),
    "other_categories": (
        "splits with other categories than the first",
        "give all splits one list of categories: a model trained on one cannot be measured on the other",
    ),
    "leaked_picture": ("pictures that other splits hold too", "keep each in one split: figures on it mean nothing"),
}
"""Kind -> (what is counted, what to do about it)."""


@dataclass
class Problems:
    """Collect what is wrong with one split.

    Args:
        listed (`int`, *optional*): How many messages of each kind to keep; None keeps all.
        found (`dict[str, dict]`): Kind -> `count` and the `first` messages; json as it is.
    """

    listed: int | None = 5
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, where: str, message: object) -> None:
        """Record a problem.

        Args:
            kind (`str`): A key of `KINDS`.
            where (`str`): File and record.
            message (`object`): What is there and what the rule is.
        """
        entry = self.found.setdefault(kind, {"count": 0, "first": []})
        entry["count"] += 1
        if self.listed is None or entry["count"] <= self.listed:
            entry["first"].append(f"{where}: {message}")

    def merge(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Add what was found elsewhere.

        Args:
            found (`Mapping`): `found` of other `Problems`.
        """
        for kind, entry in found.items():
            own = self.found.setdefault(kind, {"count": 0, "first": []})
            own["count"] += entry["count"]
            own["first"] = [*own["first"], *entry["first"]][: self.listed]

    def __len__(self) -> int:
        """Return how many problems there are."""
        return sum(entry["count"] for entry in self.found.values())

    def lines(self) -> list[str]:
        """Return the counts and the first messages as lines of text."""
        lines = []
        for kind in sorted(self.found, key=list(KINDS).index):
            entry = self.found[kind]
            lines.append(f"{KINDS[kind][0]}: {entry['count']}")
            lines += [f"  {message}" for message in entry["first"]]
            if entry["count"] > len(entry["first"]):
                lines.append(f"  and {entry['count'] - len(entry['first'])} more")
        return lines

    def settle(self, source: str, policy: Policy) -> None:
        """Apply the policy to what was found and left out.

        Args:
            source (`str`): Name of the data, for the message.
            policy (`"error"` or `"skip"`): Whether to raise or to log a warning.

        Raises:
            FileNotFoundError: With `error`, if nothing but pictures is missing.
            ValueError: With `error`, if there is any other problem.
        """
        if not self.found:
            return
        text = "\n  ".join(self.lines())
        if policy == "error":
            kind = FileNotFoundError if set(self.found) == {"missing_picture"} else ValueError
            raise kind(
                f"{source}, problems found: {len(self)}; correct them (drmm doctor lists all), or leave such pictures "
                f"and boxes out with invalid='skip'.\n  {text}"
            )
        logger.warning("%s, problems found and left out: %d\n  %s", source, len(self), text)


def causes(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say in a line a kind what was found, with the first of each.

    Args:
        found (`Mapping`): `Problems.found`, or what `drmm_hf.data.coco.left_out` returns.

    Returns:
        `list[str]`: In the order of `KINDS`.
    """
    kinds = sorted(found, key=list(KINDS).index)
    return [f"{KINDS[kind][0]}: {found[kind]['count']}, such as {found[kind]['first'][0]}" for kind in kinds]


def check_policy(invalid: str) -> None:
    """Refuse an unknown policy.

    Args:
        invalid (`str`): The policy.

    Raises:
        ValueError: If it is neither `error` nor `skip`.
    """
    if invalid not in ("error", "skip"):
        raise ValueError(f"invalid is {invalid!r}, must be 'error' or 'skip'")
