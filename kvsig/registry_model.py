"""What ``signatures.toml`` says, as frozen dataclasses: functions, variants, types, versions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .registry_types import INTEGERS, SCALARS, CType

PATH = Path(__file__).with_name("signatures.toml")

RUNTIME = "cudart"
"""The library whose versions make the ABIs that emulated runtimes stand for."""

_VERSION = re.compile(r"(0|[1-9][0-9]{0,2})\.(0|[1-9][0-9]?)")


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


def next_major(version: int) -> int:
    """The major after a version: 12080 is followed by 13000."""
    return 1000 * (version // 1000 + 1)


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

        Raises
        ------
        TypeError
            If the version is text, or no integer at all.
        """
        if isinstance(version, bool) or not isinstance(version, int):
            raise TypeError(
                f"version {version!r} is no integer as CUDA counts, such as 12080 for 12.8;"
                ' for text use kvsig.registry.parse_version("12.8")'
            )
        return next((v for v in self.variants if v.covers(version)), None)

    def prototype(self, variant: Variant, name: str | None = None) -> str:
        """C text of a variant's prototype."""
        params = ", ".join(p.type.named(p.name) for p in variant.params) or "void"
        return f"{self.returns.named(name or self.name)}({params})"


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
    since: int = 0
    size: int | None = None
    fields: tuple[Field, ...] = ()
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
    sha256 : mapping
        SHA-256 of the wheels of these releases, in hexadecimal, by file name.
    """

    libraries: dict[str, Library]
    functions: dict[str, Function]
    structs: dict[str, Struct]
    enums: dict[str, Enum]
    aliases: dict[str, Alias]
    verified: tuple[str, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    path: Path = field(default=PATH, compare=False)

    def boundaries(self, library: str | None = None) -> tuple[int, ...]:
        """Every version at which some prototype begins or ends, ascending."""
        ends = {
            end
            for function in self.functions.values()
            if library in (None, function.library)
            for variant in function.variants
            for end in (variant.since, variant.before)
            if end is not None
        }
        return tuple(sorted(ends))

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

    def held(self, struct: str) -> list[str]:
        """Names of the structs that a struct holds by value."""
        types = [self.resolve(item.type) for item in self.structs[struct].fields]
        return [t.name for t in types if not t.pointers and t.name in self.structs]

    def ordered_structs(self, names: Iterable[str] | None = None) -> list[Struct]:
        """Structs, each after those that it holds by value."""
        done: dict[str, Struct] = {}

        def visit(name: str) -> None:
            if name in self.structs and name not in done:
                for inner in self.held(name):
                    visit(inner)
                done[name] = self.structs[name]

        for name in self.structs if names is None else names:
            visit(name)
        return list(done.values())

    def layout(self, ctype: CType) -> tuple[int, int]:
        """Size and alignment of a type in bytes: on 64-bit Linux, C aligns a scalar to its size."""
        ctype = self.resolve(ctype)
        if ctype.pointers:
            return 8, 8
        if ctype.name in self.structs:
            fields = self.structs[ctype.name].fields
            align = max((self.layout(f.type)[1] for f in fields), default=1)
            end = max((at + size for at, size in self.offsets(ctype.name)), default=0)
            return -(-end // align) * align, align
        bits = INTEGERS.get(ctype.base, 64 if ctype.base == "double" else 32)
        return bits // 8, bits // 8

    def offsets(self, struct: str) -> list[tuple[int, int]]:
        """Offset and size in bytes of each field of a struct."""
        found = []
        at = 0
        for item in self.structs[struct].fields:
            size, align = self.layout(item.type)
            at = -(-at // align) * align
            found.append((at, size * (item.length or 1)))
            at += size * (item.length or 1)
        return found

    def bounds(self, ctype: CType) -> tuple[int, int] | None:
        """Least and greatest value of an integer type or an enum; None for any other."""
        ctype = self.resolve(ctype)
        if ctype.pointers:
            return None
        if ctype.name in self.enums:
            return -(2**31), 2**32 - 1
        if ctype.base not in INTEGERS:
            return None
        bits = INTEGERS[ctype.base]
        if ctype.base == "size_t" or ctype.base.startswith("unsigned "):
            return 0, 2**bits - 1
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def caller_params(self, function: Function) -> dict[str, CType]:
        """Parameters that a caller gives: all that some variant has no value for.

        Returns
        -------
        dict
            Type by name: one that holds the values of every variant's.

        Raises
        ------
        ValueError
            If there is no such type.
        """
        types: dict[str, list[CType]] = {}
        given = set()
        for variant in function.variants:
            for param in variant.params:
                types.setdefault(param.name, []).append(param.type)
                if param.value is None:
                    given.add(param.name)
        return {name: self._widest(name, found) for name, found in types.items() if name in given}

    def _widest(self, name: str, types: list[CType]) -> CType:
        first = types[0]
        for other in types[1:]:
            if self._kind(other) != self._kind(first):
                raise ValueError(
                    f"parameter {name!r} is {first} in one variant and {other} in another, and no"
                    " type holds both; give it a value in one of them, or leave one variant out"
                )
        ranges = [self.bounds(t) for t in types]
        known = [r for r in ranges if r is not None]
        if not known:
            # Floats, or alike but for const: a double holds a float, and callers are cast.
            return next((t for t in types if self.resolve(t).base == "double"), first)
        low, high = min(r[0] for r in known), max(r[1] for r in known)
        enough = (t for t, r in zip(types, known, strict=True) if r[0] <= low and high <= r[1])
        # Where int and size_t meet, what either cannot hold is refused at the call.
        return next(enough, CType("long long"))

    def _kind(self, ctype: CType) -> str:
        """What two types have in common of which one can take the place of the other."""
        ctype = self.resolve(ctype)
        if self.bounds(ctype) is not None:
            return "integer"
        base = "int" if ctype.name in self.enums else ctype.name
        if ctype.pointers:
            return f"{base} {'*' * len(ctype.pointers)}"
        return "float" if ctype.base in SCALARS else f"struct {ctype.name}"
