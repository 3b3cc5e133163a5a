"""What the commands' arguments are read by; each refusal names the value and what would do."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

__all__ = [
    "UsageError",
    "existing",
    "many",
    "natural",
    "one_of",
    "output",
    "positive",
    "size",
]

UNITS = {"": 1, "B": 1, "K": 1 << 10, "KIB": 1 << 10, "M": 1 << 20, "MIB": 1 << 20}
MOST_BYTES = 1 << 30


class UsageError(ValueError):
    """Arguments that do not go together: the command line ends with exit code 2."""


def natural(text: str, least: int = 0) -> int:
    """Read a whole number, not negative and not huge."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not least <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{value} is not from {least} to {(1 << 32) - 1}")
    return value


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    return natural(text, least=1)


def many(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Make a reader of values with commas between them."""

    def read_many(text: str) -> list[Any]:
        return [read(part.strip()) for part in text.split(",")]

    return read_many


def one_of(values: Iterable[str]) -> Callable[[str], str]:
    """Make a reader of one of some words."""
    known = tuple(values)

    def read(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of: {', '.join(known)}")
        return text

    return read


def size(text: str) -> int:
    """Read a number of bytes, with K or M behind it where it is in KiB or MiB: ``1.5M``."""
    refusal = argparse.ArgumentTypeError(
        f"{text!r} is not a number of bytes up to 1 GiB, such as 512, 64K or 1.5M"
    )
    found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text)
    if found is None or found[2].upper() not in UNITS:
        raise refusal
    try:
        value = Decimal(found[1]) * UNITS[found[2].upper()]
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"{text!r}: {found[1]!r} is not a number") from None
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is {value:f} bytes, not a whole number of them")
    if not 1 <= value <= MOST_BYTES:
        raise refusal
    return int(value)


def existing(text: str) -> Path:
    """Read the path of a file or folder that is there."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file or folder")
    return path


def output(text: str) -> Path:
    """Read the path of a file to be written: its folder is there."""
    path = Path(text)
    folder = path.resolve().parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {folder}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder, not a file")
    return path
