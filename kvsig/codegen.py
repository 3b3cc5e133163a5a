"""Generates code from the registry: Cython for the core, C for the emulated runtime.

It knows no CUDA function by name, only what ``signatures.toml`` says. Standard library only.
By hand::

    python kvsig/codegen.py             # print the Cython text
    python kvsig/codegen.py --glue 13.0 # print the C text of the emulated 13.0 runtime
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import types
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from . import registry as reader
else:
    # Run by file path, from setup.py or by hand: importing the package would need the extension
    # that is about to be built, so the modules that need no extension get a package of their own.
    _package = types.ModuleType("kvsig_unbuilt")
    _package.__path__ = [str(Path(__file__).parent)]
    sys.modules[_package.__name__] = _package
    reader = importlib.import_module("kvsig_unbuilt.registry")

if TYPE_CHECKING:
    from .registry import CType, Function, Param, Registry, Variant

__all__ = [
    "GenerationError",
    "cython_text",
    "emulated_glue",
    "emulated_versions",
    "reader",
    "write_if_changed",
]

UNBOUND = -1
"""What a caller answers for a function that has no variant, or whose variant cannot hold an
argument; no CUDA error code is negative."""


class GenerationError(ValueError):
    """A registry holds what is no name, number or type, and must not become source text."""


# --- What reaches the text ----------------------------------------------------------------------
# All that a registry says goes through these: names, numbers, and literals of harmless letters.

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}", re.ASCII)
_LITERAL = re.compile(r"[A-Za-z0-9_.:* ]{0,400}", re.ASCII)


def _name(text: str) -> str:
    if not isinstance(text, str) or not _IDENTIFIER.fullmatch(text):
        raise GenerationError(f"{text!r} is no name, and is not written into source")
    return text


def _number(value: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**64:
        raise GenerationError(f"{value!r} is no number of 64 bits, and is not written into source")
    return str(int(value))


def _literal(text: str) -> str:
    """A string literal, alike in C and Cython: of letters that neither gives a meaning to."""
    if not isinstance(text, str) or not _LITERAL.fullmatch(text):
        raise GenerationError(f"{text!r} is no plain text, and is not written into source")
    return f'"{text}"'


def _global(text: str) -> str:
    """A name for something at the top of the text."""
    if text in reader.RESERVED:
        raise GenerationError(f"{text!r} is a word of its own in generated source")
    return _name(text)


def _local(text: str) -> str:
    """A name for a parameter or a field in Cython: ``from`` is one in C."""
    return f"{_name(text)}_" if text.rstrip("_") in reader.RESERVED else _name(text)


def _type(registry: Registry, ctype: CType, prefix: str = "") -> str:
    """Spell a type: aliases and enums are resolved, opaque structs are void."""
    ctype = registry.resolve(ctype)
    if ctype.name in registry.structs:
        opaque = registry.structs[ctype.name].opaque
        base = "void" if opaque else prefix + _global(ctype.name)
    elif ctype.name in registry.enums:
        base = "int"
    elif ctype.base in reader.SCALARS or ctype.base == "void":
        base = ctype.base
    else:
        raise GenerationError(f"type {ctype.base!r} is not known")
    stars = "".join("*const " if const else "*" for const in ctype.pointers).strip()
    return f"{'const ' if ctype.const else ''}{base}{' ' if stars else ''}{stars}"


def _c_type(registry: Registry, ctype: CType) -> str:
    return _type(registry, ctype, "struct kvsig_")


def write_if_changed(path: Path, text: str) -> bool:
    """Write a file only if its text differs, so that builds see no change where there is none.

    Returns
    -------
    bool
        Whether the file was written.
    """
    if path.exists() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return True


# --- Cython -----------------------------------------------------------------------------------


def _pointer_type(function: Function, index: int) -> str:
    return f"kvsig_t_{_global(function.name)}_{index}"


def _write_c_structs(registry: Registry) -> Iterator[str]:
    """C text of the structs, with the proof that the registry's figures are the compiler's."""
    for struct in registry.ordered_structs():
        if struct.opaque:
            continue
        name = _global(struct.name)
        yield f"struct kvsig_{name} {{"
        for field in struct.fields:
            length = "" if field.length is None else f"[{_number(field.length)}]"
            yield f"    {_c_type(registry, field.type)} kvsig_{_name(field.name)}{length};"
        yield "};"
        size = f"signatures.toml: size of struct {name} is not what its fields make"
        yield (
            f"_Static_assert(sizeof(struct kvsig_{name}) == {_number(struct.size or 0)},"
            f" {_literal(size)});"
        )
        for field, (at, _) in zip(struct.fields, registry.offsets(struct.name), strict=True):
            place = f"signatures.toml: struct {name}: offset of {field.name}"
            yield (
                f"_Static_assert(offsetof(struct kvsig_{name}, kvsig_{_name(field.name)})"
                f" == {_number(at)}, {_literal(place)});"
            )


def _write_constants(registry: Registry) -> Iterator[str]:
    yield "cdef enum:"
    yield f"    UNBOUND = {UNBOUND}"
    for enum in registry.enums.values():
        for name, value in enum.constants.items():
            yield f"    {_global(name)} = {_number(value)}"
    yield ""


def _write_structs(registry: Registry) -> Iterator[str]:
    """The structs of C under their own names; fields have others there, which no macro has."""
    yield "cdef extern from *:"
    yield '    """'
    yield "    #include <stddef.h>"
    yield from (f"    {line}" for line in _write_c_structs(registry))
    yield '    """'
    for struct in registry.ordered_structs():
        if struct.opaque:
            continue
        yield f'    struct {_global(struct.name)} "kvsig_{struct.name}":'
        for field in struct.fields:
            length = "" if field.length is None else f"[{_number(field.length)}]"
            spelled = _type(registry, field.type)
            yield f'        {spelled} {_local(field.name)} "kvsig_{_name(field.name)}"{length}'
    yield ""


