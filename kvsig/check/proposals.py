"""Writes the registry entries that new headers need: ``kvsig check --propose``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kvsig.check import headers, registry_text
from kvsig.check.headers import Header, Prototype, text_of
from kvsig.registry import (
    RUNTIME,
    SCALARS,
    Alias,
    CType,
    Enum,
    Field,
    Function,
    Param,
    Registry,
    Struct,
    Variant,
    format_version,
    next_major,
    read_type,
)

__all__ = ["Proposal", "propose"]

_PAGES = {
    "cudart": "https://docs.nvidia.com/cuda/cuda-runtime-api/",
    "cuda": "https://docs.nvidia.com/cuda/cuda-driver-api/",
}


def _ctype(tokens: Iterable[str]) -> CType:
    return read_type(" ".join(tokens))[0]


def _release(header: Header) -> str | None:
    """The release that the path of the headers names, such as ``13.0.96``."""
    version = format_version(header.versions[RUNTIME])
    found = re.findall(rf"(?<![\d.]){re.escape(version)}\.\d+(?![\d.])", str(header.folder))
    return found[-1] if found else None


def _documentation(header: Header, name: str, library: str) -> tuple[str, str]:
    """Summary and page of a function, from the comment before its declaration."""
    text = (header.folder / header.files[library]).read_text(errors="replace")
    base = _PAGES.get(library, next(iter(_PAGES.values())))
    place = re.search(rf"[\s*]{re.escape(name)}\s*\([^;]*;", text)
    before = text[: place.start()] if place else ""
    briefs = re.findall(r"\\brief\s+(.+)", before[before.rfind("/**") :])
    groups = re.findall(r"\\(?:defgroup|addtogroup)\s+(\w+)", before)
    page = f"group__{groups[-1].replace('_', '__')}.html" if groups else "index.html"
    return (briefs[-1].strip().rstrip(".") if briefs else f"Calls {name}"), base + page


def _same(one: Variant, other: Variant) -> bool:
    """Whether two variants are one, of which at most the range has changed."""
    return one.params is other.params and one.symbol == other.symbol and one.reason == other.reason


@dataclass(frozen=True)
class Proposal:
    """What a registry lacks.

    Parameters
    ----------
    before, after : Registry
        The registry as it is, and as it would be.
    versions : tuple of int
        Versions of the headers.
    notes : tuple of str
        What cannot be written as an entry.
    """

    before: Registry
    after: Registry
    versions: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def edits(self) -> list[str]:
        """Changes to lines that are there already, one sentence each."""
        old, new = self.before, self.after
        lines = [f'In verified, add: "{r}"' for r in new.verified if r not in old.verified]
        lines += [
            f"In [alias], add: {registry_text.alias_text(alias).strip()}"
            for alias in new.aliases.values() if alias.name not in old.aliases
        ]  # fmt: skip
        for function in old.functions.values():
            after = new.functions[function.name].variants
            for variant in function.variants:
                place = f"In [[function.{function.name}.variant]] since {variant.label.split()[0]}"
                kept = next((v for v in after if _same(v, variant)), None)
                if kept is None:
                    lines.append(f"{place}: drop it, the header of this version differs")
                    continue
                if kept.since != variant.since:
                    lines.append(f'{place}: since = "{format_version(kept.since)}"')
                if kept.before != variant.before and kept.before is not None:
                    instead = " in place of open" if variant.before is None else ""
                    lines.append(f'{place}: before = "{format_version(kept.before)}"{instead}')
        return lines

    @cached_property
    def blocks(self) -> list[str]:
        """New entries, as TOML that can be added at the end of the file."""
        old, new = self.before, self.after
        texts = [registry_text.enum_text(e) for e in new.enums.values() if e.name not in old.enums]
        texts += [
            registry_text.struct_text(s) for s in new.structs.values() if s.name not in old.structs
        ]
        for function in new.functions.values():
            if function.name not in old.functions:
                texts.append(registry_text.function_text(function))
                continue
            known = old.functions[function.name].variants
            texts += [
                registry_text.variant_text(function.name, variant)
                for variant in function.variants
                if not any(_same(variant, other) for other in known)
            ]
        return texts

    @property
    def text(self) -> str:
        """The proposal as a person reads it: a TOML file whose comments say what else to do."""
        versions = ", ".join(dict.fromkeys(map(format_version, self.versions)))
        lines = [f"# Registry and CUDA {versions}: "]
        if not self.edits and not self.blocks and not self.notes:
            return lines[0] + "nothing is missing\n"
        edits, entries = len(self.edits), len(self.blocks)
        lines[0] += f"{edits} edit{'s' if edits != 1 else ''}, "
        lines[0] += f"{entries} new entr{'ies' if entries != 1 else 'y'}"
        lines += [f"# {edit}" for edit in self.edits]
        lines += [f"# Left to you: {note}" for note in self.notes]
        if self.blocks:
            lines.append("# Add at the end of the file, or where they belong:")
        return "\n".join(lines) + "\n" + "".join(f"\n{block}" for block in self.blocks)


class _Unwritable(Exception):
    """A declaration that the registry has no form for."""


class _Work:
    """A registry that is brought up to the headers of one release.

    Parameters
    ----------
    original : Registry
        What the user has: types of it are not changed.
    table : Registry
        What has come of it so far.
    """

    def __init__(self, original: Registry, table: Registry, header: Header) -> None:
        self.original, self.header = original, header
        self.functions, self.structs = dict(table.functions), dict(table.structs)
        self.enums, self.aliases = dict(table.enums), dict(table.aliases)
        release = _release(header)
        verified = table.verified
        if release and release not in verified:
            verified = tuple(sorted((*verified, release), key=_numbers))
        self.table = replace(
            table, functions=self.functions, structs=self.structs, enums=self.enums,
            aliases=self.aliases, verified=verified,
        )  # fmt: skip
        self.notes: list[str] = []
        if release is None:
            self.notes.append(
                f"in verified, add the release of {header.folder}, in three numbers, once it is"
                " checked"
            )

    def extend(self, names: Iterable[str]) -> None:
        """Bring everything up to the headers."""
        for name in names:
            found = self.header.function(name)
            if name not in self.functions and found is not None:
                self.write(name, None, found)
        # Ranges that only have to reach further are told apart by one compilation for all.
        kept = dict(self.functions)
        for name in self.differing():
            self.functions[name] = self.stretched(kept[name])
        for name in self.differing():
            self.write(name, kept[name], self.header.function(name))
        self.retype()
        for result in headers.check(self.table, self.header):
            if result.status == "differs":
                version = format_version(result.version)
                self.notes += [
                    f"{result.kind} {result.name} in CUDA {version}: {problem}"
                    for problem in result.problems
                ]

    def version(self, library: str) -> int:
        return self.header.versions[library]

    def differing(self) -> list[str]:
        """Functions of the registry that the headers contradict."""
        found = headers.check(self.table, self.header, self.functions)
        return [r.name for r in found if r.kind == "function" and r.status == "differs"]

    def stretched(self, function: Function) -> Function:
        """The function with the range moved that ends or begins right beside this version."""
        version = self.version(function.library)
        if function.select(version) is not None:
            return function
        variants = list(function.variants)
        for index, variant in enumerate(variants):
            if variant.before == version:
                variants[index] = replace(variant, before=self.end(function, version))
            elif version < variant.since < next_major(version):
                variants[index] = replace(variant, since=version)
            else:
                continue
            break
        return replace(function, variants=tuple(variants))

    def end(self, function: Function, version: int) -> int:
        """Where a range has to end that covers a version."""
        later = [v.since for v in function.variants if v.since > version]
        return min(next_major(version), *later) if later else next_major(version)

    def write(self, name: str, function: Function | None, found: Prototype | None) -> None:
        """Write a variant for this version; the one that covers it now ends here."""
        if function is None:
            assert found is not None
            library = self.header.libraries[found.symbol]
            summary, page = _documentation(self.header, name, library)
            function = Function(name, library, _ctype(found.returns), summary, page, ())
        version = self.version(function.library)
        variants = [
            replace(v, before=version, open=None) if v.covers(version) else v
            for v in function.variants if v.since != version
        ]  # fmt: skip
        try:
            if found is not None:
                self.declare(_ctype(found.returns), function.library)
                variants.append(self.variant(function, found, version))
        except _Unwritable as error:
            self.notes.append(f"{name} in CUDA {format_version(version)}: {error}")
            return
        if variants:
            variants.sort(key=lambda v: v.since)
            self.functions[name] = replace(function, variants=tuple(variants))

    def variant(self, function: Function, found: Prototype, version: int) -> Variant:
        """The variant that a header's prototype makes."""
        params = []
        for index, tokens in enumerate(found.params):
            if "(" in tokens:
                raise _Unwritable(
                    f"parameter {index}, {text_of(tokens)}, is a pointer to a function, which only"
                    " an alias can stand for"
                )
            if tokens[-1] == "]":
                start = tokens.index("[")
                tokens = (*tokens[: start - 1], "*", tokens[start - 1])
            name = found.names[index] or f"argument{index}"
            ctype = _ctype(tokens[:-1] if found.names[index] else tokens)
            self.declare(ctype, function.library)
            param = Param(f"{ctype}{'' if str(ctype).endswith('*') else ' '}{name}", name, ctype)
            known = [p for v in function.variants for p in v.params if p.name == name]
            for other in known:
                if other.type == ctype:
                    param = replace(param, value=other.value, out=other.out)
            if function.variants and not known:
                self.notes.append(
                    f"{function.name} has a new parameter {name}: give it a value to pass where"
                    f' no caller knows it, as {{ declaration = "{param.declaration}", value = 0 }}'
                )
            params.append(param)
        previous = [v for v in function.variants if v.since < version]
        reason = "first release that kvsig knows"
        if previous:
            reason = _reason(previous[-1], params, found.symbol, version)
        return Variant(version, self.end(function, version), found.symbol, tuple(params), reason)

    def declare(self, ctype: CType, library: str) -> None:
        """Declare a type that the registry does not know."""
        known = {*self.structs, *self.enums, *self.aliases}
        if ctype.base in SCALARS or ctype.base == "void" or ctype.name in known:
            if not ctype.pointers and ctype.name in self.structs:
                if self.structs[ctype.name].opaque:
                    raise _Unwritable(f"struct {ctype.name} goes by value, but is opaque")
            return
        word = ctype.base.partition(" ")[0]
        tokens = (
            (word, ctype.name) if word in ("struct", "enum") else (self.header.resolve(ctype.name))
        )
        if tokens[0] == "enum" and len(tokens) == 2:
            constants = self.header.enums.get(tokens[1], ())
            values = self.header.values(constants)
            self.enums[ctype.name] = Enum(
                ctype.name, library, self.version(library),
                dict(zip(constants, values, strict=True)),
            )  # fmt: skip
        elif tokens[0] in ("struct", "union") and len(tokens) == 2:
            self.struct(ctype, tokens[1], library)
        elif "*" in tokens:
            self.aliases[ctype.name] = Alias(ctype.name, CType("void", False, (False,)))
        else:
            scalar = _scalar(tokens)
            if scalar not in SCALARS:
                raise _Unwritable(f"type {ctype.base} is {text_of(tokens)}, which has no form here")
            self.aliases[ctype.name] = Alias(ctype.name, CType(scalar))

    def struct(self, ctype: CType, tag: str, library: str) -> None:
        """Declare a struct with its fields, or as opaque if they have no form here."""
        name, typedef = ctype.name, not ctype.base.startswith("struct ")
        opaque = Struct(name, library, self.version(library), None, (), typedef)
        self.structs[name] = opaque
        body = self.header.structs.get(tag)
        try:
            fields = self.fields(body, "", library) if body else []
        except _Unwritable:
            fields = []
        if fields:
            spelled = name if typedef else f"struct {name}"
            size = self.header.values([f"sizeof({spelled})"])[0]
            # It goes to the end again: after the structs that it holds.
            del self.structs[name]
            self.structs[name] = replace(opaque, size=size, fields=tuple(fields))
            found = headers.check(self.table, self.header, {name})
            if any(r.status == "differs" for r in found if r.kind == "struct"):
                self.structs[name] = opaque
        if not ctype.pointers and self.structs[name].opaque:
            raise _Unwritable(f"struct {name} goes by value, but its fields have no form here")

    def fields(self, body: Sequence[str], path: str, library: str) -> list[Field]:
        """Fields of a struct, those of nested structs flattened; of a union, its first."""
        found: list[Field] = []
        for member in headers.split(body, ";"):
            if "{" in member[:3]:
                start, end = member.index("{"), headers.closing(member, member.index("{"))
                inner, after = member[start + 1 : end], member[end + 1 :]
                if len(after) > 1:
                    raise _Unwritable("an array of nested structs")
                if member[0] == "union":
                    inner = (*headers.split(inner, ";")[0], ";")
                below = f"{path}{after[0]}." if after else path
                found += self.fields(inner, below, library)
                continue
            for declarator in headers.split(member, ","):
                found.append(self.field(member, declarator, path, library))
        names = [f.name for f in found]
        if len(set(names)) < len(names):
            raise _Unwritable("two fields of one name")
        return found

    def field(
        self, member: Sequence[str], declarator: Sequence[str], path: str, library: str
    ) -> Field:
        length = None
        if len(declarator) > 3 and declarator[-1] == "]" and declarator[-3] == "[":
            if not declarator[-2].isdigit():
                raise _Unwritable("an array of computed length")
            length, declarator = int(declarator[-2]), declarator[:-3]
        if {"(", "[", ":", "volatile"} & set(declarator):
            raise _Unwritable("a field that is no plain declaration")
        if len(declarator) == 1:
            # The second of "int x, y": the type stands before the first.
            declarator = (*headers.split(member, ",")[0][:-1], declarator[0])
            if "*" in declarator:
                raise _Unwritable("pointers in one declaration")
        *tokens, name = declarator
        ctype = _ctype(tokens)
        self.declare(ctype, library)
        space = "" if str(ctype).endswith("*") else " "
        text = f"{ctype}{space}{name}" + ("" if length is None else f"[{length}]")
        return Field(text, name, ctype, length, f"{path}{name}")

    def retype(self) -> None:
        """Keep of the types that were proposed from an earlier header what holds here too."""
        mine = {*self.enums, *self.structs} - {*self.original.enums, *self.original.structs}
        for result in headers.check(self.table, self.header, mine):
            if result.status != "differs":
                continue
            if result.kind == "struct":
                struct = self.structs[result.name]
                self.structs[result.name] = replace(struct, size=None, fields=())
            elif result.kind == "enum":
                enum = self.enums[result.name]
                there = set(self.header.enums.get(self.header.tag(enum.name, "enum") or "", ()))
                names = [name for name in enum.constants if name in there]
                values = dict(zip(names, self.header.values(names), strict=True))
                constants = {n: v for n, v in values.items() if enum.constants[n] == v}
                self.enums[result.name] = replace(enum, constants=constants)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def _scalar(tokens: Sequence[str]) -> str:
    """C's many spellings of an integer type, as the registry spells it."""
    words = [word for word in tokens if word != "const"]
    if len(words) > 1 and set(words) & {"long", "short"}:
        words = [word for word in words if word not in ("int", "signed")]
    words.sort(key=lambda word: word != "unsigned")
    return {"unsigned": "unsigned int", "signed": "int"}.get(" ".join(words), " ".join(words))


