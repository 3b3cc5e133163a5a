"""The registry of CUDA prototypes: reads and checks ``signatures.toml``.

Standard library only, so that the build, the run time and the tests share one reader.
The format is explained at the top of ``signatures.toml``.
"""

from __future__ import annotations

import functools
import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
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
    "parse_version",
]

PATH = Path(__file__).with_name("signatures.toml")

SCALARS = frozenset(
    {
        "char",
        "signed char",
        "unsigned char",
        "short",
        "unsigned short",
        "int",
        "unsigned int",
        "long",
        "unsigned long",
        "long long",
        "unsigned long long",
        "size_t",
        "float",
        "double",
    }
)
_SCALAR_WORDS = frozenset(word for scalar in SCALARS for word in scalar.split()) | {"void"}
_KEYWORDS = _SCALAR_WORDS | {
    "auto", "break", "case", "const", "continue", "default", "do", "else", "enum", "extern",
    "for", "goto", "if", "inline", "register", "restrict", "return", "sizeof", "static",
    "struct", "switch", "typedef", "union", "volatile", "while",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,2})\.(0|[1-9][0-9]?)")
_RELEASE = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|[0-9]+|\*|\[|\]|\S)")


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


def parse_version(text: str) -> int:
    """Version text to the integer that CUDA uses.

    Parameters
    ----------
    text : str
        Major and minor, such as ``"12.8"``.

    Returns
    -------
    int
        ``1000 * major + 10 * minor``, such as 12080.

    Raises
    ------
    ValueError
        If the text is not ``MAJOR.MINOR``.
    """
    match = _VERSION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f'version {text!r} is not "MAJOR.MINOR", such as "12.8"')
    return 1000 * int(match[1]) + 10 * int(match[2])


def format_version(version: int) -> str:
    """CUDA's integer version as text: 12080 is ``"12.8"``."""
    return f"{version // 1000}.{version % 1000 // 10}"


@dataclass(frozen=True, slots=True)
class CType:
    """A C type: a base, and the constness of each level of pointer.

    Parameters
    ----------
    base : str
        Spelling without qualifiers, such as ``"struct cudaMemLocation"`` or ``"size_t"``.
    const : bool
        Whether the base is const.
    pointers : tuple of bool
        One entry for each ``*``, left to right: whether that pointer is const.
    """

    base: str
    const: bool = False
    pointers: tuple[bool, ...] = ()

    @property
    def name(self) -> str:
        """The base without ``struct`` or ``enum``."""
        return (
            self.base.rpartition(" ")[2]
            if self.base.startswith(("struct ", "enum "))
            else (self.base)
        )

    def __str__(self) -> str:
        stars = "".join("*const " if const else "*" for const in self.pointers).rstrip()
        return f"{'const ' if self.const else ''}{self.base}{' ' if stars else ''}{stars}"


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a variant.

    Parameters
    ----------
    declaration : str
        Exact C declaration, such as ``"const void *const *srcs"``.
    name : str
        NVIDIA's name of it.
    type : CType
        Its type.
    value : int, str, dict or None
        What to pass where no caller gives it; None where the caller must.
    out : bool
        Whether CUDA writes one value through it, which ``kvsig.call`` returns.
    """

    declaration: str
    name: str
    type: CType
    value: int | str | dict[str, int] | None = None
    out: bool = False


@dataclass(frozen=True, slots=True)
class Variant:
    """One prototype of a function, and the versions it holds for.

    Parameters
    ----------
    since, before : int
        Half-open range of versions, as CUDA counts them; ``before`` is None where open.
    symbol : str
        Name that the library exports, which is not always the header's name.
    params : tuple of Param
        Parameters in order.
    reason : str
        Why this variant exists: what changed.
    open : str or None
        For a range without end: the reason why the prototype may be trusted in any release.
    pinned : int or None
        Version at which the address is asked of the library's own lookup function.
    """

    since: int
    before: int | None
    symbol: str
    params: tuple[Param, ...]
    reason: str
    open: str | None = None
    pinned: int | None = None

    def covers(self, version: int) -> bool:
        """Whether the variant holds for a version."""
        return self.since <= version and (self.before is None or version < self.before)

    @property
    def label(self) -> str:
        """The range as a person reads it, such as ``"12.8 to before 13.0"``."""
        if self.before is None:
            return f"{format_version(self.since)} and later"
        return f"{format_version(self.since)} to before {format_version(self.before)}"


@dataclass(frozen=True, slots=True)
class Function:
    """A CUDA entry point and its variants, in ascending order of version.

    ``stands_in_for`` names the function that this one can replace; ``result`` says that an
    error code that it returns is what was asked for, not a failure.
    """

    name: str
    library: str
    returns: CType
    summary: str
    page: str
    variants: tuple[Variant, ...]
    stands_in_for: str | None = None
    result: bool = False

    def select(self, version: int) -> Variant | None:
        """The variant that holds for a version, or None.

        Parameters
        ----------
        version : int
            As CUDA counts: 12080 is 12.8.
        """
        return next((v for v in self.variants if v.covers(version)), None)

    def prototype(self, variant: Variant, name: str | None = None) -> str:
        """C text of a variant's prototype."""
        result = str(self.returns)
        space = "" if result.endswith("*") else " "
        params = ", ".join(p.declaration for p in variant.params) or "void"
        return f"{result}{space}{name or self.name}({params})"

    @property
    def caller_params(self) -> dict[str, CType]:
        """Parameters that a caller gives, by name: all that some variant has no value for."""
        found: dict[str, CType] = {}
        for variant in self.variants:
            for param in variant.params:
                if param.value is None:
                    found.setdefault(param.name, param.type)
        return found


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a struct; ``member`` is its path in NVIDIA's header."""

    declaration: str
    name: str
    type: CType
    length: int | None
    member: str


