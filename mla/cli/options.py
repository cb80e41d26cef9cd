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


def positives(text: str) -> list[int]:
    """Integers of at least 1, separated by commas."""
    return [positive(part) for part in text.split(",")]


def context(text: str) -> int:
    """A number of tokens; k and M are 1024 and 1024 * 1024 of them: ``128k`` is 131,072."""
    factor = {"k": 2**10, "m": 2**20}.get(text[-1:].lower(), 1)
    return positive(text[:-1] if factor > 1 else text) * factor


def quantity(text: str) -> float:
    """A number above 0; k, M, G, T and P are powers of 1000: ``3.35T``."""
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1:], 1.0)
    value = _number(text[:-1] if factor > 1 else text) * factor
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"has value {text}, expected a finite number above 0")
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
