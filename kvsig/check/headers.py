"""Compares the registry with NVIDIA's own headers, by a C compiler and without a GPU.

A folder of headers is preprocessed once and its declarations are read; what the registry says of
that version is then written as C11 assertions, one to a line, and the compiler judges them all
in one run. Types are compared by the compiler (``_Generic``); names and absence, which no
compiler judges, by the declarations.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from struct import unpack, unpack_from

from kvsig.registry import (
    Enum,
    Field,
    Function,
    Registry,
    Struct,
    Variant,
    format_version,
    next_major,
)

__all__ = ["Header", "HeaderError", "NoHeaders", "Prototype", "Result", "check", "read"]

VERSION_MACROS = {"cuda_runtime_api.h": "CUDART_VERSION", "cuda.h": "CUDA_VERSION"}
VALUES = ".kvsig.values"
"""Section of an object file to which values are compiled: nothing of a header is ever run."""
COMMON = "crt/host_defines.h"
"""Header that every release includes and that the runtime's wheels do not carry."""

_TOKEN = re.compile(r'[A-Za-z_]\w*|[0-9][\w.]*|"(?:\\.|[^"\\])*"|\S')
_WORD = re.compile(r"[A-Za-z_0-9]")
_DIAGNOSTIC = re.compile(r"kvsig:(\d+):(?:\d+:)? (?:fatal )?error: (.*)")
_NOISE = frozenset({"extern", "static", "inline", "__inline", "__inline__", "__extension__",
                    "_Noreturn", "__restrict", "restrict"})  # fmt: skip


class HeaderError(ValueError):
    """A folder of headers cannot be read, or there is no C compiler."""


class NoHeaders(HeaderError):
    """What was given is no folder of CUDA headers."""


def compiler() -> list[str]:
    """The C compiler as a command: ``$CC``, or the first of cc, gcc and clang.

    Raises
    ------
    HeaderError
        If there is none.
    """
    chosen = shlex.split(os.environ.get("CC", ""))
    if not chosen:
        found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        chosen = [found] if found else []
    if not chosen or shutil.which(chosen[0]) is None:
        what = f"CC names {chosen[0]!r}, which is not there" if chosen else "no cc, gcc or clang"
        raise HeaderError(f"the header check needs a C compiler: {what}; install one or set CC")
    return chosen


