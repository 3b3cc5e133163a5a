"""Imports run downward only: a room knows the rooms below it, and none above."""

from __future__ import annotations

import pytest
from house.sources import imported, modules

#: Rooms from the ground up, each with its modules; ``.*`` stands for all below a package. A
#: module imports those of its own room and of the rooms before it. A new module gets a place here.
ROOMS = {
    "registry": ("registry_types", "registry_model", "registry"),
    "codegen": ("codegen", "stubs"),
    "words": ("_errors", "_path"),
    "planning": ("planning", "planning.*"),
    "runtime": ("_loader", "library", "runtime"),
    "core": ("binding", "_core", "_kernel", "_generated", "_page_copy"),
    "counters": ("_counters",),
    "call": ("_marshal", "call", "_calls"),
    "kernel": ("kernel",),
    "emulated": ("emulated", "emulated.*"),
    "tensors": ("streams", "memory", "numbers", "tensors"),
    "transfer": ("layouts", "_transfer", "launching"),
    "cache": ("cache", "merging", "copies"),
    "observe": ("observe",),
    "kvsig": ("",),
    "engines": ("ops", "integrations", "integrations.*"),
    "check": ("check", "check.*"),
    "tools": ("tools", "tools.*"),
    "cli": ("cli", "cli.*", "__main__"),
}
#: The registry is read by the build, before there is any extension, NumPy or torch.
STANDARD = ("registry", "codegen")
#: What a plan is made of: no CUDA, no torch, no clock.
FORBIDDEN = {
    "planning": ("torch", "time", "random", "datetime", "ctypes"),
    "core": ("torch",),
    "runtime": ("torch", "numpy"),
}

FILES = modules()
KNOWN = frozenset(key.split()[0] for key in FILES) | {
    "kvsig._generated", "kvsig._page_copy", "kvsig._calls"
}  # fmt: skip
ORDER = list(ROOMS)


def room_of(module: str) -> str | None:
    """The room of a module of kvsig, such as ``kvsig.tools.cells``."""
    name = module.removeprefix("kvsig").removeprefix(".")
    for room, members in ROOMS.items():
        if any(
            name.startswith(member[:-1]) if member.endswith(".*") else name == member
            for member in members
        ):
            return room
    return None


def imports_of(key: str) -> set[str]:
    module, _ = key.split()
    file = FILES[key]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return imported(file.read_text(encoding="utf-8"), package, KNOWN)


def test_every_module_has_a_room():
    assert [module for module in sorted(KNOWN) if room_of(module) is None] == []


@pytest.mark.parametrize("key", FILES)
def test_imports_run_downward(key):
    module, _ = key.split()
    here = ORDER.index(room_of(module) or "")
    upward = [
        name
        for name in imports_of(key)
        if name.split(".")[0] == "kvsig" and ORDER.index(room_of(name) or "cli") > here
    ]
    assert upward == [], f"{module} imports from above its room: {upward}"


def test_no_circle():
    """Not even inside a room, and not by an import that waits inside a function."""
    graph: dict[str, set[str]] = {module: set() for module in KNOWN}
    for key in FILES:
        module = key.split()[0]
        graph[module] |= imports_of(key) & KNOWN - {module, "kvsig"}
    while leaves := {module for module, below in graph.items() if not below}:
        graph = {m: below - leaves for m, below in graph.items() if m not in leaves}
    assert graph == {}


@pytest.mark.parametrize("key", [k for k in FILES if room_of(k.split()[0]) in STANDARD])
def test_the_registry_needs_nothing_but_python(key):
    import sys

    others = {name.split(".")[0] for name in imports_of(key)} - sys.stdlib_module_names
    assert others <= {"kvsig"}


@pytest.mark.parametrize("key", [k for k in FILES if room_of(k.split()[0]) in FORBIDDEN])
def test_what_a_room_may_not_know(key):
    forbidden = FORBIDDEN[room_of(key.split()[0]) or ""]
    assert {name.split(".")[0] for name in imports_of(key)}.isdisjoint(forbidden)


class TestReading:
    """The reader finds what it has to: else the tests above would pass on anything."""

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("import kvsig.cache\n", "kvsig.cache"),
            ("from kvsig import cache as a, b\n", "kvsig.cache"),
            ("from kvsig import (\n    tensors,\n    cache,  # why\n)\n", "kvsig.cache"),
            ("def f():\n    from .cache import X\n", "kvsig.cache"),
            ("from . import cache\n", "kvsig.cache"),
            ("from kvsig.cache cimport X\n", "kvsig.cache"),
            ("cimport numpy, kvsig.cache as c\n", "kvsig.cache"),
            ('include "_kernel.pxi"\n', "kvsig._kernel"),
            ('x = import_module("kvsig.cache")\n', "kvsig.cache"),
        ],
    )
    def test_an_import(self, text, found):
        assert found in imported(text, "kvsig", KNOWN)

    @pytest.mark.parametrize(
        "text", ['"""Text.\n\nfrom kvsig import cache\n"""\n', "# from kvsig import cache\n"]
    )
    def test_no_import(self, text):
        assert imported(text, "kvsig", KNOWN) == set()

    def test_from_a_package(self):
        assert imported("from .. import cache\n", "kvsig.tools", KNOWN) == {"kvsig.cache"}
        assert imported("from .cells import A\n", "kvsig.tools", KNOWN) == {"kvsig.tools.cells"}
