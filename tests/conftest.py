"""Fixtures and markers that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from kvsig import _core, registry
from kvsig.emulated import Control

BATCH = "cudaMemcpyBatchAsync"

#: One version for each prototype of the batch function: where a version matters, these do.
EMULATED_VERSIONS = tuple(
    registry.format_version(variant.since) for variant in registry.load().functions[BATCH].variants
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(params=["12.9", "13.0"])
def control(request: pytest.FixtureRequest) -> Iterator[Control]:
    """Bind to an emulated runtime of either prototype, and give its recorder and its faults."""
    _core.rebind(f"emulated:{request.param}")
    found = Control(_core.info()["library"])
    found.reset()
    yield found
    found.reset()
    _core.rebind(None)


@pytest.fixture
def emulated_runtime() -> Iterator[Callable[[str], None]]:
    """``emulated_runtime("12.9")`` binds kvsig to that emulated runtime until the test ends."""

    def bind(version: str) -> None:
        _core.rebind(f"emulated:{version}")

    yield bind
    _core.rebind(None)


@pytest.fixture(params=EMULATED_VERSIONS)
def emulated(request: pytest.FixtureRequest, emulated_runtime: Callable[[str], None]) -> str:
    """The test runs once per prototype of the batch function; the value is the version."""
    version: str = request.param
    emulated_runtime(version)
    return version
