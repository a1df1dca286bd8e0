"""Whole numbers of the command line, refused before a command touches anything."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return a `type` of argparse: whole numbers from the least one on.

    Args:
        least (`int`): The smallest that is taken.

    Returns:
        `Callable[[str], int]`: From the word on the command line to its number.
    """

    def count(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{word!r} is given; the rule is a whole number of at least {least}")
        return value

    return count