def _run(include: Sequence[Path], source: str, *flags: str) -> subprocess.CompletedProcess[str]:
    folders = [part for folder in include for part in ("-I", str(folder))]
    return subprocess.run(
        [*compiler(), "-std=c11", "-w", "-x", "c", *flags, *folders, "-"],
        input=source, capture_output=True, text=True, check=False,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip


def text_of(tokens: Iterable[str]) -> str:
    """C text of tokens, spaced as the registry writes it: ``const void *const *srcs``."""
    out = ""
    for token in tokens:
        glued = not out or out[-1] in "*([" or token in (",", ")", "[", "]")
        glued = glued or (token == "(" and out[-1] == ")")
        out += token if glued else f" {token}"
    return out


@dataclass(frozen=True, slots=True)
class Prototype:
    """A function as a header declares it.

    Parameters
    ----------
    symbol : str
        Exported name, after the header's macros.
    returns : tuple of str
        Tokens of the return type.
    params : tuple of tuple of str
        Tokens of each parameter.
    """

    symbol: str
    returns: tuple[str, ...]
    params: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names; empty where the header gives none."""
        last = [p[p.index("[") - 1] if "[" in p else p[-1] for p in self.params if p]
        return tuple(
            name if len(p) > 1 and _WORD.match(name) else ""
            for p, name in zip(self.params, last, strict=True)
        )

    def text(self, name: str) -> str:
        """C text of the prototype under a name."""
        returns = text_of(self.returns)
        space = "" if returns.endswith("*") else " "
        return f"{returns}{space}{name}({', '.join(map(text_of, self.params)) or 'void'})"


@dataclass(frozen=True)
class Header:
    """The declarations of one release.

    Parameters
    ----------
    folder : Path
        Folder that holds ``cuda_runtime_api.h``.
    include : tuple of Path
        Folders that the compiler searches.
    files : dict
        Header file of each library that is there.
    versions : dict
        Version of each library that is there, as CUDA counts.
    symbols : dict
        Function names that a macro maps, and the exported names.
    functions : dict
        Prototypes by exported name.
    libraries : dict
        Library of each exported name.
    typedefs, structs, enums : dict
        Tokens of each type, struct or union body, and the constants of each enumeration, by name.
    """

    folder: Path
    include: tuple[Path, ...]
    files: dict[str, str]
    versions: dict[str, int]
    symbols: dict[str, str] = field(default_factory=dict)
    functions: dict[str, Prototype] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    typedefs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    structs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    enums: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def function(self, name: str) -> Prototype | None:
        """The prototype that a program gets which writes ``name``."""
        return self.functions.get(self.symbols.get(name, name))

    def resolve(self, name: str) -> tuple[str, ...]:
        """Tokens of the type behind a typedef, followed to its end."""
        tokens: tuple[str, ...] = (name,)
        while len(tokens) == 1 and tokens[0] in self.typedefs:
            tokens = self.typedefs[tokens[0]]
        return tokens

    def tag(self, name: str, word: str) -> str | None:
        """Tag of a struct or enum that is named by its tag or by a typedef; None if absent."""
        known = self.structs if word == "struct" else self.enums
        if name in known:
            return name
        tokens = self.resolve(name)
        return tokens[1] if len(tokens) == 2 and tokens[1] in known else None

    @property
    def source(self) -> str:
        """C text that includes the headers."""
        lines = [f'#include "{file}"\n' for file in self.files.values()]
        return "#include <stddef.h>\n" + "".join(lines)

    def failures(self, lines: Sequence[str]) -> dict[int, str]:
        """Compile lines of C after the headers; the compiler's first complaint of each bad line.

        A compiler may stop after some errors, so that the rest is tried without the bad lines.
        """
        bad: dict[int, str] = {}
        while True:
            body = "".join(
                f'#line {index} "kvsig"\n{line}\n' for index, line in enumerate(lines)
                if index not in bad
            )  # fmt: skip
            done = _run(self.include, self.source + body, "-fsyntax-only")
            if done.returncode == 0:
                return bad
            found = {int(line): text for line, text in reversed(_DIAGNOSTIC.findall(done.stderr))}
            if not found:
                raise HeaderError(f"{self.folder}: {_first_error(done.stderr)}")
            bad.update(found)

    def values(self, expressions: Sequence[str]) -> list[int]:
        """What integer expressions are in these headers."""
        if not expressions:
            return []
        with tempfile.TemporaryDirectory(prefix="kvsig-") as folder:
            compiled = Path(folder) / "values.o"
            listed = ", ".join(f"(long long)({e})" for e in expressions)
            mark = f'__attribute__((used, section("{VALUES}")))'
            source = f"{self.source}{mark} const long long kvsig_values[] = {{{listed}}};\n"
            done = _run(self.include, source, "-c", "-o", str(compiled))
            if done.returncode:
                raise HeaderError(f"{self.folder}: {_first_error(done.stderr)}")
            data = section(compiled.read_bytes(), VALUES)
        return list(unpack(f"={len(expressions)}q", data))


def section(data: bytes, name: str) -> bytes:
    """Bytes of a section of a 64-bit object file in the machine's own byte order.

    Raises
    ------
    HeaderError
        If the file has no such section.
    """
    if data[:5] != b"\x7fELF\x02":
        raise HeaderError("the C compiler does not write 64-bit ELF files, which values come from")
    (table,) = unpack_from("=Q", data, 0x28)
    size, count, names = unpack_from("=HHH", data, 0x3A)
    rows = [unpack_from("=IIQQQQ", data, table + i * size) for i in range(count)]
    strings = rows[names][4]
    for label, _, _, _, offset, length in rows:
        start = strings + label
        if data[start : data.index(b"\0", start)] == name.encode():
            return data[offset : offset + length]
    raise HeaderError(f"the C compiler wrote no section {name}, from which values are read")


def _first_error(stderr: str) -> str:
    return next((line for line in stderr.splitlines() if "error" in line), stderr.strip())


def _external(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Split a translation unit into external declarations, without attributes."""
    current: list[str] = []
    depth = skip = 0
    body = False
    for token in tokens:
        if skip or token in ("__attribute__", "__asm__"):
            # The parenthesised arguments of an attribute go with it.
            skip += {"(": 1, ")": -1}.get(token, 0) if skip else 1
            skip -= 1 if skip == 1 and token == ")" else 0
            continue
        if token in _NOISE:
            continue
        if token in "({[":
            if token == "{" and depth == 0:
                body = bool(current) and current[-1] == ")"
            depth += 1
        elif token in ")}]":
            depth -= 1
            if depth == 0 and token == "}" and body:
                current, body = [], False
                continue
        if token == ";" and depth == 0:
            if current:
                yield current
            current = []
        else:
            current.append(token)


def split(tokens: Sequence[str], mark: str) -> list[tuple[str, ...]]:
    """Split tokens at a mark that stands outside all brackets."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in "({[") - (token in ")}]")
        if token == mark and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return [tuple(part) for part in parts if part]


def closing(tokens: Sequence[str], start: int) -> int:
    """Index of the bracket that closes the one at ``start``."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += (tokens[index] in "({[") - (tokens[index] in ")}]")
        if depth == 0:
            return index
    return len(tokens) - 1


def _take(header: Header, tokens: list[str], library: str) -> None:
    """File one external declaration."""
    typedef = tokens[0] == "typedef"
    if typedef:
        tokens = tokens[1:]
    if tokens and tokens[0] in ("struct", "union", "enum") and "{" in tokens[:3]:
        start = tokens.index("{")
        end = closing(tokens, start)
        after = tokens[end + 1 :]
        tag = tokens[1] if start == 2 else (after[-1] if after else "")
        body = tuple(tokens[start + 1 : end])
        if tokens[0] == "enum":
            header.enums[tag] = tuple(part[0] for part in split(body, ","))
        else:
            header.structs[tag] = body
        if typedef:
            for name in split(after, ","):
                header.typedefs[name[-1]] = (tokens[0], tag, *name[:-1])
    elif typedef and "(" in tokens:
        # A pointer to a function: what matters is its name and that it is a pointer.
        inner = tokens[tokens.index("(") + 1 : closing(tokens, tokens.index("("))]
        if inner and "*" in inner:
            header.typedefs[inner[-1]] = ("void", "*")
    elif typedef:
        header.typedefs[tokens[-1]] = tuple(tokens[:-1])
    elif "(" in tokens and tokens.index("(") > 1:
        start = tokens.index("(")
        params = split(tokens[start + 1 : closing(tokens, start)], ",")
        symbol = tokens[start - 1]
        header.functions[symbol] = Prototype(
            symbol, tuple(tokens[: start - 1]), () if params == [("void",)] else tuple(params)
        )
        header.libraries[symbol] = library


def locate(path: Path | str) -> Path:
    """The folder of ``cuda_runtime_api.h``: a header's own, a folder, or its ``include``.

    Raises
    ------
    NoHeaders
        If there is no such header.
    """
    given = Path(path)
    folder = given.parent if given.is_file() else given
    for candidate in (folder, folder / "include"):
        if (candidate / "cuda_runtime_api.h").is_file():
            return candidate
    there = "has no cuda_runtime_api.h" if folder.is_dir() else "is not there"
    raise NoHeaders(
        f"{given} {there}; give a folder of CUDA headers, such as /usr/local/cuda/include"
    )


@functools.lru_cache(maxsize=32)
def _read(folder: Path, include: tuple[Path, ...], files: tuple[tuple[str, str], ...]) -> Header:
    here = {name: file for name, file in files if (folder / file).is_file()}
    header = Header(folder, include, here, {})
    if not any((path / COMMON).is_file() for path in include):
        raise HeaderError(
            f"{folder} has no {COMMON}, which its headers include; it comes with a CUDA toolkit"
            " and with the wheel nvidia-cuda-crt"
        )
    macros = _run(include, header.source, "-E", "-dM")
    if macros.returncode:
        raise HeaderError(f"{folder}: {_first_error(macros.stderr)}")
    names = re.findall(r"^#define (cu[A-Za-z]\w*) ", macros.stdout, re.MULTILINE)
    lines = [f'#include "{file}"\n@kvsig library {name}\n' for name, file in here.items()]
    lines += [f'@kvsig version "{n}" {VERSION_MACROS.get(f, "")}\n' for n, f in here.items()]
    lines += [f'@kvsig symbol "{name}" {name}\n' for name in names]
    done = _run(include, "".join(lines), "-E")
    if done.returncode:
        raise HeaderError(f"{folder}: {_first_error(done.stderr)}")
    pending: list[str] = []
    for line in done.stdout.splitlines():
        if not line.startswith("@kvsig "):
            if not line.startswith("#"):
                pending.append(line)
            continue
        word, _, rest = line.removeprefix("@kvsig ").partition(" ")
        if word == "library":
            for tokens in _external(_TOKEN.findall("\n".join(pending))):
                _take(header, tokens, rest)
            pending = []
        else:
            quoted, _, value = rest.partition(" ")
            if word == "symbol":
                header.symbols[quoted.strip('"')] = value.strip()
            elif value.strip().isdigit():
                header.versions[quoted.strip('"')] = int(value)
    for name, file in here.items():
        if name not in header.versions:
            if file in VERSION_MACROS:
                raise HeaderError(f"{folder / file} does not define {VERSION_MACROS[file]}")
            header.versions[name] = next(iter(header.versions.values()))
    return header


def read(
    path: Path | str, registry: Registry, extra: Iterable[Path] = (), *, fresh: bool = False
) -> Header:
    """Read the headers of one release.

    Parameters
    ----------
    path : path-like
        A folder with ``cuda_runtime_api.h``, one with such an ``include``, or a header in it.
    registry : Registry
        Says which header belongs to which library.
    extra : iterable of Path
        Folders to search after it, such as one that holds ``crt/host_defines.h``.
    fresh : bool
        Read again what was read before.

    Raises
    ------
    HeaderError
        If the folder has no such header, or the compiler refuses it.
    """
    folder = locate(path).absolute()
    files = tuple((library.name, library.header) for library in registry.libraries.values())
    if fresh:
        _read.cache_clear()
    return _read(folder, (folder, *(Path(e).absolute() for e in extra)), files)


@dataclass(frozen=True, slots=True)
class Result:
    """What the check of one entry against one release found.

    Parameters
    ----------
    kind : str
        ``function``, ``struct``, ``enum`` or ``alias``.
    name, library : str
        The entry.
    version : int
        Version of the header.
    status : str
        ``agrees``, ``differs``, ``absent`` (as the registry says), ``pinned`` (another version's
        prototype is asked of the library, whatever this header says) or ``unchecked`` (the header
        of the library is not in the folder).
    since : int or None
        Where the variant's range begins.
    registry, header : str
        Both declarations.
    problems : tuple of str
        What differs.
    """

    kind: str
    name: str
    library: str
    version: int
    status: str
    since: int | None = None
    registry: str = ""
    header: str = ""
    problems: tuple[str, ...] = ()


@dataclass
class _Entry:
    """One entry on its way to a result."""

    kind: str
    name: str
    library: str
    version: int
    since: int | None = None
    registry: str = ""
    header: str = ""
    present: bool = True
    status: str | None = None
    problems: list[str] = field(default_factory=list)

    def result(self) -> Result:
        status = "differs" if self.problems else self.status
        return Result(
            self.kind, self.name, self.library, self.version,
            status or ("agrees" if self.present else "absent"),
            self.since, self.registry, self.header, tuple(self.problems),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Line:
    """One assertion: its C text, what to say if it fails, and what if it cannot be compiled."""

    entry: _Entry
    code: str
    problem: str
    value: str = ""
    missing: str = ""


def _function(header: Header, function: Function, entry: _Entry) -> Iterator[_Line]:
    found = header.function(function.name)
    variant = function.select(entry.version)
    if found is not None:
        entry.header = found.text(function.name)
    if variant is None:
        entry.present = False
        if found is not None:
            entry.problems.append(
                f"the registry has no variant for {format_version(entry.version)},"
                " but the header declares the function"
            )
        return
    entry.since, entry.registry = variant.since, function.prototype(variant)
    if variant.pinned is not None and not (
        variant.pinned <= entry.version < next_major(variant.pinned)
    ):
        entry.status = "pinned"
        return
    if found is None:
        entry.problems.append("the header does not declare the function")
        return
    entry.problems += _names(function, variant, found)
    yield _Line(
        entry,
        f"_Static_assert(_Generic(&{function.name},"
        f' {function.prototype(variant, "(*)")}: 1, default: 0), "kvsig");',
        "the types of the two prototypes differ",
    )


def _names(function: Function, variant: Variant, found: Prototype) -> Iterator[str]:
    """Differences that no compiler sees."""
    if found.symbol != variant.symbol:
        yield (
            f"the registry takes the symbol {variant.symbol}, but the header maps"
            f" {function.name} to {found.symbol}"
        )
    ours = tuple(p.name for p in variant.params)
    if len(ours) != len(found.names):
        yield f"the registry has {len(ours)} parameters, the header {len(found.names)}"
        return
    for index, (our, their) in enumerate(zip(ours, found.names, strict=True)):
        if their and our != their:
            yield f"parameter {index} is named {our} in the registry, {their} in the header"


def _field_type(item: Field, ours: bool, registry: Registry) -> str:
    ctype = str(item.type)
    if ours and not item.type.pointers and item.type.name in registry.structs:
        ctype = f"struct kvsig_{item.type.name}"
    return ctype


def _layout(struct: Struct, registry: Registry) -> str:
    """The registry's own declaration of a struct, to take its offsets from."""
    fields = "".join(
        f" {_field_type(f, True, registry)} {f.name}{'' if f.length is None else f'[{f.length}]'};"
        for f in struct.fields
    )
    return f"struct kvsig_{struct.name} {{{fields} }};"


def has_struct(header: Header, struct: Struct) -> bool:
    """Whether a header defines a struct under the name by which the registry knows it."""
    tag = header.tag(struct.name, "struct")
    return tag is not None and (struct.name in header.typedefs or not struct.typedef)


def _struct(header: Header, struct: Struct, entry: _Entry, registry: Registry) -> Iterator[_Line]:
    if _boundary(entry, struct.since, has_struct(header, struct), "struct") or struct.opaque:
        return
    spelled = struct.name if struct.typedef else f"struct {struct.name}"
    entry.registry = f"{spelled}: {struct.size} bytes"
    yield _Line(
        entry,
        f"_Static_assert(sizeof({spelled}) {'<=' if struct.grows else '=='} {struct.size},"
        ' "kvsig");',
        f"the registry says {struct.size} bytes, the header {{}}",
        f"sizeof({spelled})",
    )
    yield _Line(
        entry,
        f'_Static_assert(sizeof(struct kvsig_{struct.name}) == {struct.size}, "kvsig");',
        f"the registry's fields do not make {struct.size} bytes",
    )
    # The last field of a struct that grows is room for what other releases append.
    for item in struct.fields[: -1 if struct.grows else None]:
        place = f"offsetof({spelled}, {item.member})"
        own = f"struct kvsig_{struct.name}"
        missing = f"field {item.name}: the header has no {item.member}"
        yield _Line(
            entry,
            f'_Static_assert({place} == offsetof({own}, {item.name}), "kvsig");',
            f"field {item.name} is at another offset in the header, which has {item.member}"
            " at byte {}",
            place,
            missing,
        )
        member = f"((({spelled} *)0)->{item.member})"
        pointer = "" if item.length is None else " *"
        yield _Line(
            entry,
            f"_Static_assert(sizeof{member} == sizeof((({own} *)0)->{item.name})"
            f' && _Generic({member}, {item.type}{pointer}: 1, default: 0), "kvsig");',
            f"field {item.name}: {item.declaration!r} is not the type that the header gives"
            f" {item.member}",
            missing=missing,
        )


def _enum(header: Header, enum: Enum, entry: _Entry) -> Iterator[_Line]:
    tag = header.tag(enum.name, "enum")
    entry.registry = f"enum {enum.name}: {len(enum.constants)} constants"
    if _boundary(entry, enum.since, tag is not None, "enum"):
        return
    for name, value in enum.constants.items():
        if name not in header.enums[tag or ""]:
            entry.problems.append(f"the header's enum has no constant {name}")
            continue
        yield _Line(
            entry,
            f'_Static_assert({name} == {value}, "kvsig");',
            f"{name} is {value} in the registry, {{}} in the header",
            name,
        )


def _boundary(entry: _Entry, since: int, present: bool, word: str) -> bool:
    """Judge whether a type is there as the registry says; True if there is no more to check."""
    entry.since = since
    if entry.version < since:
        entry.present = False
        if present:
            entry.problems.append(
                f"the registry says that the {word} begins with {format_version(since)},"
                f" but the header of {format_version(entry.version)} has it"
            )
        return True
    if not present:
        entry.problems.append(f"the header has no such {word}")
    return not present


def _alias(header: Header, name: str, entry: _Entry, registry: Registry) -> Iterator[_Line]:
    if name not in header.typedefs:
        entry.present = False
        return
    ctype = registry.resolve(registry.aliases[name].type)
    entry.registry, entry.header = str(ctype), text_of(header.typedefs[name])
    # Pointers are all alike to the ABI; numbers must be the same type, sign included.
    test = f"sizeof({name}) == sizeof({ctype})"
    if not ctype.pointers:
        test += f" && _Generic(({name})0, {ctype}: 1, default: 0)"
    yield _Line(
        entry, f'_Static_assert({test}, "kvsig");',
        f"the registry says {ctype}, the header {entry.header}",
    )  # fmt: skip


def _alias_library(registry: Registry, name: str) -> str:
    """Library whose functions use an alias."""
    for function in registry.functions.values():
        types = [function.returns, *(p.type for v in function.variants for p in v.params)]
        if any(t.base == name for t in types):
            return function.library
    return next(iter(registry.libraries))


def check(registry: Registry, header: Header, only: Collection[str] | None = None) -> list[Result]:
    """Compare everything that the registry says with the headers of one release.

    Parameters
    ----------
    registry : Registry
    header : Header
        From `read`.
    only : collection of str, optional
        Names of the entries to compare, in place of all.

    Returns
    -------
    list of Result
        One for each function, struct, enum and alias, in the order of the registry.
    """
    entries: list[_Entry] = []
    lines: list[_Line] = []
    kinds: list[tuple[str, Mapping[str, object]]] = [
        ("function", registry.functions), ("struct", registry.structs),
        ("enum", registry.enums), ("alias", registry.aliases),
    ]  # fmt: skip
    for kind, table in kinds:
        for name, item in table.items():
            if only is not None and name not in only:
                continue
            library = getattr(item, "library", "") or _alias_library(registry, name)
            entry = _Entry(kind, name, library, header.versions.get(library, 0))
            entries.append(entry)
            if library not in header.versions:
                entry.status = "unchecked"
            elif isinstance(item, Function):
                lines += _function(header, item, entry)
            elif isinstance(item, Struct):
                lines += _struct(header, item, entry, registry)
            elif isinstance(item, Enum):
                lines += _enum(header, item, entry)
            else:
                lines += _alias(header, name, entry, registry)
    wanted = [e.name for e in entries if e.kind == "struct" and e.present and not e.status]
    layouts = [
        _layout(s, registry) for s in registry.ordered_structs(wanted)
        if not s.opaque and s.since <= header.versions.get(s.library, 0)
    ]  # fmt: skip
    failures = header.failures([*layouts, *(line.code for line in lines)])
    failed = [(line, failures[i]) for i, line in enumerate(lines, len(layouts)) if i in failures]
    # A value can be printed where only the assertion failed, not where a name is unknown.
    known = [line.value for line, why in failed if line.value and "assert" in why]
    values = dict(zip(known, header.values(known), strict=True))
    for line, why in failed:
        text = line.problem.format(values.get(line.value, ""))
        line.entry.problems.append(text if "assert" in why else line.missing or text)
    for entry in entries:
        entry.problems[:] = dict.fromkeys(entry.problems)
    return [entry.result() for entry in entries]
