"""The registry of CUDA prototypes that ``signatures.toml`` is.

Standard library only, so that the build, the run time and the tests share one reader. What the
file says is in ``registry_model.py``, how it is checked in ``registry_reader.py``; its format is
explained at its top.
"""

from __future__ import annotations

import functools
import hashlib
import stat
import tomllib
from collections.abc import Iterable
from pathlib import Path

from .registry_model import (
    INTEGERS,
    PATH,
    RUNTIME,
    SCALARS,
    Alias,
    CType,
    Enum,
    Field,
    Function,
    Library,
    Param,
    Registry,
    Struct,
    Variant,
    format_version,
    next_major,
    parse_version,
    resolve,
)
from .registry_reader import Reader, build

__all__ = [
    "INTEGERS",
    "PATH",
    "RUNTIME",
    "SCALARS",
    "Alias",
    "CType",
    "Enum",
    "Field",
    "Function",
    "Library",
    "Param",
    "Registry",
    "RegistryError",
    "Struct",
    "Variant",
    "format_version",
    "load",
    "next_major",
    "parse_version",
    "resolve",
]

MAX_BYTES = 1 << 23


class RegistryError(ValueError):
    """The registry file is wrong.

    The message lists every offender of the file, each with its dotted place.

    Attributes
    ----------
    problems : tuple of str
        One line for each offender.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{source}: {count} error{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[type[RegistryError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.source, self.problems)


def parse(text: bytes | str, source: str = "signatures.toml", path: Path = PATH) -> Registry:
    """Read a registry from the text of a TOML file.

    Parameters
    ----------
    text : bytes or str
        The file.
    source : str
        What to call it in errors.

    Raises
    ------
    RegistryError
        Lists every offender of the file with its place.
    """
    raw = text.encode() if isinstance(text, str) else text
    if len(raw) > MAX_BYTES:
        raise RegistryError(source, [f"file: has {len(raw)} bytes; at most {MAX_BYTES} are read"])
    read = Reader()
    try:
        data = tomllib.loads(raw.decode())
        registry = build(read, data, hashlib.sha256(raw).hexdigest(), path)
    except RecursionError:
        raise RegistryError(source, ["file: tables, arrays or structs nest too deeply"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(source, [f"not TOML: {error}"]) from None
    except ValueError as error:
        # Python's own bound on the digits of an integer, which tomllib passes on.
        raise RegistryError(source, [f"not TOML: too many digits: {error}"]) from None
    if read.problems:
        raise RegistryError(source, read.problems)
    return registry


def digest(path: Path | str | None = None) -> str:
    """SHA-256 of a registry file, in hexadecimal."""
    return hashlib.sha256(_regular(Path(path or PATH)).read_bytes()).hexdigest()


def _regular(file: Path) -> Path:
    """The file, which must be one: reading a FIFO would wait for ever."""
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise RegistryError(str(file), [f"file: is {what}; give a TOML file"])
    return file


@functools.lru_cache(maxsize=8)
def _load(path: Path, stamp: tuple[int, int]) -> Registry:
    return parse(path.read_bytes(), str(path), path)


def load(path: Path | str | None = None) -> Registry:
    """Read a registry file, by default the one that kvsig was installed with.

    Parameters
    ----------
    path : path-like, optional
        A TOML file in the format of ``kvsig/signatures.toml``.

    Returns
    -------
    Registry

    Raises
    ------
    RegistryError
        Lists every offender of the file with its place.
    OSError
        If the file cannot be read.
    """
    file = Path(path or PATH)
    stamp = _regular(file).stat()
    return _load(file, (stamp.st_mtime_ns, stamp.st_size))
