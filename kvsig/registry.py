"""The registry of CUDA prototypes: reads ``signatures.toml``, and checks every value of it.

What passes here reaches generated Cython and C, so that names, types and numbers are checked for
what they may be there, and free text for being one line that a terminal can show. Every offender
is named with its place. Standard library only, so that the build, the run time and the tests
share one reader; the format is explained at the top of the file that it reads.
"""

from __future__ import annotations

import functools
import hashlib
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .registry_model import (
    PATH,
    RUNTIME,
    Alias,
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
)
from .registry_types import (
    INTEGERS,
    MAX_LENGTH,
    MAX_NAME,
    MAX_POINTERS,
    MAX_TEXT,
    NAME,
    OWN_PREFIXES,
    RESERVED,
    SCALARS,
    CType,
    check_name,
    is_name,
    read_type,
    shown,
)

__all__ = [
    "INTEGERS", "PATH", "RESERVED", "RUNTIME", "SCALARS", "Alias", "CType", "Enum", "Field",
    "Function", "Library", "Param", "Registry", "RegistryError", "Struct", "Variant", "digest",
    "format_version", "load", "next_major", "parse", "parse_version", "read_type",
]  # fmt: skip

MAX_BYTES = 1 << 23
_WHEEL = re.compile(r"[A-Za-z0-9_.]+-[0-9.]+(-[A-Za-z0-9_.]+){3}\.whl")
_RELEASE = re.compile(r"(0|[1-9][0-9]{0,2})\.(0|[1-9][0-9]?)\.[0-9]{1,4}")
_NAME_AND_REST = re.compile(rf"({NAME}|[0-9]+|.)\s*(\[\s*([^\[\]\s]+)\s*\]\s*|.*)")

T = TypeVar("T")
Check = Callable[[Any], Any]


