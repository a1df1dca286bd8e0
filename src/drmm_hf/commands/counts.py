"""Whole numbers of the command line, refused before a command touches anything."""

from __future__ import annotations

import argparse
from collections.abc import Callable


# Libraries keep numbers in 32 or 64 bits, and fail beyond them in their own words.
_MOST = 2**31 - 1


def at_least(least: int) -> Callable[[str], int]:
    """Return a `type` of argparse: whole numbers from the least one on, up to what 32 bits hold.

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
        if not least <= value <= _MOST:
            shown = word if len(word) <= 30 else f"{word[:27]}..."
            rule = f"a whole number of at least {least} and at most {_MOST}"
            raise argparse.ArgumentTypeError(f"{shown!r} is given; the rule is {rule}")
        return value

    return count