def _write_types(registry: Registry, function: Function) -> Iterator[str]:
    returns = _type(registry, function.returns)
    for index, variant in enumerate(function.variants):
        params = ", ".join(_type(registry, p.type) for p in variant.params)
        yield f"# {_literal(variant.label)[1:-1]}"
        yield f"ctypedef {returns} (*{_pointer_type(function, index)})({params}) noexcept nogil"


def _constant(registry: Registry, param: Param) -> str:
    """The value of a parameter that no caller gives, as Cython text."""
    if isinstance(param.value, dict):
        return f"kvsig_fixed_{_name(param.name)}"
    value = _global(param.value) if isinstance(param.value, str) else _number(param.value or 0)
    return f"<{_type(registry, param.type)}>{value}"


def _argument(registry: Registry, param: Param, given: Collection[str]) -> str:
    if param.name not in given:
        return _constant(registry, param)
    resolved = registry.resolve(param.type)
    if resolved.name in registry.structs and not resolved.pointers:
        return _local(param.name)
    return f"<{_type(registry, param.type)}>{_local(param.name)}"


def _write_guards(
    registry: Registry, variant: Variant, given: dict[str, CType], missing: str
) -> Iterator[str]:
    """Refuse what the bound variant's type cannot hold and another variant's can."""
    for param in variant.params:
        own = registry.bounds(param.type)
        wide = registry.bounds(given[param.name]) if param.name in given else None
        if own is None or wide is None or (own[0] <= wide[0] and wide[1] <= own[1]):
            continue
        name, narrow = _local(param.name), _type(registry, param.type)
        test = f"<{_type(registry, given[param.name])}><{narrow}>{name} != {name}"
        if own[0] == 0 and wide[0] < 0:
            test = f"{name} < 0 or {test}"
        yield f"        if {test}:"
        yield f"            return {missing}"