class RegistryError(ValueError):
    """The registry file is wrong.

    The message lists every offender of the file, each with its dotted place.

    Attributes
    ----------
    problems : tuple of str
        One line for each offender.
    """

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.source, self.problems = source, tuple(problems)
        super().__init__(self.source, self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{self.source}: {count} error{'s' if count != 1 else ''}"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


# --- Single values ------------------------------------------------------------------------------
# Each returns a value as the registry keeps it, or says by a ValueError what is wrong with it.


def _not(what: str, value: object) -> ValueError:
    return ValueError(f"must be {what}, not {shown(value)}")


def _text(value: object) -> str:
    """Text of one printable line."""
    if not isinstance(value, str) or not value.strip():
        raise _not("text", value)
    if not value.isprintable() or len(value) > MAX_TEXT:
        raise _not("one line of printable text", value)
    return value


def _matching(pattern: str, what: str, value: object) -> str:
    """Text of a certain form."""
    if not re.fullmatch(pattern, text := _text(value)):
        raise _not(what, value)
    return text


_FILE = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_header = partial(_matching, rf"({_FILE}/)*{_FILE}\.h", 'a header such as "cuda.h"')
_soname = partial(_matching, _FILE, 'a file name such as "libcuda.so.1"')
_member = partial(_matching, rf"{NAME}(\.{NAME})*", 'the path of a field such as "op.ptr"')
_link = partial(_matching, r"https://.*", "a link to NVIDIA's page")


def _sonames(value: object) -> tuple[str, ...]:
    """One name, or a list of them in the order in which they are tried."""
    return tuple(map(_soname, value if isinstance(value, list) and value else [value]))


def _name(value: object) -> str:
    return check_name(_text(value))


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _not("true or false", value)
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(low: int, high: int, what: str, value: Any) -> int:
    if not _is_int(value) or not low <= value <= high:
        raise _not(what, value)
    return int(value)


_size = partial(_integer, 1, 2**31 - 1, "a number of bytes")
_constant = partial(_integer, -(2**31), 2**32 - 1, "an integer of 32 bits")


# --- The file -----------------------------------------------------------------------------------


class _Reader:
    """Fills a registry, and collects every problem of a file, each with its dotted place."""

    def __init__(self, data: dict[str, Any], digest: str, path: Path) -> None:
        self.problems: list[str] = []
        self.where: list[str] = []
        self.registry = Registry({}, {}, {}, {}, {}, (), {}, digest, path)
        self.newest = 0
        # Names that stand for something: first what the file declares, wherever it stands in it.
        self.taken: dict[str, str] = {}
        for kind in ("library", "struct", "enum", "alias", "function"):
            for name in data[kind] if isinstance(data.get(kind), dict) else ():
                self.taken.setdefault(name, f"[{kind}.{name}]")
        structs = data["struct"] if isinstance(data.get("struct"), dict) else {}
        self.opaque = {
            name for name, s in structs.items() if isinstance(s, dict) and "fields" not in s
        }

    def read(self, data: dict[str, Any]) -> Registry:
        """Return the registry as far as the file is right."""
        to = self.registry
        checks: dict[str, Check] = {
            "verified": self.releases,
            "sha256": self.hashes,
            "library": partial(self.entries, "[library.{}]", self.library, to.libraries),
            "alias": partial(self.entries, "[alias.{}]", self.alias, to.aliases),
            "enum": partial(self.entries, "[enum.{}]", self.enum, to.enums),
            "struct": partial(self.entries, "[struct.{}]", self.struct, to.structs),
            "function": partial(self.entries, "[function.{}]", self.function, to.functions),
        }
        with self.at(""):
            table = self.table(data, checks, ("library", "function"))
            to = replace(to, verified=table.get("verified", ()), sha256=table.get("sha256", {}))
        for name in to.structs:
            with self.at(f".struct.{name}.fields"):
                self.check_circle(name)
        for name, function in to.functions.items():
            with self.at(f".function.{name}"):
                self.check_function(function)
        return to

    # Places

    def at(self, place: str) -> _Reader:
        """Add to the place for a ``with`` block; what is found wrong inside is a problem there."""
        self.where.append(place)
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, ValueError) and error.args:  # without, it was said already
            self.bad(str(error))
        self.where.pop()
        return isinstance(error, ValueError)

    def bad(self, text: str, key: str = "") -> None:
        """Note a problem."""
        place = ("".join(self.where) + (f".{key}" if key else "")).lstrip(".")
        # Keys are text of the file as well: in an error they are one line, and not a long one.
        place = "".join(c if c.isprintable() else repr(c)[1:-1] for c in place)
        short = place if len(place) <= MAX_NAME * 2 else place[: MAX_NAME * 2] + "..."
        self.problems.append(f"{short or 'file'}: {text}")

    # Names

    def claim(self, name: str, what: str) -> None:
        """Check a name that generated code gives to something of its own, once."""
        check_name(name)
        if name in RESERVED or name.startswith(OWN_PREFIXES):
            raise ValueError(
                f"{name!r} is a word of Python, Cython, C or the generated code; it cannot be"
                " the name of anything here"
            )
        if self.taken.setdefault(name, what) != what:
            raise ValueError(
                f"{name!r} is the name of {self.taken[name]} already; every name stands once"
            )

    def declares(self, kind: str, name: str) -> bool:
        """Whether the file has ``[kind.name]``."""
        return self.taken.get(name) == f"[{kind}.{name}]"

    def own_library(self, value: object) -> str:
        name = _text(value)
        if not self.declares("library", name):
            raise ValueError(f"{shown(name)} is not a library; declare [library.{name}]")
        return name

    def own_function(self, value: object, advice: str = "; declare it") -> str:
        name = _text(value)
        if not self.declares("function", name):
            raise ValueError(f"{shown(name)} is not a function of this file{advice}")
        return name

    # Tables and lists

    def table(
        self, value: object, checks: Mapping[str, Check], required: Iterable[str] = ()
    ) -> dict[str, Any]:
        """What is right of a table, by key; all that is required must be."""
        if not isinstance(value, dict):
            raise _not("a table", value)
        for key in value:
            if key not in checks:
                self.bad(f"unknown key; use one of: {', '.join(checks)}", key)
        found: dict[str, Any] = {}
        for key, check in checks.items():
            if key in value:
                with self.at(f".{key}"):
                    found[key] = check(value[key])
            elif key in required:
                self.bad("missing key; add it", key)
        if not found.keys() >= set(required):
            raise ValueError  # each was said already; without them there is no entry
        return found

    def entries(
        self,
        owner: str,
        read: Callable[[str, Any], T],
        into: dict[str, T],
        value: object,
        what: str = "a table",
    ) -> dict[str, T]:
        """Read the entries of a table, whose keys are names in generated code."""
        if not isinstance(value, dict):
            raise _not(what, value)
        for name, item in value.items():
            with self.at(f".{name}"):
                self.claim(name, owner.format(name))
                into[name] = read(name, item)
        return into

    def items(self, value: object, read: Callable[[Any, list[T]], T]) -> tuple[T, ...]:
        """Read the items of a list, each of which has to fit those before it."""
        if not isinstance(value, list):
            raise _not("a list of C declarations", value)
        found: list[T] = []
        for index, item in enumerate(value):
            with self.at(f"[{index}]"):
                found.append(read(item, found))
        return tuple(found)

    # Sections

    def releases(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(
            isinstance(release, str) and _RELEASE.fullmatch(release) for release in value
        ):
            raise _not('a list of releases, such as "12.8.90"', value)
        self.newest = max((parse_version(r.rpartition(".")[0]) for r in value), default=0)
        return tuple(value)

    def hashes(self, value: object) -> dict[str, str]:
        """Hashes of wheels, by file name."""
        if not isinstance(value, dict):
            raise _not("a table of wheels", value)
        for name, digest in value.items():
            with self.at(f'."{name}"'):
                if not _WHEEL.fullmatch(name):
                    raise ValueError("is not the file name of a wheel")
                if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
                    raise _not("64 hexadecimal digits in small letters", digest)
        return value

    def library(self, name: str, value: object) -> Library:
        checks: dict[str, Check] = {
            "header": _header, "soname": _sonames, "version": self.own_function,
            "lookup": self.own_function, "optional": _flag,
        }  # fmt: skip
        table = self.table(value, checks, ("header", "soname", "version"))
        return Library(name, sonames=table.pop("soname"), **table)

    def alias(self, name: str, value: object) -> Alias:
        if not isinstance(value, str):
            raise _not('a C type, such as "void *"', value)
        return Alias(name, self.plain_type(value, "void *"))

    def enum(self, name: str, value: object) -> Enum:
        constants = partial(
            self.entries, f"a constant of [enum.{name}]", lambda _, number: _constant(number), {},
            what="a table of numbers",
        )  # fmt: skip
        checks: dict[str, Check] = {
            "library": self.own_library,
            "since": parse_version,
            "constants": constants,
        }
        return Enum(name, **{"since": 0, **self.table(value, checks, ("library", "constants"))})

    def struct(self, name: str, value: Any) -> Struct:
        checks: dict[str, Check] = {
            "library": self.own_library, "since": parse_version, "size": _size,
            "fields": self.fields, "typedef": _flag, "grows": _text,
        }  # fmt: skip
        if isinstance(value, dict) and "fields" in value and "size" not in value:
            self.bad("missing key; give the size in bytes", "size")
        return Struct(name, **self.table(value, checks, ("library",)))

    def fields(self, value: object) -> tuple[Field, ...]:
        if value == []:
            raise ValueError("must have a field; without the key the struct is opaque")
        return self.items(value, self.field)

    def field(self, item: object, before: list[Field]) -> Field:
        entry = self.entry("field", item, before, {"member": _member})
        return Field(**{"member": entry["name"], **entry})

    def function(self, name: str, value: object) -> Function:
        checks: dict[str, Check] = {
            "library": self.own_library, "returns": self.returns, "summary": _text, "page": _link,
            "variant": partial(self.variants, name),
            "stands_in_for": partial(self.own_function, advice=""), "result": _flag,
        }  # fmt: skip
        table = self.table(value, checks, ("library", "returns", "summary", "page", "variant"))
        return Function(name, variants=table.pop("variant"), **table)

    def returns(self, value: object) -> CType:
        """Callers answer a code, or text; what else a function returns they cannot hand on."""
        ctype = self.plain_type(_text(value), "cudaError_t")
        resolved = self.registry.resolve(ctype)
        is_text = resolved.base == "char" and len(resolved.pointers) == 1
        if not is_text and self.registry.bounds(ctype) is None:
            raise ValueError(f"must be an integer, an enum or const char *, not {ctype}")
        return ctype

    def variants(self, function: str, value: object) -> tuple[Variant, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"must be one or more [[function.{function}.variant]]")
        return self.items(value, partial(self.variant, function))

    def variant(self, function: str, value: Any, older: list[Variant]) -> Variant:
        checks: dict[str, Check] = {
            "since": parse_version, "before": parse_version,
            "params": lambda params: self.items(params, self.param),
            "reason": _text, "open": _text, "symbol": _name, "pinned": parse_version,
        }  # fmt: skip
        if isinstance(value, dict) and not value.keys() & {"before", "open"}:
            self.bad(
                "missing key; close the range at the next major, or give open ="
                ' "why every release can be trusted to keep it"',
                "before",
            )
        table = self.table(value, checks, ("since", "params", "reason"))
        variant = Variant(**{"before": None, "symbol": function, **table})
        if "before" in value and "open" in value:
            self.bad("a range with an end is not open; drop one of before and open", "open")
        self.check_range(variant, older)
        return variant

    def check_range(self, variant: Variant, older: list[Variant]) -> None:
        """Refuse a range that is empty, ends too late, or begins in an older variant's."""
        since, before = variant.since, variant.before
        if before is not None and since >= before:
            raise ValueError(
                f"range {format_version(since)} to {format_version(before)} is"
                f" {'empty' if since == before else 'swapped'}; since must be below before"
            )
        limit = next_major(max(since, self.newest))
        if before is not None and before > limit:
            self.bad(
                f"{format_version(before)} is past the next major, {format_version(limit)}:"
                " no release beyond it has been seen; close the range there",
                "before",
            )
        last = older[-1] if older else None
        if last and since < last.since:
            raise ValueError(
                f"variants are not sorted: {variant.label} comes after {last.label};"
                " put the oldest first"
            )
        if last and (last.before is None or since < last.before):
            raise ValueError(
                f"range {variant.label} overlaps {last.label}; close the older one earlier"
            )

    def param(self, item: object, before: list[Param]) -> Param:
        checks: dict[str, Check] = {"value": lambda value: value, "out": _flag}
        entry = self.entry("parameter", item, before, checks)
        if entry.pop("length") is not None:
            raise ValueError(f"{entry['declaration']!r} is an array; write it as a pointer")
        param = Param(**entry)
        ctype = param.type
        if param.value is not None:
            self.check_value(param.value, ctype)
        if param.out and not ctype.pointers:
            raise ValueError(f"out goes with a pointer, not with {ctype}")
        if param.out and len(ctype.pointers) == 1 and ctype.name in {"void", *self.opaque}:
            raise ValueError(f"out goes with a pointer to something of a known size, not {ctype}")
        return param

    # Declarations

    def entry(
        self, kind: str, item: object, before: Iterable[Param | Field], checks: Mapping[str, Check]
    ) -> dict[str, Any]:
        """Parts of a declaration, which stands by itself or in a table with other keys."""
        rest: dict[str, Any] = {}
        if isinstance(item, dict):
            checks = {"declaration": lambda text: text, **checks}
            rest = self.table(item, checks, ("declaration",))
            item = rest.pop("declaration")
        name, ctype, length = self.declaration(item)
        if any(name == other.name for other in before):
            raise ValueError(f"{kind} {name!r} is there twice; name each once")
        return {"declaration": item, "name": name, "type": ctype, "length": length, **rest}

    def declaration(self, text: object) -> tuple[str, CType, int | None]:
        """Read ``TYPE NAME`` or, in a struct, ``TYPE NAME[LENGTH]``."""
        if not isinstance(text, str):
            raise _not('a C declaration, such as "size_t count"', text)
        ctype, rest = read_type(text)
        if not ctype.base:
            raise ValueError(
                f'{text!r} has no type; write it as in the header, such as "size_t count"'
            )
        if not rest and not ctype.pointers and is_name(ctype.base):
            raise ValueError(f'{text!r} has no type or no name; write both, such as "size_t count"')
        match = _NAME_AND_REST.fullmatch(rest)
        if match is None:
            raise ValueError(f'{text!r} has no name; give the header\'s, such as "size_t count"')
        name, rest, count = match.groups()
        check_name(name, f" in {text!r}")
        if rest and count is None:
            raise ValueError(
                f"{text!r} is no plain declaration after {name!r}; give one type and one name"
            )
        if count and (not re.fullmatch(r"[1-9][0-9]{0,5}", count) or int(count) > MAX_LENGTH):
            raise ValueError(
                f"{count!r} in {text!r} is no length of an array; give a number from 1 to"
                f" {MAX_LENGTH}, without a zero in front"
            )
        self.check_type(ctype)
        return name, ctype, int(count) if count else None

    def plain_type(self, text: str, example: str) -> CType:
        ctype, rest = read_type(text)
        if rest or not ctype.base:
            raise ValueError(f'{text!r} is no plain C type; use one such as "{example}"')
        self.check_type(ctype)
        return ctype

    def check_type(self, ctype: CType) -> None:
        """Refuse a type that is not known, or that no value can have."""
        if len(ctype.pointers) > MAX_POINTERS:
            raise ValueError(f"{len(ctype.pointers)} levels of pointers; at most {MAX_POINTERS}")
        if ctype.base == "void" and not ctype.pointers:
            raise ValueError("void is no type for a value; use a pointer")
        word, _, name = ctype.base.rpartition(" ")
        if word in ("struct", "enum"):
            if not self.declares(word, name):
                raise ValueError(f"type {ctype.base!r} is not known; declare [{word}.{name}]")
        # An alias is known from where it stands on, so that none can lead back to itself.
        elif not (
            ctype.base in SCALARS or ctype.base == "void" or ctype.base in self.registry.aliases
            or self.declares("struct", name) or self.declares("enum", name)
        ):  # fmt: skip
            raise ValueError(
                f"type {ctype.base!r} is not known; use a C type, or declare it under"
                " [struct], [enum] or [alias]"
            )
        resolved = self.registry.resolve(ctype)
        if not resolved.pointers and resolved.name in self.opaque:
            raise ValueError(f"struct {ctype.name} is opaque; use a pointer, or declare its fields")

    def check_value(self, value: object, ctype: CType) -> None:
        """Refuse what cannot be passed where no caller gives a value."""
        held = self.registry.resolve(ctype)
        struct = None if held.pointers else self.registry.structs.get(held.name)
        if isinstance(value, dict):
            if struct is None:
                raise ValueError(f"value {shown(value)} is a table, but {ctype} is not a struct")
            for key, number in value.items():
                self.check_field_value(struct, ctype, key, number)
            return
        if not _is_int(value) and not isinstance(value, str):
            raise ValueError(
                f"value must be a number, the name of a constant or a table, not {shown(value)}"
            )
        if struct is not None:
            raise ValueError(f"value of {ctype} must be a table of its fields, not {shown(value)}")
        if isinstance(value, str) and not held.pointers:
            constants = {n: v for e in self.registry.enums.values() for n, v in e.constants.items()}
            if value not in constants:
                raise ValueError(
                    f"value {shown(value)} is no constant of an [enum]; declare it, or use a number"
                )
            value = constants[value]
        self.check_fits("value", value, held)

    def check_field_value(self, struct: Struct, ctype: CType, key: str, value: object) -> None:
        fields = {field.name: field for field in struct.fields}
        if key not in fields:
            raise ValueError(
                f"value has a field {shown(key)}; {ctype} has: {', '.join(sorted(fields))}"
            )
        if not _is_int(value):
            raise ValueError(f"value of field {key!r} must be a number, not {shown(value)}")
        held = self.registry.resolve(fields[key].type)
        nested = not held.pointers and held.name in self.registry.structs
        if fields[key].length is not None or nested:
            raise ValueError(f"field {key!r} is no single number, and can have no value here")
        self.check_fits(f"value of field {key!r}", value, held)

    def check_fits(self, what: str, value: Any, ctype: CType) -> None:
        """Refuse a value that its type cannot hold; the type has no alias in it."""
        if ctype.pointers and value != 0:
            raise ValueError(f"{what} of a pointer can only be 0, not {shown(value)}")
        low, high = self.registry.bounds(ctype) or (-(2**53), 2**53)
        if not low <= value <= high:
            raise ValueError(
                f"{what} does not fit: {ctype} holds {low} to {high}, not {shown(value)}"
            )

    # Across entries

    def check_circle(self, struct: str) -> None:
        """Refuse a struct that holds itself by value."""
        inside: set[str] = set()
        todo = [struct]
        while todo:
            held = set(self.registry.held(todo.pop())) - inside
            inside |= held
            todo += held
        if struct in inside:
            raise ValueError("holds itself; use a pointer")

    def check_function(self, function: Function) -> None:
        """Symbols are names in generated code too, and parameters must not hide others there."""
        library = self.registry.libraries.get(function.library)
        for index, variant in enumerate(function.variants):
            with self.at(f".variant[{index}].symbol"):
                if variant.symbol not in self.registry.functions:
                    self.claim(variant.symbol, f"a symbol of [function.{function.name}]")
            with self.at(f".variant[{index}].pinned"):
                if variant.pinned is not None and library is not None and library.lookup is None:
                    raise ValueError(
                        f"library {library.name!r} has no lookup function to pin a version with"
                    )
            for place, param in enumerate(variant.params):
                with self.at(f".variant[{index}].params[{place}]"):
                    if param.name in self.taken:
                        of = self.taken[param.name]
                        raise ValueError(f"{param.name!r} is the name of {of} already")
        if not self.problems:
            self.registry.caller_params(function)


# --- Reading ------------------------------------------------------------------------------------


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
    try:
        data = tomllib.loads(raw.decode())
        reader = _Reader(data, hashlib.sha256(raw).hexdigest(), path)
        registry = reader.read(data)
    except RecursionError:
        raise RegistryError(source, ["file: tables, arrays or structs nest too deeply"]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistryError(source, [f"not TOML: {error}"]) from None
    except ValueError as error:
        # Python's own bound on the digits of an integer, which tomllib passes on.
        raise RegistryError(source, [f"not TOML: too many digits: {error}"]) from None
    if reader.problems:
        raise RegistryError(source, reader.problems)
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
