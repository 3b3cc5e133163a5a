"""Releases of CUDA that are yet to come, whatever the registry knows by now."""

from __future__ import annotations

from kvsig import registry

_TABLE = registry.load()

#: The major after the newest range of the registry: no function has a closed range that covers it.
NEXT = max(_TABLE.boundaries())
#: The major after that one.
AFTER = registry.next_major(NEXT)
NEXT_TEXT, AFTER_TEXT = registry.format_version(NEXT), registry.format_version(AFTER)


def last(function: str) -> str:
    """The range of a function's newest variant, as errors name it."""
    return _TABLE.functions[function].variants[-1].label