def _write_caller(registry: Registry, function: Function, slot: int) -> Iterator[str]:
    given = registry.caller_params(function)
    params = ", ".join(f"{_type(registry, t)} {_local(n)}" for n, t in given.items())
    returns = _type(registry, function.returns)
    missing = "NULL" if registry.resolve(function.returns).pointers else "UNBOUND"
    yield f"cdef inline {returns} {_global(function.name)}({params}) noexcept nogil:"
    yield f"    cdef int kvsig_variant = slots[{slot}].variant"
    fixed = {p.name: p for v in function.variants for p in v.params
             if isinstance(p.value, dict) and p.name not in given}  # fmt: skip
    for param in fixed.values():
        name = _constant(registry, param)
        yield f"    cdef {_type(registry, param.type)} {name}"
        yield f"    memset(&{name}, 0, sizeof({name}))"
        assert isinstance(param.value, dict)
        for key, number in param.value.items():
            yield f"    {name}.{_local(key)} = {_number(number)}"
    for index, variant in enumerate(function.variants):
        arguments = ", ".join(_argument(registry, p, given) for p in variant.params)
        yield f"    if kvsig_variant == {index}:"
        yield from _write_guards(registry, variant, given, missing)
        pointer = f"(<{_pointer_type(function, index)}>slots[{slot}].address)"
        yield f"        return {pointer}({arguments})"
    yield f"    return {missing}"
    yield ""


def _write_invoker(registry: Registry, function: Function, index: int) -> Iterator[str]:
    """A caller with arguments from a tuple: integers, floats, and bytes for structs."""
    variant = function.variants[index]
    pointer_type = _pointer_type(function, index)
    yield f"cdef object kvsig_invoke_{pointer_type}(void *address, tuple arguments):"
    names = []
    for position, param in enumerate(variant.params):
        ctype = registry.resolve(param.type)
        spelled = _type(registry, param.type)
        item = f"arguments[{position}]"
        names.append(f"p{position}")
        if ctype.pointers:
            yield f"    cdef {spelled} p{position} = <{spelled}><size_t>{item}"
        elif ctype.name in registry.structs:
            yield f"    cdef {spelled} p{position}"
            yield f"    memcpy(&p{position}, <const char *><bytes>{item}, sizeof(p{position}))"
        else:
            yield f"    cdef {spelled} p{position} = {item}"
    yield f"    cdef {_type(registry, function.returns)} result"
    yield "    with nogil:"
    yield f"        result = (<{pointer_type}>address)({', '.join(names)})"
    text = registry.resolve(function.returns).pointers
    yield f"    return {'<bytes>result if result != NULL else None' if text else 'result'}"
    yield ""


def _write_invoke(registry: Registry) -> Iterator[str]:
    yield "cdef object invoke(int slot, tuple arguments):"
    yield "    cdef void *address = slots[slot].address"
    yield "    cdef int which = slots[slot].variant"
    for slot, function in enumerate(registry.functions.values()):
        for index in range(len(function.variants)):
            yield f"    if slot == {slot} and which == {index}:"
            name = f"kvsig_invoke_{_pointer_type(function, index)}"
            yield f"        return {name}(address, arguments)"
    yield '    raise SystemError("no invoker for slot %d, variant %d" % (slot, which))'
    yield ""


def cython_text(registry: Registry) -> str:
    """Cython text of a registry, which the core includes.

    Parameters
    ----------
    registry : Registry

    Returns
    -------
    str
        Constants, structs, one function-pointer type for each variant, one caller for each
        function, which takes arguments by name and passes each variant what it declares, and
        the digest of the registry.
    """
    lines = [
        "# Generated from signatures.toml by codegen.py: edit that file, not this one.",
        "# cython-lint: disable",
        "from libc.string cimport memcpy, memset",
        "",
        f"DIGEST = {_literal(registry.digest)}",
        f"FUNCTIONS = ({' '.join(f'{_literal(_global(name))},' for name in registry.functions)})",
        "",
        "cdef struct Slot:",
        "    void *address",
        "    int variant",
        "",
        f"cdef Slot[{len(registry.functions)}] slots",
        "",
        "cdef enum:",
        *(f"    SLOT_{_global(name)} = {slot}" for slot, name in enumerate(registry.functions)),
        "",
        *_write_constants(registry),
    ]
    lines += _write_structs(registry)
    for slot, function in enumerate(registry.functions.values()):
        lines += _write_types(registry, function)
        lines.append("")
        lines += _write_caller(registry, function, slot)
        for index in range(len(function.variants)):
            lines += _write_invoker(registry, function, index)
    lines += _write_invoke(registry)
    return "\n".join(lines)