@dataclass(frozen=True, slots=True)
class Struct:
    """A struct that travels by pointer or by value; without fields it is opaque."""

    name: str
    library: str
    since: int
    size: int | None
    fields: tuple[Field, ...]
    typedef: bool = False
    grows: str | None = None

    @property
    def opaque(self) -> bool:
        """Whether only pointers to it may be declared."""
        return not self.fields


@dataclass(frozen=True, slots=True)
class Enum:
    """Constants of an enumeration that kvsig uses."""

    name: str
    library: str
    since: int
    constants: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Alias:
    """A name for another C type, such as an opaque handle."""

    name: str
    type: CType


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library: its header, and the functions that tell its version and addresses.

    ``sonames`` are the names by which the dynamic loader may know it, the one to try first in
    front. ``optional`` says that kvsig opens it only where it is needed, and that its header
    comes in a package of its own.
    """

    name: str
    header: str
    sonames: tuple[str, ...]
    version: str
    lookup: str | None = None
    optional: bool = False

    @property
    def soname(self) -> str:
        """The name to try first."""
        return self.sonames[0]


@dataclass(frozen=True, slots=True)
class Registry:
    """Everything that ``signatures.toml`` says.

    Attributes
    ----------
    digest : str
        SHA-256 of the file, in hexadecimal: an extension that was built from another file
        refuses to load.
    verified : tuple of str
        Releases whose headers and libraries the registry was checked against.
    """

    libraries: dict[str, Library]
    functions: dict[str, Function]
    structs: dict[str, Struct]
    enums: dict[str, Enum]
    aliases: dict[str, Alias]
    verified: tuple[str, ...]
    digest: str = ""
    path: Path = field(default=PATH, compare=False)

    def boundaries(self, library: str | None = None) -> tuple[int, ...]:
        """Every version at which some prototype begins or ends, ascending."""
        found: set[int] = set()
        for function in self.functions.values():
            if library is None or function.library == library:
                for variant in function.variants:
                    found.add(variant.since)
                    if variant.before is not None:
                        found.add(variant.before)
        return tuple(sorted(found))

    def resolve(self, ctype: CType) -> CType:
        """Replace aliases, down to scalars, enums, structs and void."""
        while ctype.base in self.aliases:
            inner = self.aliases[ctype.base].type
            const, pointers = inner.const or ctype.const, inner.pointers
            if pointers:
                # The name stands for a pointer: const with it is that pointer's.
                const, pointers = inner.const, (*pointers[:-1], pointers[-1] or ctype.const)
            ctype = CType(inner.base, const, pointers + ctype.pointers)
        return ctype


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


class _Bad(Exception):
    """What is wrong with one value; the place is added by the reader."""


def _parse_type(tokens: list[str]) -> tuple[CType, list[str]]:
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


class _Reader:
    """Collects every problem of a file, each with its dotted place."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[str] = []
        self.where: list[str] = []
        self.enums: dict[str, Enum] = {}
        self.structs: dict[str, Struct] = {}
        self.aliases: dict[str, Alias] = {}
        self.known: set[str] = set()
        self.opaque: set[str] = set()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        self.where.append(place)
        try:
            yield
        except _Bad as error:
            self.bad(str(error))
        finally:
            self.where.pop()

    def bad(self, text: str, key: str = "") -> None:
        place = ("".join(self.where) + (f".{key}" if key else "")).lstrip(".")
        self.problems.append(f"{place or 'file'}: {text}")

    def table(
        self, value: object, allowed: Iterable[str], required: Iterable[str] = ()
    ) -> dict[str, Any] | None:
        """Check that a value is a table with the right keys."""
        if not isinstance(value, dict):
            self.bad(f"must be a table, not {value!r}")
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
            self.bad(f"must be a table, not {tables!r}", name)
            return
        for key, value in tables.items():
            with self.at(f".{name}.{key}"):
                if not _c_name(key):
                    self.bad(f"{key!r} is not a C name; use letters, digits and _")
                yield key, value

    def text(self, table: dict[str, Any], key: str, default: str = "") -> str:
        value = table.get(key, default)
        if not isinstance(value, str) or (key in table and not value.strip()):
            self.bad(f"must be text, not {value!r}", key)
            return default
        return value

    def flag(self, table: dict[str, Any], key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            self.bad(f"must be true or false, not {value!r}", key)
            return False
        return value

    def version(self, table: dict[str, Any], key: str) -> int | None:
        if key not in table:
            return None
        try:
            return parse_version(table[key])
        except ValueError as error:
            self.bad(str(error), key)
            return None

    def name(self, table: dict[str, Any], key: str, default: str = "") -> str:
        value = self.text(table, key, default)
        if key in table and value and not _c_name(value):
            self.bad(f"{value!r} is not a C name; use letters, digits and _", key)
        return value

    def ctype(self, ctype: CType) -> None:
        """Complain about a type that is not known."""
        word, _, rest = ctype.base.partition(" ")
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
        if not ctype.pointers and ctype.name in self.opaque:
            raise _Bad(f"struct {ctype.name} is opaque; use a pointer, or declare its fields")

    def declaration(self, text: object) -> tuple[str, CType, int | None]:
        """Read ``TYPE NAME`` or, in a struct, ``TYPE NAME[LENGTH]``."""
        if not isinstance(text, str):
            raise _Bad(f'must be a C declaration, such as "size_t count", not {text!r}')
        ctype, rest = _parse_type(_tokens(text))
        if not ctype.base:
            raise _Bad(f'{text!r} has no type; write it as in the header, such as "size_t count"')
        if not rest and not ctype.pointers and _c_name(ctype.base) and (ctype.base not in SCALARS):
            raise _Bad(f'{text!r} has no type or no name; write both, such as "size_t count"')
        if not rest:
            raise _Bad(f'{text!r} has no name; give the header\'s, such as "size_t count"')
        name, *rest = rest
        if not _c_name(name):
            raise _Bad(f"{name!r} in {text!r} is not a C name; use letters, digits and _")
        length = None
        if len(rest) == 3 and rest[0] == "[" and rest[1].isdigit() and rest[2] == "]":
            length, rest = int(rest[1]), []
        if rest:
            raise _Bad(
                f"{text!r} is no plain declaration after {name!r}; give one type and one name"
            )
        self.ctype(ctype)
        return name, ctype, length


def _c_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and text not in _KEYWORDS


def _read_libraries(read: _Reader, data: dict[str, Any]) -> dict[str, Library]:
    found = {}
    for name, value in read.section(data, "library"):
        keys = ("header", "soname", "version", "lookup", "optional")
        table = read.table(value, keys, keys[:3])
        if table is not None:
            found[name] = Library(
                name,
                read.text(table, "header"),
                _read_sonames(read, table),
                read.name(table, "version"),
                read.name(table, "lookup") or None,
                read.flag(table, "optional"),
            )
    return found


def _read_sonames(read: _Reader, table: dict[str, Any]) -> tuple[str, ...]:
    """``soname``: one name, or a list of them in the order in which they are tried."""
    value = table.get("soname", "")
    if not isinstance(value, list):
        return (read.text(table, "soname"),)
    if not value or not all(isinstance(one, str) and one.strip() for one in value):
        read.bad(f"must be a name or a list of names, not {value!r}", "soname")
        return ("",)
    return tuple(value)


def _library(read: _Reader, table: dict[str, Any], libraries: dict[str, Library]) -> str:
    name = read.text(table, "library")
    if name and name not in libraries:
        read.bad(f"{name!r} is not a library; declare [library.{name}]", "library")
    return name


def _read_enums(read: _Reader, data: dict[str, Any], libraries: dict[str, Library]) -> None:
    for name, value in read.section(data, "enum"):
        read.enums[name] = Enum(name, "", 0, {})
        table = read.table(value, ("library", "since", "constants"), ("library", "constants"))
        if table is None:
            continue
        constants = table.get("constants", {})
        good: dict[str, int] = {}
        if not isinstance(constants, dict):
            read.bad(f"must be a table of numbers, not {constants!r}", "constants")
            constants = {}
        for key, number in constants.items():
            if not _c_name(key):
                read.bad(f"{key!r} is not a C name; use letters, digits and _", f"constants.{key}")
            elif (
                isinstance(number, bool)
                or not isinstance(number, int)
                or not (-(2**31) <= number < 2**32)
            ):
                read.bad(f"must be an integer of 32 bits, not {number!r}", f"constants.{key}")
            else:
                good[key] = number
        since = read.version(table, "since") or 0
        read.enums[name] = Enum(name, _library(read, table, libraries), since, good)


def _read_aliases(read: _Reader, data: dict[str, Any]) -> None:
    for name, value in read.section(data, "alias"):
        if not isinstance(value, str):
            read.bad(f'must be a C type, such as "void *", not {value!r}')
            continue
        ctype, rest = _parse_type(_tokens(value))
        if rest or not ctype.base:
            read.bad(f'{value!r} is no plain C type; use one such as "void *"')
            continue
        # What the body of a loop raises does not reach the place that the generator has set.
        with read.at(""):
            read.ctype(ctype)
            read.aliases[name] = Alias(name, ctype)


def _read_structs(read: _Reader, data: dict[str, Any], libraries: dict[str, Library]) -> None:
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
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            read.bad(f"must be a number of bytes, not {size!r}", "size")
        if "fields" in table and size is None:
            read.bad("missing key; give the size in bytes", "size")
        fields = []
        names: set[str] = set()
        items = table.get("fields", [])
        if not isinstance(items, list):
            read.bad(f"must be a list of C declarations, not {items!r}", "fields")
            items = []
        for index, item in enumerate(items):
            with read.at(f".fields[{index}]"):
                member = None
                if isinstance(item, dict):
                    entry = read.table(item, ("declaration", "member"), ("declaration",)) or {}
                    member = read.text(entry, "member") or None
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


def _check_cycles(read: _Reader) -> None:
    """Complain about structs that hold themselves by value."""
    for name in read.structs:
        inside, todo = set(), [name]
        while todo:
            struct = read.structs.get(todo.pop())
            held = [f.type.name for f in struct.fields if not f.type.pointers] if struct else []
            todo += [other for other in held if other not in inside]
            inside.update(held)
        if name in inside:
            with read.at(f".struct.{name}"):
                read.bad("holds itself; use a pointer", "fields")


def _read_value(read: _Reader, value: object, ctype: CType) -> int | str | dict[str, int]:
    if isinstance(value, bool):
        raise _Bad(f"value must be a number, the name of a constant or a table, not {value!r}")
    inner = ctype
    while not inner.pointers and inner.base in read.aliases:
        inner = read.aliases[inner.base].type
    pointer = bool(inner.pointers)
    if pointer and isinstance(value, (int, str)) and value != 0:
        raise _Bad(f"value of a pointer can only be 0, not {value!r}")
    if not pointer and isinstance(value, (int, str)) and ctype.name in read.structs:
        raise _Bad(f"value of {ctype} must be a table of its fields, not {value!r}")
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        names = {name for enum in read.enums.values() for name in enum.constants}
        if value not in names:
            raise _Bad(f"value {value!r} is no constant of an [enum]; declare it, or use a number")
        return value
    if isinstance(value, dict):
        struct = read.structs.get(ctype.name)
        if struct is None or ctype.pointers:
            raise _Bad(f"value {value!r} is a table, but {ctype} is not a struct")
        known = {f.name for f in struct.fields}
        for key, number in value.items():
            if key not in known:
                raise _Bad(f"value has a field {key!r}; {ctype} has: {', '.join(sorted(known))}")
            if isinstance(number, bool) or not isinstance(number, int):
                raise _Bad(f"value of field {key!r} must be a number, not {number!r}")
        return value
    raise _Bad(f"value must be a number, the name of a constant or a table, not {value!r}")


def _read_params(read: _Reader, items: object) -> tuple[Param, ...]:
    if not isinstance(items, list):
        read.bad(f"must be a list of C declarations, not {items!r}", "params")
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
            resolved = ctype
            if out and not resolved.pointers:
                raise _Bad(f"out goes with a pointer, not with {ctype}")
            params.append(Param(item, name, ctype, value, out))
    return tuple(params)


def _read_variant(
    read: _Reader, value: object, name: str, library: Library | None, newest: int
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
        limit = 1000 * (max(since, newest) // 1000 + 1)
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


def _check_order(read: _Reader, variants: list[tuple[int, Variant]]) -> None:
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
    read: _Reader, data: dict[str, Any], libraries: dict[str, Library], newest: int
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
            returns, rest = _parse_type(_tokens(text))
            if rest or not returns.base:
                read.bad(f'{text!r} is no plain C type; use one such as "cudaError_t"', "returns")
            else:
                with read.at(".returns"):
                    read.ctype(returns)
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


def _read_verified(read: _Reader, data: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    releases = data.get("verified", [])
    if not isinstance(releases, list) or not all(
        isinstance(r, str) and _RELEASE.fullmatch(r) for r in releases
    ):
        read.bad(f'must be a list of releases, such as "12.8.90", not {releases!r}', "verified")
        return (), 0
    newest = max((1000 * int(r.split(".")[0]) + 10 * int(r.split(".")[1]) for r in releases),
                 default=0)  # fmt: skip
    return tuple(releases), newest


def _build(read: _Reader, data: dict[str, Any], digest: str, path: Path) -> Registry:
    sections = ("verified", "library", "alias", "enum", "struct", "function")
    read.table(data, sections, ("library", "function"))
    verified, newest = _read_verified(read, data)
    libraries = _read_libraries(read, data)
    tables = data.get("struct", {})
    read.known = set(tables) if isinstance(tables, dict) else set()
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
    return Registry(
        libraries, functions, read.structs, read.enums, read.aliases, verified, digest, path
    )


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
    try:
        data = tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(source, [f"not TOML: {error}"]) from None
    read = _Reader(source)
    registry = _build(read, data, hashlib.sha256(raw).hexdigest(), path)
    if read.problems:
        raise RegistryError(source, read.problems)
    return registry


def digest(path: Path | str | None = None) -> str:
    """SHA-256 of a registry file, in hexadecimal."""
    return hashlib.sha256(Path(path or PATH).read_bytes()).hexdigest()


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
    stat = file.stat()
    return _load(file, (stat.st_mtime_ns, stat.st_size))
