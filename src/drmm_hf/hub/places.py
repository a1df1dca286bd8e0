"""Names instead of places: what is published does not tell where on whose machine things lay."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id


# How a place begins: an address, a drive, a network share, the root, a home, or here and above.
_START = r"(?:[A-Za-z][\w+.-]*://|[A-Za-z]:[\\/]|\\\\|/|~[\w.-]*(?=[\\/]|$)|\.{1,2}[\\/])"
_PLACE = re.compile(_START)
_PLACE_INSIDE = re.compile(rf"(?<![\w./\\]){_START}[^\s'\",;=]+")
_HOME = re.compile(r"(?:/home|/Users|[A-Za-z]:[\\/]Users)[\\/][^\\/]+[\\/]?|/root/?|~[\w.-]*")


def names_only(content: Any) -> Any:
    """Reduce every place in what a json or yaml file holds to its name.

    A place is an address, a path that is absolute, begins at a home, here or above, or has two folders and more.
    What may be an id on the Hub ("owner/name") stays. A home folder becomes "~".

    Args:
        content (`Any`): Lists and mappings of texts, numbers and the like.

    Returns:
        `Any`: The same with names.
    """
    if isinstance(content, Mapping):
        return {key: names_only(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [names_only(value) for value in content]
    if not isinstance(content, str):
        return content
    if _PLACE.match(content):
        return _name(content)
    if "/" in content and not re.search(r"\s", content) and not may_be_repo_id(content):
        return _name(content)
    return _PLACE_INSIDE.sub(lambda found: _name(found[0]), content)


def command_names_only(command: str) -> str:
    """Reduce every place in a command line to its name.

    Args:
        command (`str`): As a shell takes it.

    Returns:
        `str`: Likewise, with names.
    """
    words = []
    for word in shlex.split(command):
        option, equals, value = word.partition("=")
        words.append(option + equals + names_only(value) if equals and option.startswith("-") else names_only(word))
    return shlex.join(words)


def may_be_repo_id(text: str) -> bool:
    """Tell whether a text has the form "owner/name".

    Args:
        text (`str`): Any text.

    Returns:
        `bool`: Whether it is a valid id on the Hub, with an owner.
    """
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def _name(place: str) -> str:
    """Return the last part of a place."""
    if _HOME.fullmatch(place):
        return "~"
    if "://" in place:
        place = re.sub(r"[?#].*", "", place.partition("://")[2]).partition("/")[2]
    parts = [part for part in re.split(r"[\\/]+", place) if part not in ("", ".", "..")]
    return parts[-1] if parts else ""