def _reason(old: Variant, params: Sequence[Param], symbol: str, version: int) -> str:
    """What changed, in words."""
    was = {p.name: p for p in old.params}
    now = {p.name: p for p in params}
    parts = []
    for verb, names in (
        ("dropped", [n for n in was if n not in now]),
        ("added", [n for n in now if n not in was]),
        ("changed the type of", [n for n in now if n in was and now[n].type != was[n].type]),
    ):
        if names:
            parts.append(f"{verb} {', '.join(names)}")
    if [n for n in was if n in now] != [n for n in now if n in was]:
        parts.append("changed the order of the parameters")
    if symbol != old.symbol:
        parts.append(f"takes the symbol {symbol}")
    text = format_version(version)
    if not parts:
        return f"declared in {text} as before; no release in between was looked at"
    return f"{text} {' and '.join(parts)}"


def _earliest(original: Registry, table: Registry, ordered: Sequence[Header]) -> Registry:
    """Let new types begin with the first header that has them, not the first that needs them."""
    structs, enums = dict(table.structs), dict(table.enums)
    for header in reversed(ordered):
        for name, struct in structs.items():
            if name not in original.structs and headers.has_struct(header, struct):
                since = min(struct.since, header.versions[struct.library])
                structs[name] = replace(struct, since=since)
        for name, enum in enums.items():
            if name not in original.enums and header.tag(name, "enum") is not None:
                since = min(enum.since, header.versions[enum.library])
                enums[name] = replace(enum, since=since)
    table = replace(table, structs=structs, enums=enums)
    for header in ordered:
        work = _Work(original, table, header)
        work.retype()
        table = work.table
    return table


def propose(registry: Registry, found: Iterable[Header], names: Sequence[str] = ()) -> Proposal:
    """Write what a registry lacks to agree with headers.

    Parameters
    ----------
    registry : Registry
    found : iterable of Header
        One or more releases; the oldest is looked at first, so that ranges begin where the
        headers show it. Of one header alone, everything new begins with its version.
    names : sequence of str
        Functions to add that the registry does not have.

    Returns
    -------
    Proposal

    Raises
    ------
    kvsig.check.headers.HeaderError
        If no header declares one of the names.
    """
    ordered = sorted(found, key=lambda header: header.versions[RUNTIME])
    notes: list[str] = []
    table = registry
    for header in ordered:
        work = _Work(registry, table, header)
        work.extend(names)
        table = work.table
        notes += work.notes
    table = _earliest(registry, table, ordered)
    lost = [name for name in names if all(header.function(name) is None for header in ordered)]
    if lost:
        where = ", ".join(str(header.folder) for header in ordered)
        raise headers.HeaderError(f"no function {', '.join(lost)} in the headers of {where}")
    versions = tuple(header.versions[RUNTIME] for header in ordered)
    return Proposal(registry, table, versions, tuple(dict.fromkeys(notes)))
