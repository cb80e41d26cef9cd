"""Types of command-line values, each with the range that makes sense."""

from __future__ import annotations

import argparse

from mla.checks import UnsupportedError
from mla.codec import Codec, codec_from_spec


def share(text: str) -> float:
    """A number above 0, at most 1."""
    value = _number(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"has value {text}, expected above 0 and at most 1")
    return value


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def at_least_two(text: str) -> int:
    """An integer of at least 2."""
    return _integer(text, 2)


def temperature(text: str) -> float:
    """A number of at least 0."""
    value = _number(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"has value {text}, expected at least 0")
    return value


def codec(text: str) -> Codec:
    """A codec with its defaults by kind, or ``kind/group/rope bits/rotated`` in full."""
    try:
        return codec_from_spec(text)
    except UnsupportedError as error:
        reason = str(error).partition(": ")[2]
        raise argparse.ArgumentTypeError(f"has value {text!r}: {reason}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"has value {text!r}, expected a number") from None


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"has value {text!r}, expected an integer") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"has value {value}, expected at least {least}")
    return value
