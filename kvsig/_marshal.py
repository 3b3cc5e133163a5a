"""Python values to C arguments and back, as the registry's types say.

Structs are laid out by the registry (`Registry.layout`), whose sizes and offsets the compiler has
confirmed in the generated code.
"""

from __future__ import annotations

import struct as _struct
from collections.abc import Mapping, Sequence
from typing import Any

from .registry import CType, Registry, Struct

_FORMATS = {
    "char": "b",
    "signed char": "b",
    "unsigned char": "B",
    "short": "h",
    "unsigned short": "H",
    "int": "i",
    "unsigned int": "I",
    "long": "q",
    "unsigned long": "Q",
    "long long": "q",
    "unsigned long long": "Q",
    "size_t": "Q",
    "float": "f",
    "double": "d",
}


def address_of(value: Any, where: str) -> int:
    """Address that a pointer argument stands for.

    Parameters
    ----------
    value : int, None, array or tensor
        None is NULL. An array or a tensor stands for the address of its first element; it must
        be one block of memory, for CUDA knows nothing of strides.
    where : str
        Name of the argument, for the error.

    Raises
    ------
    TypeError
        If the value is none of these.
    ValueError
        If the address is negative or has more than 64 bits, or there are gaps in an array.
    """
    if value is None:
        return 0
    if hasattr(value, "data_ptr"):
        size = value.element_size()
        _check_dense(value.shape, [size * stride for stride in value.stride()], size, where)
        return int(value.data_ptr())
    if hasattr(value, "__array_interface__"):
        interface = value.__array_interface__
        if interface.get("strides") is not None:
            size = int(interface["typestr"][2:])
            _check_dense(interface["shape"], interface["strides"], size, where)
        return int(interface["data"][0])
    if hasattr(value, "cuda_stream"):
        return int(value.cuda_stream)
    if hasattr(value, "cuda_event"):
        return int(value.cuda_event)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f"{where}={value!r} is no address; give an int, None, an array, a tensor,"
            " a stream or an event"
        )
    address = int(value)
    if not 0 <= address < 2**64:
        raise ValueError(f"{where}={address} is no address: it must be in [0, 2**64)")
    return address


def _check_dense(shape: Sequence[int], strides: Sequence[int], size: int, where: str) -> None:
    """The elements must lie one behind the other, in whatever order of the dimensions."""
    if 0 in shape:
        return
    expected = size
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length != 1 and stride != expected:
            raise ValueError(
                f"{where} is an array of shape {tuple(shape)} with strides of {tuple(strides)}"
                " bytes, which is not one block of memory: CUDA would take other bytes. Give a"
                " contiguous copy of it, or its address as an int"
            )
        expected *= length


def _format(registry: Registry, ctype: CType) -> str | None:
    """The struct module's code of a type, or None for a struct by value."""
    ctype = registry.resolve(ctype)
    if ctype.pointers:
        return "Q"
    if ctype.name in registry.enums:
        return "i"
    return _FORMATS.get(ctype.base)


def _struct_of(registry: Registry, ctype: CType) -> Struct:
    return registry.structs[registry.resolve(ctype).name]


def _looks_like_a_number(text: str) -> bool:
    for kind in (float, lambda t: int(t, 0)):
        try:
            kind(text)
        except ValueError:
            continue
        return True
    return False


def _number(registry: Registry, ctype: CType, value: Any, where: str) -> int | float:
    resolved = registry.resolve(ctype)
    if resolved.pointers:
        return address_of(value, where)
    if isinstance(value, str):
        own = registry.enums.get(resolved.name)
        for enum in registry.enums.values() if own is None else (own,):
            if value in enum.constants:
                return enum.constants[value]
        if _looks_like_a_number(value):
            raise TypeError(f"{where}={value!r} is text; give {ctype} as a number, not as text")
        of = "" if own is None else f"{own.name} in "
        raise ValueError(f"{where}={value!r} is no constant of {of}the registry; give its number")
    code = _format(registry, ctype)
    if code in ("f", "d"):
        return float(value)
    if not hasattr(value, "__index__"):
        raise TypeError(f"{where}={value!r} is no integer, which {ctype} needs")
    number = int(value)
    try:
        _struct.pack("=" + str(code), number)
    except _struct.error:
        raise ValueError(f"{where}={number} does not fit into {ctype}") from None
    return number


def pack(registry: Registry, ctype: CType, value: Any, where: str) -> int | float | bytes:
    """One value of a type, as the generated callers take it.

    Parameters
    ----------
    registry : Registry
    ctype : CType
    value : object
        A number; the name of an enum's constant; an address (see `address_of`); for a struct a
        mapping by field or a sequence in order.
    where : str
        Name of the argument, for errors.

    Returns
    -------
    int, float or bytes
        Bytes for a struct.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, the value and what is needed.
    """
    if _format(registry, ctype) is not None:
        return _number(registry, ctype, value, where)
    struct = _struct_of(registry, ctype)
    names = [field.name for field in struct.fields]
    if isinstance(value, Mapping):
        for key in value:
            if key not in names:
                raise ValueError(
                    f"{where} has no field {key!r}; struct {struct.name} has {', '.join(names)}"
                )
        items = [value.get(name, 0) for name in names]
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) != len(names):
            raise ValueError(
                f"{where} has {len(value)} values; struct {struct.name} has"
                f" {len(names)}: {', '.join(names)}"
            )
        items = list(value)
    else:
        raise TypeError(
            f"{where}={value!r} is no struct {struct.name}; give a dict or a tuple of"
            f" {', '.join(names)}"
        )
    raw = bytearray(registry.layout(ctype)[0])
    places = registry.offsets(struct.name)
    for field, item, (offset, size) in zip(struct.fields, items, places, strict=True):
        if type(item) is int and item == 0:
            continue  # it is, whatever the field's type
        place = f"{where}.{field.name}"
        if field.length is None:
            raw[offset : offset + size] = _bytes(registry, field.type, item, place)
        else:
            if len(item) != field.length:
                raise ValueError(f"{place} has {len(item)} values; it takes {field.length}")
            parts = [_bytes(registry, field.type, one, place) for one in item]
            raw[offset : offset + size] = b"".join(parts)
    return bytes(raw)


def _bytes(registry: Registry, ctype: CType, value: Any, where: str) -> bytes:
    packed = pack(registry, ctype, value, where)
    if isinstance(packed, bytes):
        return packed
    return _struct.pack("=" + str(_format(registry, ctype)), packed)


def unpack(registry: Registry, ctype: CType, raw: bytes | bytearray) -> Any:
    """A value of a type from its bytes: a number, or a dict for a struct."""
    code = _format(registry, ctype)
    if code is not None:
        return _struct.unpack("=" + code, raw)[0]
    struct = _struct_of(registry, ctype)
    found: dict[str, Any] = {}
    for field, (offset, size) in zip(struct.fields, registry.offsets(struct.name), strict=True):
        part = raw[offset : offset + size]
        if field.length is None:
            found[field.name] = unpack(registry, field.type, part)
        else:
            one = size // field.length
            found[field.name] = [
                unpack(registry, field.type, part[at : at + one]) for at in range(0, size, one)
            ]
    return found
