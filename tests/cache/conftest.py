"""Fixtures of the tests of the cache and of lists of copies."""

from __future__ import annotations

import pytest

from kvsig import _core, emulated


@pytest.fixture(params=["12.6", "12.9", "13.0"])
def runtime(request):
    _core.rebind(f"emulated:{request.param}")
    yield request.param
    _core.rebind(None)


@pytest.fixture
def stream(runtime):
    with emulated.Stream() as stream:
        yield stream
