"""Options that several of these scripts have."""

from __future__ import annotations

import argparse


def numbers(text: str) -> list[int]:
    """Positive numbers between commas; the type of an argument, so that a wrong one ends the program with a sentence.

    >>> numbers("1,16"), numbers("")
    ([1, 16], [])
    """
    found = [one.strip() for one in text.split(",") if one]
    if not all(one.isascii() and one.isdigit() and int(one) > 0 for one in found):
        raise argparse.ArgumentTypeError(f"{text!r} are not positive numbers with commas between them, such as 1,16")
    return [int(one) for one in found]
