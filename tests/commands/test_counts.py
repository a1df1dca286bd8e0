"""Whole numbers of the command line are refused before a command touches anything."""

import argparse

import pytest

from drmm_cli import main
from drmm_hf.commands.counts import at_least


@pytest.mark.parametrize("word", ["1", "7", "2147483647"])
def test_counts_are_taken(word):
    assert at_least(1)(word) == int(word)


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "many", "", "2147483648", "99999999999999999999", "9" * 5000])
def test_others_are_refused(word):
    with pytest.raises(
        argparse.ArgumentTypeError, match="the rule is a whole number of at least 1 and at most 2147483647"
    ):
        at_least(1)(word)


@pytest.mark.parametrize(
    "words",
    [
        ["doctor", "DATA", "--num-queries"],
        ["evaluate", "MODEL", "DATA", "--top-k"],
        ["predict", "MODEL", "a.jpg", "--tile"],
    ],
)
def test_a_number_that_no_library_takes_is_refused(words, capsys):
    with pytest.raises(SystemExit) as leave:
        main([*words, "99999999999999999999"])
    assert leave.value.code == 2
    assert "the rule is a whole number of at least" in capsys.readouterr().err
