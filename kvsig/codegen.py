"""Generates code from the registry: Cython for the core, C for the emulated runtime.

It knows no CUDA function by name, only what ``signatures.toml`` says. Standard library only.
By hand::

    python kvsig/codegen.py             # print the Cython text
    python kvsig/codegen.py --glue 13.0 # print the C text of the emulated 13.0 runtime
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from . import registry as _registry
else:
    # Run by file path, from setup.py or by hand: importing the package would need the extension
    # that is about to be built. Frozen dataclasses want the module in sys.modules first.
    _spec = importlib.util.spec_from_file_location(
        "kvsig_registry", Path(__file__).with_name("registry.py")
    )
    _registry = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = _registry
    _spec.loader.exec_module(_registry)

if TYPE_CHECKING:
    from .registry import CType, Function, Param, Registry, Struct, Variant

__all__ = ["cython_text", "emulated_glue", "emulated_versions", "write_if_changed"]

UNBOUND = -1
"""What a caller answers for a function that has no variant; no CUDA error code is negative."""


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


def _cython_type(registry: Registry, ctype: CType) -> str:
    """Spell a type in Cython: aliases and enums are resolved, structs stay."""
    ctype = registry.resolve(ctype)
    base = "int" if ctype.name in registry.enums else ctype.name
    if ctype.name in registry.structs and registry.structs[ctype.name].opaque:
        base = "void"
    stars = "".join("*const " if const else "*" for const in ctype.pointers).strip()
    return f"{'const ' if ctype.const else ''}{base}{' ' if stars else ''}{stars}"


_TAKEN = frozenset(keyword.kwlist) | {
    "DEF", "ELIF", "ELSE", "IF", "NULL", "cdef", "cimport", "cpdef", "ctypedef", "exec", "gil",
    "include", "nogil", "print", "slots", "memset",
}  # fmt: skip


def _safe(name: str) -> str:
    """A parameter name that Cython and the callers leave free: ``from`` is one in C."""
    return f"{name}_" if name in _TAKEN else name


def _pointer_type(function: Function, index: int) -> str:
    return f"{function.name}_{index}"


def _write_constants(registry: Registry) -> Iterator[str]:
    yield "cdef enum:"
    yield f"    UNBOUND = {UNBOUND}"
    for enum in registry.enums.values():
        for name, value in enum.constants.items():
            yield f"    {name} = {value}"
    yield ""


def _write_struct(registry: Registry, struct: Struct) -> Iterator[str]:
    if struct.opaque:
        return
    yield f"cdef struct {struct.name}:"
    for field in struct.fields:
        length = f"[{field.length}]" if field.length is not None else ""
        yield f"    {_cython_type(registry, field.type)}{length} {_safe(field.name)}"
    yield ""


def _write_types(registry: Registry, function: Function) -> Iterator[str]:
    returns = _cython_type(registry, function.returns)
    for index, variant in enumerate(function.variants):
        params = ", ".join(_cython_type(registry, p.type) for p in variant.params)
        yield f"# {variant.label}: {variant.reason}"
        yield f"ctypedef {returns} (*{_pointer_type(function, index)})({params}) noexcept nogil"


def _constant(registry: Registry, param: Param) -> str:
    """The value of a parameter that no caller gives, as Cython text."""
    if isinstance(param.value, dict):
        return f"fixed_{param.name}"
    return f"<{_cython_type(registry, param.type)}>{param.value}"


def _write_caller(registry: Registry, function: Function, slot: int) -> Iterator[str]:
    given = function.caller_params
    params = ", ".join(f"{_cython_type(registry, t)} {_safe(n)}" for n, t in given.items())
    returns = _cython_type(registry, function.returns)
    yield f"cdef inline {returns} {function.name}({params}) noexcept nogil:"
    yield f"    cdef int bound_variant_ = slots[{slot}].variant"
    fixed = {p.name: p for v in function.variants for p in v.params
             if isinstance(p.value, dict) and p.name not in given}  # fmt: skip
    for name, param in fixed.items():
        yield f"    cdef {_cython_type(registry, param.type)} fixed_{name}"
        yield f"    memset(&fixed_{name}, 0, sizeof(fixed_{name}))"
        assert isinstance(param.value, dict)
        for key, number in param.value.items():
            yield f"    fixed_{name}.{_safe(key)} = {number}"
    for index, variant in enumerate(function.variants):
        arguments = ", ".join(
            f"<{_cython_type(registry, p.type)}>{_safe(p.name)}"
            if p.name in given and registry.resolve(p.type).pointers
            else (_safe(p.name) if p.name in given else _constant(registry, p))
            for p in variant.params
        )
        pointer = f"(<{_pointer_type(function, index)}>slots[{slot}].address)"
        yield f"    if bound_variant_ == {index}:"
        yield f"        return {pointer}({arguments})"
    missing = "NULL" if registry.resolve(function.returns).pointers else "UNBOUND"
    yield f"    return {missing}"
    yield ""


def _write_invoker(registry: Registry, function: Function, index: int) -> Iterator[str]:
    """A caller with arguments from a tuple: integers, floats, and bytes for structs."""
    variant = function.variants[index]
    name = f"invoke_{_pointer_type(function, index)}"
    returns = _cython_type(registry, function.returns)
    pointer = registry.resolve(function.returns).pointers
    yield f"cdef object {name}(void *address, tuple arguments):"
    names = []
    for position, param in enumerate(variant.params):
        ctype = registry.resolve(param.type)
        spelled = _cython_type(registry, param.type)
        item = f"arguments[{position}]"
        names.append(f"p{position}")
        if ctype.pointers:
            yield f"    cdef {spelled} p{position} = <{spelled}><size_t>{item}"
        elif ctype.name in registry.structs:
            yield f"    cdef {spelled} p{position}"
            yield f"    memcpy(&p{position}, <const char *><bytes>{item}, sizeof(p{position}))"
        else:
            yield f"    cdef {spelled} p{position} = {item}"
    yield f"    cdef {returns} result"
    yield "    with nogil:"
    yield f"        result = (<{_pointer_type(function, index)}>address)({', '.join(names)})"
    if pointer:
        yield "    return <bytes>result if result != NULL else None"
    else:
        yield "    return result"
    yield ""


def _write_invoke(registry: Registry) -> Iterator[str]:
    yield "cdef object invoke(int slot, tuple arguments):"
    yield "    cdef void *address = slots[slot].address"
    yield "    cdef int which = slots[slot].variant"
    word = "if"
    for slot, function in enumerate(registry.functions.values()):
        for index in range(len(function.variants)):
            yield f"    {word} slot == {slot} and which == {index}:"
            yield f"        return invoke_{_pointer_type(function, index)}(address, arguments)"
            word = "elif"
    yield '    raise SystemError("no invoker for slot %d, variant %d" % (slot, which))'
    yield ""


def _write_layout(registry: Registry) -> Iterator[str]:
    """Sizes as the C compiler sees them, for the check of the registry's own figures."""
    yield "STRUCT_SIZES = {"
    for struct in registry.structs.values():
        if not struct.opaque:
            yield f'    "{struct.name}": sizeof({struct.name}),'
    yield "}"
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
        f'DIGEST = "{registry.digest}"',
        f"FUNCTIONS = {tuple(registry.functions)!r}",
        "",
        "cdef struct Slot:",
        "    void *address",
        "    int variant",
        "",
        f"cdef Slot[{len(registry.functions)}] slots",
        "",
        "cdef enum:",
        *(f"    SLOT_{name} = {slot}" for slot, name in enumerate(registry.functions)),
        "",
        *_write_constants(registry),
    ]
    for struct in registry.structs.values():
        lines += _write_struct(registry, struct)
    lines += _write_layout(registry)
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
    return registry.boundaries("cudart")


