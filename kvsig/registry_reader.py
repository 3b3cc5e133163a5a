"""Reads ``signatures.toml``: every value is checked, and every offender named with its place.

What passes here reaches generated Cython and C, so that names, types and numbers are checked for
what they may be there, and free text for being one line that a terminal can show.
"""

from __future__ import annotations

import builtins
import keyword
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .registry_model import (
    INTEGERS,
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

_SCALAR_WORDS = frozenset(word for scalar in SCALARS for word in scalar.split()) | {"void"}
_KEYWORDS = _SCALAR_WORDS | {
    "auto", "break", "case", "const", "continue", "default", "do", "else", "enum", "extern",
    "for", "goto", "if", "inline", "register", "restrict", "return", "sizeof", "static",
    "struct", "switch", "typedef", "union", "volatile", "while",
}  # fmt: skip
_CYTHON_WORDS = {
    "DEF", "ELIF", "ELSE", "IF", "NULL", "bint", "by", "cdef", "cimport", "cpdef", "ctypedef",
    "cython", "exec", "extern", "gil", "include", "namespace", "new", "noexcept", "nogil",
    "packed", "public", "readonly", "api",
}  # fmt: skip
_GENERATED = {
    "DIGEST", "FUNCTIONS", "Slot", "UNBOUND", "address", "arguments", "invoke",
    "memcpy", "memset", "result", "slot", "slots", "variant", "which",
}  # fmt: skip
_C_LIBRARY = {
    "EOF", "INT_MAX", "INT_MIN", "abort", "alignas", "alignof", "asm", "assert", "constexpr",
    "errno", "exit", "free", "linux", "main", "malloc", "nullptr", "offsetof", "printf",
    "ptrdiff_t", "static_assert", "stderr", "stdin", "stdout", "thread_local", "typeof",
    "uint32_t", "uint64_t", "int32_t", "int64_t", "unix", "wchar_t",
}  # fmt: skip
RESERVED = frozenset(
    {*keyword.kwlist, *dir(builtins), *_KEYWORDS, *_CYTHON_WORDS, *_GENERATED, *_C_LIBRARY}
)
"""Names that no function, type or constant can have: generated code would mean another thing."""
OWN_PREFIXES = ("kvsig_", "emu_", "SLOT_")
"""How the names begin that generated code makes for itself."""

MAX_NAME, MAX_TEXT, MAX_LENGTH, MAX_POINTERS = 128, 2000, 65536, 8
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FORBIDDEN = re.compile(r"_|kvsig_|emu_")
_MEMBER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_HEADER = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.+-]*/)*[A-Za-z0-9_][A-Za-z0-9_.+-]*\.h")
_WHEEL = re.compile(r"[A-Za-z0-9_.]+-[0-9.]+-[A-Za-z0-9_.]+-[A-Za-z0-9_.]+-[A-Za-z0-9_.]+\.whl")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RELEASE = re.compile(r"[0-9]{1,3}\.[0-9]{1,2}\.[0-9]{1,4}")
_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|[0-9]+|\*|\[|\]|\S)")
_COUNT = re.compile(r"[1-9][0-9]{0,5}")


