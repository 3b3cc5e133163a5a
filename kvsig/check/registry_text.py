"""Writes registry entries as TOML, in the style of ``signatures.toml``."""

from __future__ import annotations

import json
from collections.abc import Iterable

from kvsig.registry import (
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
)

__all__ = ["dump", "enum_text", "function_text", "struct_text", "variant_text"]


def quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False)


def _array(key: str, items: Iterable[str]) -> str:
    listed = list(items)
    line = f"{key} = [{', '.join(listed)}]\n"
    if len(listed) < 2 and len(line) <= 100:
        return line
    return f"{key} = [\n" + "".join(f"    {item},\n" for item in listed) + "]\n"


def _value(value: int | str | dict[str, int]) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {number}' for key, number in value.items())} }}"
    return quoted(value) if isinstance(value, str) else str(value)


def _param(param: Param) -> str:
    extra = "" if param.value is None else f", value = {_value(param.value)}"
    extra += ", out = true" if param.out else ""
    text = quoted(param.declaration)
    return f"{{ declaration = {text}{extra} }}" if extra else text


def _field(item: Field) -> str:
    text = quoted(item.declaration)
    if item.member == item.name:
        return text
    return f"{{ declaration = {text}, member = {quoted(item.member)} }}"


def _library(library: Library) -> str:
    names = [quoted(soname) for soname in library.sonames]
    text = (
        f"[library.{library.name}]\nheader = {quoted(library.header)}\n"
        f"soname = {names[0] if len(names) == 1 else '[' + ', '.join(names) + ']'}\n"
        f"version = {quoted(library.version)}\n"
    )
    text += f"lookup = {quoted(library.lookup)}\n" if library.lookup else ""
    return text + ("optional = true\n" if library.optional else "")


def alias_text(alias: Alias) -> str:
    """An alias, as a line that stands under ``[alias]`` or, whole, at the end of a file."""
    return f"{alias.name} = {quoted(str(alias.type))}\n"


def enum_text(enum: Enum) -> str:
    """``[enum.NAME]`` with its constants."""
    since = f"since = {quoted(format_version(enum.since))}\n" if enum.since else ""
    constants = "".join(f"{name} = {value}\n" for name, value in enum.constants.items())
    return (
        f"[enum.{enum.name}]\nlibrary = {quoted(enum.library)}\n{since}\n"
        f"[enum.{enum.name}.constants]\n{constants}"
    )


def struct_text(struct: Struct) -> str:
    """``[struct.NAME]`` with its fields."""
    text = f"[struct.{struct.name}]\nlibrary = {quoted(struct.library)}\n"
    if struct.since:
        text += f"since = {quoted(format_version(struct.since))}\n"
    if struct.size is not None:
        text += f"size = {struct.size}\n"
    if struct.typedef:
        text += "typedef = true\n"
    if struct.grows:
        text += f"grows = {quoted(struct.grows)}\n"
    return text + (_array("fields", map(_field, struct.fields)) if struct.fields else "")


def variant_text(function: str, variant: Variant) -> str:
    """``[[function.NAME.variant]]``."""
    text = f"[[function.{function}.variant]]\nsince = {quoted(format_version(variant.since))}\n"
    if variant.before is not None:
        text += f"before = {quoted(format_version(variant.before))}\n"
    if variant.symbol != function:
        text += f"symbol = {quoted(variant.symbol)}\n"
    if variant.pinned is not None:
        text += f"pinned = {quoted(format_version(variant.pinned))}\n"
    if variant.open:
        text += f"open = {quoted(variant.open)}\n"
    text += f"reason = {quoted(variant.reason)}\n"
    return text + _array("params", map(_param, variant.params))


def function_text(function: Function) -> str:
    """``[function.NAME]`` with its variants."""
    text = (
        f"[function.{function.name}]\nlibrary = {quoted(function.library)}\n"
        f"returns = {quoted(str(function.returns))}\nsummary = {quoted(function.summary)}\n"
        f"page = {quoted(function.page)}\n"
    )
    if function.stands_in_for:
        text += f"stands_in_for = {quoted(function.stands_in_for)}\n"
    if function.result:
        text += "result = true\n"
    return "\n".join([text, *(variant_text(function.name, v) for v in function.variants)])


def dump(registry: Registry) -> str:
    """A whole registry as TOML; `kvsig.registry.parse` reads it back to an equal one."""
    parts = [_array("verified", map(quoted, registry.verified))]
    hashes = registry.sha256.items()
    parts.append("[sha256]\n" + "".join(f"{quoted(n)} = {quoted(h)}\n" for n, h in hashes))
    parts += [_library(library) for library in registry.libraries.values()]
    parts.append("[alias]\n" + "".join(map(alias_text, registry.aliases.values())))
    parts += [enum_text(enum) for enum in registry.enums.values()]
    parts += [struct_text(struct) for struct in registry.structs.values()]
    parts += [function_text(function) for function in registry.functions.values()]
    return "\n".join(parts)