def _write_c_types(registry: Registry) -> Iterator[str]:
    for enum in registry.enums.values():
        constants = [f"{n} = {v}" for n, v in enum.constants.items()] or [f"{enum.name}_zero_"]
        yield f"enum {enum.name} {{ {', '.join(constants)} }};"
        yield f"typedef enum {enum.name} {enum.name};"
    for alias in registry.aliases.values():
        spelled = str(alias.type)
        yield f"typedef {spelled}{'' if spelled.endswith('*') else ' '}{alias.name};"
    for struct in registry.structs.values():
        yield f"typedef struct {struct.name} {struct.name};"
    for struct in registry.structs.values():
        if not struct.opaque:
            fields = " ".join(f"{field.declaration};" for field in struct.fields)
            yield f"struct {struct.name} {{ {fields} }};"
            yield (
                f"_Static_assert(sizeof(struct {struct.name}) == {struct.size},"
                f' "size of struct {struct.name}");'
            )
    yield ""


def _write_exported(function: Function, variant: Variant) -> Iterator[str]:
    count = len(variant.params)
    yield f"{function.prototype(variant, variant.symbol)}"
    yield "{"
    array = "NULL"
    if count:
        array = "arguments"
        yield "    const struct emu_arg arguments[] = {"
        for param in variant.params:
            text = str(param.type)
            yield f'        {{"{param.name}", "{text}", &{param.name}, sizeof({param.name})}},'
        yield "    };"
    dispatch = "emu_dispatch_pointer" if "*" in str(function.returns) else "emu_dispatch"
    yield (
        f"    return ({function.returns}){dispatch}("
        f'"{function.name}", "{variant.symbol}", "{variant.label}", {array}, {count});'
    )
    yield "}"
    yield ""


def _write_trap(symbol: str) -> Iterator[str]:
    yield f"void {symbol}(void);"
    yield f'void {symbol}(void) {{ emu_trap("{symbol}"); }}'
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
        *_write_c_types(registry),
    ]
    exported: set[str] = set(without)
    traps: list[str] = []
    for function in registry.functions.values():
        if function.library != "cudart":
            # What is the driver's lies in the same file here, in every form: a driver keeps its
            # old entry points, and its version is set apart from the runtime's.
            for form in reversed(function.variants):
                if form.symbol not in exported:
                    exported.add(form.symbol)
                    lines += _write_exported(function, form)
            continue
        variant = function.select(version)
        if variant is not None:
            if variant.symbol not in exported:
                exported.add(variant.symbol)
                lines += _write_exported(function, variant)
            if variant.symbol != function.name:
                traps.append(function.name)
        elif version >= function.variants[-1].since:
            traps.append(function.variants[-1].symbol)
    for symbol in traps:
        if symbol not in exported:
            exported.add(symbol)
            lines += _write_trap(symbol)
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
        registry = _registry.load(options.registry)
        text = (
            emulated_glue(registry, _registry.parse_version(options.glue))
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
