"""Fixtures of the tests of the core."""

from __future__ import annotations

import os

import pytest

from kvsig import _core, emulated


@pytest.fixture
def bind():
    """Bind kvsig to an emulated runtime, by version or by file, and return its Control."""
    bound = []

    def go(spec, before=None):
        if before is not None:
            before(emulated.Control(spec if os.sep in spec else spec.partition("/")[0]))
        _core.rebind(spec if os.sep in spec and not spec[0].isdigit() else f"emulated:{spec}")
        control = emulated.Control(_core.info()["library"])
        bound.append(control)
        if before is None:
            control.reset()
        return control

    yield go
    for control in bound:
        control.reset()
    _core.rebind(None)


@pytest.fixture
def stream(bind):
    """A stream of the runtime that is bound when it is first asked for."""
    made = []

    def go():
        made.append(emulated.Stream())
        return made[-1]

    yield go
    for one in made:
        one.control.reset()
        one.synchronize()
        one.destroy()
