"""Fixtures and markers that all tests share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvsig
from kvsig import _core, registry
from kvsig.emulated import Control

BATCH = "cudaMemcpyBatchAsync"

#: One version for each prototype of the batch function: where a version matters, these do.
EMULATED_VERSIONS = tuple(
    registry.format_version(variant.since) for variant in registry.load().functions[BATCH].variants
)


def why_no_gpu() -> str | None:
    """Why tests on a GPU cannot run; most rooms' tests need no torch, so it may be missing."""
    if importlib.util.find_spec("torch") is None:
        return "no torch, which would say whether there is a CUDA device"
    import torch

    if torch.cuda.is_available():
        return None
    return "no CUDA device: torch.cuda.is_available() is False"


def why_no_checkout() -> str | None:
    """Why tests of kvsig's own sources cannot run: a wheel is tested, far from them."""
    sources = Path(kvsig.__file__).parents[1] / "setup.py"
    return None if sources.is_file() else f"kvsig's sources are not here: there is no {sources}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {"gpu": why_no_gpu(), "checkout": why_no_checkout()}
    for name, reason in reasons.items():
        for item in items:
            if reason is not None and item.get_closest_marker(name) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


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