# --- C for the emulated runtime ---------------------------------------------------------------


def emulated_versions(registry: Registry) -> tuple[int, ...]:
    """First version of each ABI: every version at which a prototype of libcudart changes."""
    return registry.boundaries(reader.RUNTIME)


def _write_exported(registry: Registry, function: Function, variant: Variant) -> Iterator[str]:
    """A function with its exact prototype; parameters have names that no macro has."""
    params = [f"{_c_type(registry, p.type)} p{i}" for i, p in enumerate(variant.params)]
    returns = _c_type(registry, function.returns)
    yield f"{returns} {_global(variant.symbol)}({', '.join(params) or 'void'})"
    yield "{"
    if params:
        yield "    const struct emu_arg arguments[] = {"
        for i, param in enumerate(variant.params):
            texts = f"{_literal(_name(param.name))}, {_literal(str(param.type))}"
            yield f"        {{{texts}, &p{i}, sizeof(p{i})}},"
        yield "    };"
    texts = ", ".join(map(_literal, (function.name, variant.symbol, variant.label)))
    array = "arguments" if params else "NULL"
    dispatch = "emu_dispatch_pointer" if "*" in returns else "emu_dispatch"
    yield f"    return ({returns}){dispatch}({texts}, {array}, {len(params)});"
    yield "}"
    yield ""


def emulated_glue(registry: Registry, version: int, without: Collection[str] = ()) -> str:
    """C text of the emulated runtime's exported functions at one version.

    Parameters
    ----------
    registry : Registry
    version : int
        As CUDA counts: 13000 is 13.0.
    without : collection of str, optional
        Symbols that the library is not to export.

    Returns
    -------
    str
        Each function with its exact prototype, passing its arguments by name to
        ``emu_dispatch`` of ``csrc/emulated/emulated.h``. A function past its last range is exported
        as a trap that aborts: calling it would be calling an unproven prototype.
    """
    bounds = emulated_versions(registry)
    since = max((b for b in bounds if b <= version), default=version)
    before = min((b for b in bounds if b > version), default=None)
    lines = [
        "/* Generated from signatures.toml by codegen.py: edit that file, not this one. */",
        "#include <limits.h>",
        "#include <stddef.h>",
        '#include "emulated.h"',
        "",
        "#pragma GCC visibility push(default)",
        f"const int emu_abi_since = {since};",
        f"const int emu_abi_before = {'INT_MAX' if before is None else before};",
        "",
        *_write_c_structs(registry),
        "",
    ]
    exported: set[str] = set(without)
    traps: list[str] = []
    for function in registry.functions.values():
        # What is the driver's lies in the same file here, in every form: a driver keeps its old
        # entry points, and its version is set apart from the runtime's.
        forms = function.variants[::-1]
        if function.library == reader.RUNTIME:
            variant = function.select(version)
            forms = () if variant is None else (variant,)
            if variant is not None:
                traps.append(function.name)
            elif version >= function.variants[-1].since:
                traps.append(function.variants[-1].symbol)
        for form in forms:
            if form.symbol not in exported:
                exported.add(form.symbol)
                lines += _write_exported(registry, function, form)
    for symbol in dict.fromkeys(traps):
        if symbol not in exported:
            trap = f"void {_global(symbol)}(void)"
            lines += [f"{trap};", f"{trap} {{ emu_trap({_literal(symbol)}); }}", ""]
    lines.append("#pragma GCC visibility pop")
    return "\n".join(lines) + "\n"


def main(argv: Iterable[str] | None = None) -> int:
    """Print the generated text, or write it to a file."""
    parser = argparse.ArgumentParser(prog="codegen.py", description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path, help="TOML file (default: signatures.toml)")
    parser.add_argument("--glue", metavar="VERSION", help="C text of an emulated runtime instead")
    parser.add_argument("--output", type=Path, help="file to write, only if changed")
    options = parser.parse_args(None if argv is None else list(argv))
    try:
        registry = reader.load(options.registry)
        text = (
            emulated_glue(registry, reader.parse_version(options.glue))
            if options.glue
            else cython_text(registry)
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if options.output is None:
        print(text)
    elif write_if_changed(options.output, text):
        print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