class _Short(reprlib.Repr):
    """Values as errors show them: of any depth and length, in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxlist = self.maxdict = 20

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        return repr(x) if bits <= 128 else f"an integer of {bits} bits"


_shown = _Short().repr


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


class _Bad(Exception):
    """What is wrong with one value; the place is added by the reader."""


def read_type(tokens: list[str]) -> tuple[CType, list[str]]:
    """Read a type from the front of a token list; return it and what is left."""
    rest = list(tokens)
    const = False
    words: list[str] = []
    while rest:
        token = rest[0]
        if token == "const":
            const = True
        elif token in ("struct", "enum") and not words:
            words.append(token)
        elif token in _SCALAR_WORDS or token in ("signed", "unsigned"):
            if words and words[-1] not in _SCALAR_WORDS:
                break
            words.append(token)
        elif _NAME.fullmatch(token) and (not words or words in (["struct"], ["enum"])):
            words.append(token)
            rest.pop(0)
            if rest and rest[0] == "const":
                const = True
                rest.pop(0)
            break
        else:
            break
        rest.pop(0)
    pointers: list[bool] = []
    while rest and rest[0] in ("*", "const"):
        if rest[0] == "*":
            pointers.append(False)
        elif pointers:
            pointers[-1] = True
        else:
            const = True
        rest.pop(0)
    base = {"unsigned": "unsigned int", "signed": "int"}.get(" ".join(words), " ".join(words))
    return CType(base, const, tuple(pointers)), rest


class Reader:
    """Collects every problem of a file, each with its dotted place."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.where: list[str] = []
        self.enums: dict[str, Enum] = {}
        self.structs: dict[str, Struct] = {}
        self.aliases: dict[str, Alias] = {}
        self.known: set[str] = set()
        self.opaque: set[str] = set()
        self.taken: dict[str, str] = {}

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Add to the place; what is found wrong inside is a problem there."""
        self.where.append(place)
        try:
            yield
        except _Bad as error:
            self.bad(str(error))
        finally:
            self.where.pop()

    def bad(self, text: str, key: str = "") -> None:
        """Note a problem."""
        place = ("".join(self.where) + (f".{key}" if key else "")).lstrip(".")
        # Keys are text of the file as well: in an error they are one line, and not a long one.
        place = "".join(c if c.isprintable() else repr(c)[1:-1] for c in place)
        shown = place if len(place) <= MAX_NAME * 2 else place[: MAX_NAME * 2] + "..."
        self.problems.append(f"{shown or 'file'}: {text}")

    def claim(self, name: str, what: str) -> bool:
        """Check a name that generated code gives to something of its own, once."""
        fault = _name_fault(name)
        if fault is None and (name in RESERVED or name.startswith(OWN_PREFIXES)):
            fault = f"{name!r} is a word of Python, Cython, C or the generated code; it cannot be"
            fault += " the name of anything here"
        if fault is None and self.taken.setdefault(name, what) != what:
            fault = f"{name!r} is the name of {self.taken[name]} already; every name stands once"
        if fault is not None:
            self.bad(fault)
        return fault is None

    def table(
        self, value: object, allowed: Iterable[str], required: Iterable[str] = ()
    ) -> dict[str, Any] | None:
        """Check that a value is a table with the right keys."""
        if not isinstance(value, dict):
            self.bad(f"must be a table, not {_shown(value)}")
            return None
        allowed = tuple(allowed)
        for key in value:
            if key not in allowed:
                self.bad(f"unknown key; use one of: {', '.join(allowed)}", key)
        for key in required:
            if key not in value:
                self.bad("missing key; add it", key)
        return value

    def section(self, data: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
        """Walk the named tables of a section, with the place set to each."""
        tables = data.get(name, {})
        if not isinstance(tables, dict):
            self.bad(f"must be a table, not {_shown(tables)}", name)
            return
        for key, value in tables.items():
            with self.at(f".{name}.{key}"):
                if self.claim(key, f"[library.{key}]" if name == "library" else f"[{name}.{key}]"):
                    yield key, value

    def text(self, table: dict[str, Any], key: str, default: str = "") -> str:
        """Text of one printable line."""
        value = table.get(key, default)
        if not isinstance(value, str) or (key in table and not value.strip()):
            self.bad(f"must be text, not {_shown(value)}", key)
            return default
        if not value.isprintable() or len(value) > MAX_TEXT:
            self.bad(f"must be one line of printable text, not {_shown(value)}", key)
            return default
        return value

    def match(self, table: dict[str, Any], key: str, pattern: re.Pattern[str], what: str) -> str:
        """Text of a certain form."""
        value = self.text(table, key)
        if value and not pattern.fullmatch(value):
            self.bad(f"must be {what}, not {_shown(value)}", key)
            return ""
        return value

    def flag(self, table: dict[str, Any], key: str) -> bool:
        """True or false; false where it is missing."""
        value = table.get(key, False)
        if not isinstance(value, bool):
            self.bad(f"must be true or false, not {_shown(value)}", key)
            return False
        return value

    def version(self, table: dict[str, Any], key: str) -> int | None:
        """A version as CUDA counts."""
        if key not in table:
            return None
        try:
            return parse_version(table[key])
        except ValueError as error:
            self.bad(str(error), key)
            return None

    def name(self, table: dict[str, Any], key: str, default: str = "") -> str:
        """A C name."""
        value = self.text(table, key, default)
        fault = _name_fault(value) if key in table and value else None
        if fault is not None:
            self.bad(fault, key)
            return default
        return value

    def ctype(self, ctype: CType) -> None:
        """Complain about a type that is not known."""
        word, _, rest = ctype.base.partition(" ")
        if len(ctype.pointers) > MAX_POINTERS:
            raise _Bad(f"{len(ctype.pointers)} levels of pointers; at most {MAX_POINTERS}")
        if ctype.base == "void":
            if not ctype.pointers:
                raise _Bad("void is no type for a value; use a pointer")
        elif word == "enum" and rest:
            if rest not in self.enums:
                raise _Bad(f"type {ctype.base!r} is not known; declare [enum.{rest}]")
        elif word == "struct" and rest:
            if rest not in self.known:
                raise _Bad(f"type {ctype.base!r} is not known; declare [struct.{rest}]")
        elif ctype.base not in SCALARS | self.enums.keys() | self.known | self.aliases.keys():
            raise _Bad(
                f"type {ctype.base!r} is not known; use a C type, or declare it under"
                " [struct], [enum] or [alias]"
            )
        resolved = resolve(ctype, self.aliases)
        if not resolved.pointers and resolved.name in self.opaque:
            raise _Bad(f"struct {ctype.name} is opaque; use a pointer, or declare its fields")

    def declaration(self, text: object) -> tuple[str, CType, int | None]:
        """Read ``TYPE NAME`` or, in a struct, ``TYPE NAME[LENGTH]``."""
        if not isinstance(text, str):
            raise _Bad(f'must be a C declaration, such as "size_t count", not {_shown(text)}')
        _check_plain(text)
        ctype, rest = read_type(_tokens(text))
        if not ctype.base:
            raise _Bad(f'{text!r} has no type; write it as in the header, such as "size_t count"')
        if not rest and not ctype.pointers and _c_name(ctype.base) and (ctype.base not in SCALARS):
            raise _Bad(f'{text!r} has no type or no name; write both, such as "size_t count"')
        if not rest:
            raise _Bad(f'{text!r} has no name; give the header\'s, such as "size_t count"')
        name, *rest = rest
        if not _c_name(name):
            raise _Bad(f"{name!r} in {text!r} is not a C name; use letters, digits and _")
        fault = _name_fault(name)
        if fault is not None:
            raise _Bad(fault)
        length = None
        if len(rest) == 3 and rest[0] == "[" and rest[2] == "]":
            if not _COUNT.fullmatch(rest[1]) or int(rest[1]) > MAX_LENGTH:
                raise _Bad(
                    f"{rest[1]!r} in {text!r} is no length of an array; give a number from 1 to"
                    f" {MAX_LENGTH}, without a zero in front"
                )
            length, rest = int(rest[1]), []
        if rest:
            raise _Bad(
                f"{text!r} is no plain declaration after {name!r}; give one type and one name"
            )
        self.ctype(ctype)
        return name, ctype, length


def _c_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and text not in _KEYWORDS


def _name_fault(text: str) -> str | None:
    """Why a name cannot be used, or None."""
    if not _c_name(text):
        return f"{_shown(text)} is not a C name; use letters, digits and _"
    if len(text) > MAX_NAME:
        return f"{_shown(text)} has {len(text)} letters; a name has at most {MAX_NAME}"
    if _FORBIDDEN.match(text):
        return f"{text!r} begins as names do that compilers and generated code keep for themselves"
    return None


def _check_plain(text: str) -> None:
    """Refuse what no C declaration has: controls, backslashes, letters of other scripts."""
    if not text.isascii() or not text.isprintable() or len(text) > MAX_TEXT:
        raise _Bad(f"{_shown(text)} has characters that no C declaration has; write plain ASCII")


def _read_libraries(read: Reader, data: dict[str, Any]) -> dict[str, Library]:
    found = {}
    for name, value in read.section(data, "library"):
        keys = ("header", "soname", "version", "lookup", "optional")
        table = read.table(value, keys, keys[:3])
        if table is not None:
            found[name] = Library(
                name,
                read.match(table, "header", _HEADER, 'a header such as "cuda.h"'),
                _read_sonames(read, table),
                read.name(table, "version"),
                read.name(table, "lookup") or None,
                read.flag(table, "optional"),
            )
    return found


def _read_sonames(read: Reader, table: dict[str, Any]) -> tuple[str, ...]:
    """``soname``: one name, or a list of them in the order in which they are tried."""
    what = 'a file name such as "libcuda.so.1"'
    value = table.get("soname", "")
    if not isinstance(value, list):
        return (read.match(table, "soname", _FILE, what),)
    names = [n for n in value if isinstance(n, str) and _FILE.fullmatch(n) and len(n) <= MAX_NAME]
    if not value or names != value:
        read.bad(f"must be {what}, or a list of them, not {_shown(value)}", "soname")
        return ("",)
    return tuple(names)


def _library(read: Reader, table: dict[str, Any], libraries: dict[str, Library]) -> str:
    name = read.text(table, "library")
    if name and name not in libraries:
        read.bad(f"{_shown(name)} is not a library; declare [library.{name}]", "library")
    return name


def _read_enums(read: Reader, data: dict[str, Any], libraries: dict[str, Library]) -> None:
    for name, value in read.section(data, "enum"):
        read.enums[name] = Enum(name, "", 0, {})
        table = read.table(value, ("library", "since", "constants"), ("library", "constants"))
        if table is None:
            continue
        constants = table.get("constants", {})
        good: dict[str, int] = {}
        if not isinstance(constants, dict):
            read.bad(f"must be a table of numbers, not {_shown(constants)}", "constants")
            constants = {}
        for key, number in constants.items():
            with read.at(f".constants.{key}"):
                if not read.claim(key, f"a constant of [enum.{name}]"):
                    continue
                if not _is_int(number) or not -(2**31) <= number < 2**32:
                    raise _Bad(f"must be an integer of 32 bits, not {_shown(number)}")
                good[key] = number
        since = read.version(table, "since") or 0
        read.enums[name] = Enum(name, _library(read, table, libraries), since, good)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_aliases(read: Reader, data: dict[str, Any]) -> None:
    for name, value in read.section(data, "alias"):
        if not isinstance(value, str):
            read.bad(f'must be a C type, such as "void *", not {_shown(value)}')
            continue
        # What the body of a loop raises does not reach the place that the generator has set.
        with read.at(""):
            read.aliases[name] = Alias(name, _plain_type(read, value, "void *"))


def _plain_type(read: Reader, text: str, example: str) -> CType:
    _check_plain(text)
    ctype, rest = read_type(_tokens(text))
    if rest or not ctype.base:
        raise _Bad(f'{text!r} is no plain C type; use one such as "{example}"')
    read.ctype(ctype)
    return ctype


def _read_structs(read: Reader, data: dict[str, Any], libraries: dict[str, Library]) -> None:
    tables = data.get("struct", {})
    if isinstance(tables, dict):
        read.known = set(tables)
        read.opaque = {
            name
            for name, table in tables.items()
            if isinstance(table, dict) and "fields" not in table
        }
    for name, value in read.section(data, "struct"):
        keys = ("library", "since", "size", "fields", "typedef", "grows")
        table = read.table(value, keys, ("library",))
        if table is None:
            continue
        size = table.get("size")
        if size is not None and not (_is_int(size) and 1 <= size < 2**31):
            read.bad(f"must be a number of bytes, not {_shown(size)}", "size")
            size = 1
        if "fields" in table and size is None:
            read.bad("missing key; give the size in bytes", "size")
        fields = []
        names: set[str] = set()
        items = table.get("fields", [])
        if not isinstance(items, list):
            read.bad(f"must be a list of C declarations, not {_shown(items)}", "fields")
            items = []
        elif "fields" in table and not items:
            read.bad("must have a field; without the key the struct is opaque", "fields")
        for index, item in enumerate(items):
            with read.at(f".fields[{index}]"):
                member = None
                if isinstance(item, dict):
                    entry = read.table(item, ("declaration", "member"), ("declaration",)) or {}
                    form = 'the path of a field such as "op.ptr"'
                    member = read.match(entry, "member", _MEMBER, form) or None
                    item = entry.get("declaration")
                    if item is None:
                        continue
                field_name, ctype, length = read.declaration(item)
                if field_name in names:
                    raise _Bad(f"field {field_name!r} is there twice; name each once")
                names.add(field_name)
                fields.append(Field(item, field_name, ctype, length, member or field_name))
        read.structs[name] = Struct(
            name,
            _library(read, table, libraries),
            read.version(table, "since") or 0,
            size,
            tuple(fields),
            read.flag(table, "typedef"),
            read.text(table, "grows") or None,
        )


def _check_cycles(read: Reader) -> None:
    """Complain about structs that hold themselves by value."""
    for name in read.structs:
        inside, todo = set(), [name]
        while todo:
            struct = read.structs.get(todo.pop())
            types = [resolve(f.type, read.aliases) for f in struct.fields] if struct else []
            held = [t.name for t in types if not t.pointers]
            todo += [other for other in held if other not in inside]
            inside.update(held)
        if name in inside:
            with read.at(f".struct.{name}"):
                read.bad("holds itself; use a pointer", "fields")


def _read_value(read: Reader, value: object, ctype: CType) -> int | str | dict[str, int]:
    inner = resolve(ctype, read.aliases)
    if isinstance(value, dict):
        struct = read.structs.get(inner.name)
        if struct is None or inner.pointers:
            raise _Bad(f"value {_shown(value)} is a table, but {ctype} is not a struct")
        fields = {f.name: f for f in struct.fields}
        for key, number in value.items():
            if key not in fields:
                raise _Bad(
                    f"value has a field {_shown(key)}; {ctype} has: {', '.join(sorted(fields))}"
                )
            if not _is_int(number):
                raise _Bad(f"value of field {key!r} must be a number, not {_shown(number)}")
            held = resolve(fields[key].type, read.aliases)
            if fields[key].length is not None or (not held.pointers and held.name in read.structs):
                raise _Bad(f"field {key!r} is no single number, and can have no value here")
            _check_fits(read, f"value of field {key!r}", number, held)
        return value
    if not _is_int(value) and not isinstance(value, str):
        raise _Bad(
            f"value must be a number, the name of a constant or a table, not {_shown(value)}"
        )
    assert isinstance(value, (int, str))
    if not inner.pointers and inner.name in read.structs:
        raise _Bad(f"value of {ctype} must be a table of its fields, not {_shown(value)}")
    chosen: object = value
    if isinstance(value, str) and not inner.pointers:
        constants = {n: v for enum in read.enums.values() for n, v in enum.constants.items()}
        if value not in constants:
            raise _Bad(
                f"value {_shown(value)} is no constant of an [enum]; declare it, or use a number"
            )
        chosen = constants[value]
    _check_fits(read, "value", chosen, inner)
    return value


def _check_fits(read: Reader, what: str, number: object, ctype: CType) -> None:
    """Refuse a value that its type cannot hold; the type has no alias in it."""
    if ctype.pointers:
        if number != 0:
            raise _Bad(f"{what} of a pointer can only be 0, not {_shown(number)}")
        return
    bounds = Registry({}, {}, {}, read.enums, {}, ()).bounds(ctype) or (-(2**53), 2**53)
    if isinstance(number, int) and not bounds[0] <= number <= bounds[1]:
        raise _Bad(
            f"{what} does not fit: {ctype} holds {bounds[0]} to {bounds[1]}, not {_shown(number)}"
        )


def _read_params(read: Reader, items: object) -> tuple[Param, ...]:
    if not isinstance(items, list):
        read.bad(f"must be a list of C declarations, not {_shown(items)}", "params")
        return ()
    params: list[Param] = []
    for index, item in enumerate(items):
        with read.at(f".params[{index}]"):
            entry: dict[str, Any] = {}
            if isinstance(item, dict):
                keys = ("declaration", "value", "out")
                entry = read.table(item, keys, ("declaration",)) or {}
                item = entry.get("declaration")
                if item is None:
                    continue
            name, ctype, length = read.declaration(item)
            if length is not None:
                raise _Bad(f"{item!r} is an array; write it as a pointer")
            if any(name == other.name for other in params):
                raise _Bad(f"parameter {name!r} is there twice; name each once")
            value = None
            if "value" in entry:
                value = _read_value(read, entry["value"], ctype)
            out = read.flag(entry, "out")
            if out and not ctype.pointers:
                raise _Bad(f"out goes with a pointer, not with {ctype}")
            target = CType(ctype.base, False, ctype.pointers[:-1])
            if out and not target.pointers and target.name in {"void", *read.opaque}:
                raise _Bad(f"out goes with a pointer to something of a known size, not {ctype}")
            params.append(Param(item, name, ctype, value, out))
    return tuple(params)


def _read_variant(
    read: Reader, value: object, name: str, library: Library | None, newest: int
) -> Variant | None:
    keys = ("since", "before", "params", "reason", "open", "symbol", "pinned")
    table = read.table(value, keys, ("since", "params", "reason"))
    if table is None:
        return None
    since, before = read.version(table, "since"), read.version(table, "before")
    reason, why_open = read.text(table, "reason"), read.text(table, "open") or None
    if "before" not in table and why_open is None:
        read.bad(
            "missing key; close the range at the next major, or give open ="
            ' "why every release can be trusted to keep it"',
            "before",
        )
    if "before" in table and "open" in table:
        read.bad("a range with an end is not open; drop one of before and open", "open")
    if since is not None and before is not None:
        if since >= before:
            read.bad(
                f"range {format_version(since)} to {format_version(before)} is"
                f" {'empty' if since == before else 'swapped'}; since must be below before"
            )
        limit = next_major(max(since, newest))
        if before > limit:
            read.bad(
                f"{format_version(before)} is past the next major, {format_version(limit)}:"
                " no release beyond it has been seen; close the range there",
                "before",
            )
    pinned = read.version(table, "pinned")
    if pinned is not None and library is not None and library.lookup is None:
        read.bad(f"library {library.name!r} has no lookup function to pin a version with", "pinned")
    params = _read_params(read, table.get("params", []))
    if since is None:
        return None
    symbol = read.name(table, "symbol", name)
    return Variant(since, before, symbol, params, reason, why_open, pinned)


def _check_order(read: Reader, variants: list[tuple[int, Variant]]) -> None:
    for (_, first), (index, second) in zip(variants, variants[1:], strict=False):
        with read.at(f".variant[{index}]"):
            if second.since < first.since:
                read.bad(
                    f"variants are not sorted: {second.label} comes after {first.label};"
                    " put the oldest first"
                )
            elif first.before is None or second.since < first.before:
                read.bad(
                    f"range {second.label} overlaps {first.label}; close the older one earlier"
                )


def _read_functions(
    read: Reader, data: dict[str, Any], libraries: dict[str, Library], newest: int
) -> dict[str, Function]:
    found: dict[str, Function] = {}
    for name, value in read.section(data, "function"):
        keys = ("library", "returns", "summary", "page", "variant", "stands_in_for", "result")
        table = read.table(value, keys, ("library", "returns", "summary", "page", "variant"))
        if table is None:
            continue
        library = _library(read, table, libraries)
        page = read.text(table, "page")
        if page and not page.startswith("https://"):
            read.bad(f"must be a link to NVIDIA's page, not {page!r}", "page")
        returns = CType("int")
        text = read.text(table, "returns")
        if text:
            with read.at(".returns"):
                returns = _plain_type(read, text, "cudaError_t")
                _check_returns(read, returns)
        items = table.get("variant", [])
        if not isinstance(items, list) or ("variant" in table and not items):
            read.bad(f"must be one or more [[function.{name}.variant]]", "variant")
            items = []
        variants = []
        for index, item in enumerate(items):
            with read.at(f".variant[{index}]"):
                variant = _read_variant(read, item, name, libraries.get(library), newest)
                if variant is not None:
                    variants.append((index, variant))
        _check_order(read, variants)
        found[name] = Function(
            name, library, returns, read.text(table, "summary"), page,
            tuple(v for _, v in variants), read.name(table, "stands_in_for") or None,
            read.flag(table, "result"),
        )  # fmt: skip
    for name, function in found.items():
        if function.stands_in_for and function.stands_in_for not in found:
            with read.at(f".function.{name}"):
                read.bad(
                    f"{function.stands_in_for!r} is not a function of this file", "stands_in_for"
                )
    return found


def _check_returns(read: Reader, ctype: CType) -> None:
    """Callers answer a code, or text; what else a function returns they cannot hand on."""
    resolved = resolve(ctype, read.aliases)
    text = resolved.base == "char" and len(resolved.pointers) == 1
    number = resolved.base in INTEGERS or resolved.name in read.enums
    if not text and (resolved.pointers or not number):
        raise _Bad(f"must be an integer, an enum or const char *, not {ctype}")


def _check_names(read: Reader, functions: Mapping[str, Function]) -> None:
    """Symbols are names in generated code too, and parameters must not hide others there."""
    for name, function in functions.items():
        for index, variant in enumerate(function.variants):
            with read.at(f".function.{name}.variant[{index}].symbol"):
                if variant.symbol not in functions:
                    read.claim(variant.symbol, f"a symbol of [function.{name}]")
            for place, param in enumerate(variant.params):
                if param.name in read.taken:
                    with read.at(f".function.{name}.variant[{index}].params[{place}]"):
                        of = read.taken[param.name]
                        raise _Bad(f"{param.name!r} is the name of {of} already")


def _read_sha256(read: Reader, data: dict[str, Any]) -> dict[str, str]:
    """Hashes of wheels, by file name."""
    table = data.get("sha256", {})
    if not isinstance(table, dict):
        read.bad(f"must be a table of wheels, not {_shown(table)}", "sha256")
        return {}
    for name, value in table.items():
        with read.at(f'.sha256."{name}"'):
            if not _WHEEL.fullmatch(name):
                read.bad("is not the file name of a wheel")
            elif not isinstance(value, str) or not _SHA256.fullmatch(value):
                read.bad(f"must be 64 hexadecimal digits in small letters, not {_shown(value)}")
    return table


def _read_verified(read: Reader, data: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    releases = data.get("verified", [])
    if not isinstance(releases, list) or not all(
        isinstance(r, str) and _RELEASE.fullmatch(r) for r in releases
    ):
        what = 'a list of releases, such as "12.8.90"'
        read.bad(f"must be {what}, not {_shown(releases)}", "verified")
        return (), 0
    newest = max((1000 * int(r.split(".")[0]) + 10 * int(r.split(".")[1]) for r in releases),
                 default=0)  # fmt: skip
    return tuple(releases), newest


def build(read: Reader, data: dict[str, Any], digest: str, path: Path) -> Registry:
    """The registry that a parsed file is, as far as it is right; see ``Reader.problems``."""
    sections = ("verified", "sha256", "library", "alias", "enum", "struct", "function")
    read.table(data, sections, ("library", "function"))
    verified, newest = _read_verified(read, data)
    libraries = _read_libraries(read, data)
    tables = data.get("struct", {})
    read.known = set(tables) if isinstance(tables, dict) else set()
    read.taken = {name: f"[struct.{name}]" for name in read.known}
    _read_enums(read, data, libraries)
    _read_aliases(read, data)
    _read_structs(read, data, libraries)
    _check_cycles(read)
    functions = _read_functions(read, data, libraries, newest)
    for library in libraries.values():
        for key in ("version", "lookup"):
            name = getattr(library, key)
            if name and name not in functions:
                with read.at(f".library.{library.name}"):
                    read.bad(f"{name!r} is not a function of this file; declare it", key)
    _check_names(read, functions)
    registry = Registry(
        libraries, functions, read.structs, read.enums, read.aliases, verified,
        _read_sha256(read, data), digest, path,
    )  # fmt: skip
    if not read.problems:
        for name, function in functions.items():
            with read.at(f".function.{name}"):
                try:
                    registry.caller_params(function)
                except ValueError as error:
                    read.bad(str(error))
    return registry
