"""C's types and names, as ``signatures.toml`` may use them."""

from __future__ import annotations

import builtins
import keyword
import re
import reprlib
from dataclasses import dataclass

INTEGERS = {
    "char": 8, "signed char": 8, "unsigned char": 8, "short": 16, "unsigned short": 16,
    "int": 32, "unsigned int": 32, "long": 64, "unsigned long": 64, "long long": 64,
    "unsigned long long": 64, "size_t": 64,
}  # fmt: skip
"""Bits of C's integer types on Linux, 64-bit."""
SCALARS = frozenset(INTEGERS) | {"float", "double"}

_TYPE_WORDS = {word for scalar in SCALARS for word in scalar.split()} | {"void"}
_KEYWORDS = _TYPE_WORDS | {
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
NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_TYPE = re.compile(
    r"\s*(?P<const>const\b\s*)?+"
    rf"(?P<base>(?:struct|enum)\s+{NAME}|(?:(?:{'|'.join(sorted(_TYPE_WORDS))})\b\s*)+|{NAME})?"
    r"(?P<late>\s*const\b)?"
    r"(?P<pointers>(?:\s*\*(?:\s*const\b)?)*)\s*"
)


class _Short(reprlib.Repr):
    """Values as errors show them: of any depth and length, in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 200
        self.maxlist = self.maxdict = 20

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        return repr(x) if bits <= 128 else f"an integer of {bits} bits"


shown = _Short().repr


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
        return self.base.removeprefix("struct ").removeprefix("enum ")

    def named(self, name: str) -> str:
        """C text that declares a name with this type."""
        text = str(self)
        return f"{text}{'' if text.endswith('*') else ' '}{name}"

    def __str__(self) -> str:
        stars = "".join("*const " if const else "*" for const in self.pointers).rstrip()
        return f"{'const ' if self.const else ''}{self.base}{' ' if stars else ''}{stars}"


def read_type(text: str) -> tuple[CType, str]:
    """Read a type from the front of a text; return it, and the rest of the text.

    Without a type in front, the base is empty. A ValueError refuses what no C declaration has:
    controls, letters of other scripts.
    """
    if not text.isascii() or not text.isprintable() or len(text) > MAX_TEXT:
        raise ValueError(
            f"{shown(text)} has characters that no C declaration has; write plain ASCII"
        )
    match = _TYPE.match(text)
    assert match is not None  # every part of it may be missing
    base = " ".join((match["base"] or "").split())
    base = {"unsigned": "unsigned int", "signed": "int"}.get(base, base)
    pointers = tuple("const" in star for star in match["pointers"].split("*")[1:])
    return CType(base, bool(match["const"] or match["late"]), pointers), text[match.end() :]


def is_name(text: str) -> bool:
    """Whether C takes a text for a name."""
    return bool(re.fullmatch(NAME, text)) and text not in _KEYWORDS


def check_name(text: str, where: str = "") -> str:
    """Return a name that generated code can give to something; a ValueError says if it is none."""
    if not is_name(text):
        raise ValueError(f"{shown(text)}{where} is not a C name; use letters, digits and _")
    if len(text) > MAX_NAME:
        raise ValueError(f"{shown(text)} has {len(text)} letters; a name has at most {MAX_NAME}")
    if text.startswith(("_", "kvsig_", "emu_")):
        raise ValueError(
            f"{text!r} begins as names do that compilers and generated code keep for themselves"
        )
    return text
