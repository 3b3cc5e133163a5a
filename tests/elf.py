"""Symbol versions of a shared library, read from the ELF file itself."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

SHT_DYNSYM, SHT_VERDEF, SHT_VERSYM = 11, 0x6FFFFFFD, 0x6FFFFFFF
HIDDEN = 0x8000


class Symbol(NamedTuple):
    """An exported symbol: ``name@@version`` where it is the default, else ``name@version``."""

    version: str
    default: bool


def exported(path: Path | str) -> dict[str, Symbol]:
    """Defined dynamic symbols of a 64-bit little-endian library, with their versions."""
    data = Path(path).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is no 64-bit little-endian ELF file"
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = []
    for i in range(count):
        fields = struct.unpack_from("<IIQQQQII", data, table + i * size)
        sections.append((fields[1], fields[4], fields[5], fields[6]))  # type, offset, size, link

    def only(kind: int) -> tuple[int, int, int, int]:
        return next(section for section in sections if section[0] == kind)

    def text(section: int, at: int) -> str:
        start = sections[section][1] + at
        return data[start : data.index(b"\0", start)].decode()

    versions = {0: "", 1: ""}  # local, and the base
    _, offset, _, link = only(SHT_VERDEF)
    while True:
        _, _, index, _, _, first, after = struct.unpack_from("<HHHHIII", data, offset)
        (name,) = struct.unpack_from("<I", data, offset + first)
        versions[index] = text(link, name)
        if not after:
            break
        offset += after

    found = {}
    _, symbols, length, strings = only(SHT_DYNSYM)
    _, indices, _, _ = only(SHT_VERSYM)
    for i in range(length // 24):
        name, _, _, section, _, _ = struct.unpack_from("<IBBHQQ", data, symbols + i * 24)
        (index,) = struct.unpack_from("<H", data, indices + i * 2)
        if section and name:
            default = not index & HIDDEN
            if default or text(strings, name) not in found:
                found[text(strings, name)] = Symbol(versions[index & ~HIDDEN], default)
    return found
