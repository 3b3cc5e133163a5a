"""Shared libraries as files: whether one is whole, what it has, and the first of some that serves.

Every candidate is looked at, and what was refused is named with its reason.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from . import _loader

__all__ = ["Candidate", "Library", "defect", "defect_of_name", "files", "first", "loaded",
           "opened"]  # fmt: skip

Candidate: TypeAlias = tuple[str, str, bool]
"""Path of a library, how it was found, and whether it is loaded."""


@dataclass(frozen=True)
class Library:
    """A library that was found, or why there is none.

    Attributes
    ----------
    handle : int
        The loader's; 0 where there is none.
    path : str
        The file.
    found : str
        How it was found, or why not.
    refused : tuple of str
        What was looked at before, and what is wrong with it.
    emulate : tuple of int, or None
        Versions of the runtime and the driver that an emulated one is asked to be.
    """

    handle: int
    path: str
    found: str
    refused: tuple[str, ...] = ()
    emulate: tuple[int, int] | None = None


def defect(path: str) -> str | None:
    """Why a file is no whole 64-bit shared library, or None.

    The loader maps what the headers say and dies by SIGBUS where the file ends before.
    """
    try:
        size = os.stat(path).st_size
        if not os.path.isfile(path):
            return "is no file: it is a folder or a device"
        with open(path, "rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
                return None  # the loader says what is wrong with it
            start, sections = struct.unpack_from("<QQ", head, 32)
            each, count, section, how_many = struct.unpack_from("<HHHH", head, 54)
            file.seek(min(start, size))
            table = file.read(each * count)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    needed = max(start + each * count, sections + section * how_many)
    if each >= 56 and len(table) == each * count:
        for at in range(0, len(table), each):
            kind, offset = struct.unpack_from("<I4xQ", table, at)
            (length,) = struct.unpack_from("<Q", table, at + 32)
            if kind == 1:  # a part of the file that is mapped
                needed = max(needed, offset + length)
    if needed > size:
        return f"is cut off: it has {size} bytes, and its headers speak of {needed}"
    return None


def defect_of_name(path: str) -> str | None:
    """As `defect`, also for a name that the loader would look for."""
    if os.sep in path:
        return defect(path)
    if _loader.open_library(path, only_loaded=True):
        return None
    # LD_LIBRARY_PATH and the system's folders are the same for every library.
    handle = _loader.open_library("libc.so.6", only_loaded=True)
    if not handle:
        return None
    places = [os.path.join(folder, path) for folder in _loader.search_path(handle)]
    file = next(filter(os.path.exists, places), "")
    wrong = defect(file) if file else None
    return f"is {file}, which {wrong}" if wrong else None


def opened(
    path: str, found: str, needed: Sequence[str], *, is_loaded: bool = False
) -> Library | str:
    """Open a library that must have some functions; what is wrong with it otherwise."""
    wrong = None if is_loaded else defect_of_name(path)
    if wrong:
        return wrong
    handle = _loader.open_library(path)
    if not handle:
        return f"cannot be loaded: {_loader.open_error()}"
    for name in needed:
        if not _loader.symbol(handle, name):
            return f"does not have {name}"
    return Library(handle, _loader.address_file(_loader.symbol(handle, needed[0])) or path, found)


def first(candidates: Iterator[Candidate], needed: Sequence[str]) -> Library:
    """The first candidate that is whole; else a handle of 0, and why none is."""
    refused: list[str] = []
    seen = set()
    for path, found, is_loaded in candidates:
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        library = opened(path, found, needed, is_loaded=is_loaded)
        if isinstance(library, Library):
            return replace(library, refused=tuple(refused))
        refused.append(f"{path} {library}")
    return Library(0, "", "; ".join(refused), tuple(refused))


def loaded(pattern: re.Pattern[str]) -> list[str]:
    """Paths of the libraries of this process that have a certain name."""
    return [p for p in _loader.loaded_libraries() if pattern.fullmatch(os.path.basename(p))]


def files(folders: Sequence[str], pattern: re.Pattern[str]) -> Iterator[str]:
    """Paths of the files in some folders that have a certain name, the highest version first."""
    for folder in folders:
        for name in sorted(os.listdir(folder), reverse=True) if os.path.isdir(folder) else ():
            if pattern.fullmatch(name):
                yield os.path.join(folder, name)
