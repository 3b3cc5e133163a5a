"""What arguments are read by: the value that is meant, or a refusal that names it."""

from __future__ import annotations

import argparse

import pytest

from kvsig.cli import arguments


@pytest.mark.parametrize(
    ("text", "count"),
    [("512", 512), ("4K", 4096), ("64KiB", 65536), ("1m", 1 << 20), ("1.5M", 3 << 19),
     ("0.5K", 512), ("2.0", 2), ("1024 K", 1 << 20)],
)  # fmt: skip
def test_sizes(text, count):
    assert arguments.size(text) == count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12Q", "'12Q' is not a number of bytes up to 1 GiB, such as 512, 64K or 1.5M"),
        ("0", "'0' is not a number of bytes up to 1 GiB"),
        ("2048M", "'2048M' is not a number of bytes up to 1 GiB"),
        ("-4K", "'-4K' is not a number of bytes"),
        ("1.5", "'1.5' is 1.5 bytes, not a whole number of them"),
        ("0.3K", "'0.3K' is 307.2 bytes, not a whole number of them"),
        ("1.2.3", "'1.2.3': '1.2.3' is not a number"),
        ("", "'' is not a number of bytes"),
        ("K", "'K' is not a number of bytes"),
    ],
)
def test_sizes_that_are_none(text, said):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        arguments.size(text)
    assert str(caught.value).startswith(said)


def test_files(tmp_path):
    assert arguments.existing(str(tmp_path)) == tmp_path
    with pytest.raises(argparse.ArgumentTypeError, match="/no: there is no such file or folder"):
        arguments.existing("/no")
    assert arguments.output(str(tmp_path / "x.json")) == tmp_path / "x.json"
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder, not a file"):
        arguments.output(str(tmp_path))


def test_many():
    assert arguments.many(arguments.size)("256, 4K") == [256, 4096]
    with pytest.raises(argparse.ArgumentTypeError, match="'odd' is not one of: a, b"):
        arguments.many(arguments.one_of(("a", "b")))("a,odd")
