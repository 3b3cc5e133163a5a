"""Which emulated runtimes are built, and building others from a registry."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from kvsig import runtime
from kvsig.registry import Registry, format_version

DIRECTORY = Path(runtime.EMULATED_FOLDER)
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "emulated"

_VERSION = re.compile(r"(?:emulated:)?(\d+)\.(\d+)")


class Library(NamedTuple):
    """One emulated runtime: it serves the versions in [since, before)."""

    since: int
    before: int | None
    path: Path


def parse(version: str | int) -> int:
    """Return a version as CUDA counts.

    Parameters
    ----------
    version : str or int
        "12.9", "emulated:12.9" or 12090.

    Returns
    -------
    int
        12090 for all three.

    Raises
    ------
    ValueError
        The text is no version.
    """
    if isinstance(version, int):
        return version
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        raise ValueError(
            f"{version!r} names no version of an emulated CUDA runtime: "
            'write MAJOR.MINOR, such as "12.9" or "emulated:12.9"'
        )
    return int(match[1]) * 1000 + int(match[2]) * 10


def is_version(text: str) -> bool:
    """Whether a text names a version, such as "12.9" or "emulated:12.9", and so no file."""
    return _VERSION.fullmatch(text.strip()) is not None


def available(directory: Path | str | None = None) -> list[Library]:
    """Return the emulated runtimes that are built, oldest first.

    Parameters
    ----------
    directory : path-like, optional
        Where to look; by default where the build of kvsig puts them.

    Returns
    -------
    list of Library
        Each serves the versions up to the next one's first; the last has no end.
    """
    found = runtime.emulated_libraries(str(directory or DIRECTORY))
    ends = [*(since for since, _ in found[1:]), None]
    served = zip(found, ends, strict=False)
    return [Library(since, end, Path(path)) for (since, path), end in served]


def resolve(version: str | int, directory: Path | str | None = None) -> Path:
    """Return the emulated runtime that serves a version.

    Parameters
    ----------
    version : str or int
        "12.9", "emulated:12.9" or 12090.
    directory : path-like, optional
        Where to look; by default where the build of kvsig puts them.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        The text is no version, nothing is built, or what is built starts later.
    """
    return Path(runtime.emulated_library(parse(version), str(directory or DIRECTORY)))


def build(
    registry: Registry,
    version: str | int,
    directory: Path | str,
    without: Collection[str] = (),
) -> Path:
    """Compile an emulated runtime from a registry.

    Parameters
    ----------
    registry : Registry
        Where the prototypes come from.
    version : str or int
        A version that the library is to serve, such as "14.0" or 14000.
    directory : path-like
        Where the library goes; made if missing.
    without : collection of str, optional
        Symbols that the library is not to export.

    Returns
    -------
    Path
        The library.

    Raises
    ------
    RuntimeError
        The C sources are not there (they are part of the source tree, not of a wheel), or the
        compiler failed.
    """
    sources = sorted(SOURCES.glob("*.c"))
    if not sources:
        raise RuntimeError(
            f"an emulated CUDA runtime is compiled from csrc/emulated/*.c, and {SOURCES} is not "
            "there: it is part of kvsig's source tree, not of an installed wheel"
        )
    number = parse(version)
    glue: str = import_module("kvsig.codegen").emulated_glue(registry, number, without=without)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"libcudart-emulated-{format_version(number)}"
    text = folder / f"{name}.c"
    text.write_text(glue)
    headers = max(header.stat().st_mtime for header in SOURCES.glob("*.h"))
    objects = []
    for source in sources:  # their objects are the same for every version
        common = folder / f"{source.stem}.o"
        objects.append(str(common))
        newest = max(headers, source.stat().st_mtime)
        if not common.exists() or common.stat().st_mtime <= newest:
            _compile(["-c", str(source), "-o", str(common)])
    # Linked under another name first, so that a library which is loaded is not written over.
    library, fresh = folder / f"{name}.so", folder / f"{name}.so.new"
    _compile(["-shared", str(text), *objects, "-o", str(fresh), "-ldl"])
    fresh.replace(library)
    return library


def _compile(arguments: list[str]) -> None:
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    flags = ["-std=gnu11", "-O2", "-fPIC", "-pthread", "-fvisibility=hidden", f"-I{SOURCES}"]
    flags += shlex.split(os.environ.get("KVSIG_EMULATED_CFLAGS", ""))
    command = [*compiler, *flags, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(
            f"no C compiler to build an emulated CUDA runtime: {compiler[0]}: {error.strerror}; "
            "set CC to one"
        ) from error
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
