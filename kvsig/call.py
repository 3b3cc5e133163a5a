"""`kvsig.call`: any function of the registry, its arguments by name."""

from __future__ import annotations

import ctypes
import difflib
import sys
from types import ModuleType
from typing import Any

from . import _core, _marshal
from ._errors import BindError
from .binding import Row
from .registry import CType, Function, Param, Registry

__all__ = ["call"]


def call(function: str, /, **arguments: Any) -> Any:
    """Call a function of the registry by the prototype that is bound.

    Parameters
    ----------
    function : str
        Name, such as ``"cudaMemPrefetchAsync"``.
    **arguments
        By the header's names. An argument that only another variant has is dropped. Pointers and
        handles are ints, None, arrays and tensors that are one block of memory, streams or
        events; enums are numbers or names of constants; structs are dicts or tuples.
        Out-parameters need not be given.

    Returns
    -------
    object
        The value of the out-parameter; a dict by name where there are several; None where there
        is none; what the function returns where that is the result.

    Raises
    ------
    ValueError
        If the function is not in the registry, or a value does not fit.
    TypeError
        If an argument is missing, of the wrong type, or no variant knows it.
    BindError
        If the function is not bound here; the message says why.
    CudaError
        If the function answers an error.
    """
    registry = _core.registry_of()
    entry = registry.functions.get(function)
    if entry is None:
        close = difflib.get_close_matches(function, registry.functions, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{function!r} is not in {registry.path}{hint}")
    row = _core.row_of(function)
    variant = row.variant
    if not row.address or variant is None:
        raise BindError(f"{function} is not bound: {row.why}")
    _check_names(row, arguments)
    values, outs, alive = [], {}, []
    for param in variant.params:
        if param.out and param.name not in arguments:
            target = CType(param.type.base, param.type.const, param.type.pointers[:-1])
            raw = bytearray(registry.layout(target)[0])
            outs[param.name] = (target, raw)
            value, keep = _address(raw)
        else:
            given = arguments.get(param.name, param.value)
            value, keep = _argument(registry, entry, param, given)
        values.append(value)
        alive.append(keep)  # until the function has returned
    result = _core.invoke_row(row, tuple(values))
    del alive
    return _result(registry, entry, result, outs)


def _check_names(row: Row, arguments: dict[str, Any]) -> None:
    """Each argument must be one of some variant, and none of the bound one's may lack."""
    variant = row.variant
    assert variant is not None
    known = {param.name for other in row.function.variants for param in other.params}
    for name in arguments:
        if name not in known:
            takes = ", ".join(p.name for p in variant.params) or "nothing"
            raise TypeError(
                f"{row.function.name} has no parameter {name!r}; {variant.label} takes: {takes}"
            )
    needs = [p for p in variant.params if p.value is None and not p.out]
    missing = [p.declaration for p in needs if p.name not in arguments]
    if missing:
        raise TypeError(
            f"{row.function.name} of {variant.label} needs {', '.join(map(repr, missing))};"
            f" all that it needs: {'; '.join(p.declaration for p in needs)}"
        )


def _argument(registry: Registry, function: Function, param: Param, value: Any) -> tuple[Any, Any]:
    """One argument as the generated callers take it, and what must stay alive for it."""
    where = f"{function.name}({param.name})"
    ctype = registry.resolve(param.type)
    if not ctype.pointers:
        return _marshal.pack(registry, param.type, value, where), None
    if isinstance(value, str | bytes) and ctype.base == "char":
        text = value.encode() if isinstance(value, str) else value
        return _address(bytearray(text + b"\0"))
    if isinstance(value, dict | tuple | list) and ctype.name in registry.structs:
        target = CType(param.type.base)
        items = value if isinstance(value, list) else [value]
        packed = [_marshal.pack(registry, target, item, where) for item in items]
        return _address(bytearray().join(p for p in packed if isinstance(p, bytes)))
    return _marshal.address_of(value, where), value


def _address(raw: bytearray) -> tuple[int, Any]:
    """Address of a buffer, and what keeps it there."""
    if not raw:
        return 0, raw
    view = (ctypes.c_char * len(raw)).from_buffer(raw)
    return ctypes.addressof(view), view


def _result(
    registry: Registry, function: Function, result: Any, outs: dict[str, tuple[CType, bytearray]]
) -> Any:
    """What the caller gets; an error code is raised."""
    returns = registry.resolve(function.returns)
    if isinstance(result, bytes):
        return result.decode("utf-8", "replace")
    if returns.pointers or function.result or returns.name not in registry.enums:
        return result
    if result != 0:
        raise _core.error_of(result, function.name)
    found = {name: _written(registry, ctype, raw) for name, (ctype, raw) in outs.items()}
    return next(iter(found.values())) if len(found) == 1 else found or None


def _written(registry: Registry, ctype: CType, raw: bytearray) -> Any:
    """What CUDA has written for an out-parameter; a text where that is the address of one."""
    value = _marshal.unpack(registry, ctype, raw)
    if (ctype.base, ctype.const, len(ctype.pointers)) == ("char", True, 1) and value:
        return ctypes.string_at(value).decode("utf-8", "replace")
    return value


class _CallableModule(ModuleType):
    """``import kvsig.call`` puts this module where the function was: it can be called as well."""

    def __call__(self, function: str, /, **arguments: Any) -> Any:
        """Call a function of the registry, as `call` does."""
        return call(function, **arguments)


sys.modules[__name__].__class__ = _CallableModule
