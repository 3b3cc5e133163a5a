"""Fixtures of the integrations: engines of our own making, and their streams."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
from standins import Engine, Hooks, HookType, Originals, module

from kvsig import observe, streams
from kvsig.emulated import Control, Stream
from kvsig.integrations import sglang as integration
from kvsig.integrations.sglang import launches, layered, pools


@pytest.fixture(autouse=True)
def counters() -> Iterator[None]:
    """Counters begin at zero in each test."""
    observe.clear()
    yield
    observe.clear()


@pytest.fixture(autouse=True)
def launches_of_one_runtime(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is known of tensors, and put on the device, belongs to a test's emulated runtime."""
    if "control" not in request.fixturenames:
        yield
        return
    control = request.getfixturevalue("control")
    yield
    control.synchronize()
    kept = launches._known, launches._lanes, launches._codes, layered._helpers, pools._geometries
    for each in kept:
        each.clear()


@pytest.fixture(params=["legacy", "own"])
def stream(
    request: pytest.FixtureRequest, control: Control, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """The current stream of the engine: the legacy one, and one of its own."""
    if request.param == "legacy":
        yield 0
        return
    with Stream(control) as own:
        monkeypatch.setattr(streams, "current_handle", lambda device: own.cuda_stream)
        yield own.cuda_stream


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A small SGLang: kernels, plugins, and a module that has imported names from the kernels."""
    originals = Originals()
    functions = originals.functions()
    module(monkeypatch, "sgl_kernel", __version__="0.4.10")
    io = module(monkeypatch, "sgl_kernel.kvcacheio", **functions)
    module(monkeypatch, "sglang", __version__="0.5.23")
    for name in ("srt", "srt.plugins", "srt.mem_cache"):
        module(monkeypatch, f"sglang.{name}")
    module(
        monkeypatch, "sglang.srt.plugins.hook_registry", HookRegistry=Hooks, HookType=HookType
    )
    pool = module(monkeypatch, "sglang.srt.mem_cache.memory_pool_host", **functions)
    yield types.SimpleNamespace(
        io=io, pool=pool, calls=originals.calls, functions=functions, hooks=Hooks
    )
    integration.uninstall()
    Hooks.waiting.clear()


@pytest.fixture
def engine(served: Any, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """SGLang's engine of layered loads, hooked."""
    kind = type("L2TransferEngine", (Engine,), dict(vars(Engine)))
    module(monkeypatch, "sglang.srt.mem_cache.l2_transfer", L2TransferEngine=kind)
    integration.install()
    return kind()


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The streams that are made for events of layers."""
    made: list[Any] = []
    new = streams.new_stream
    monkeypatch.setattr(streams, "new_stream", lambda device: made.append(new(device)) or made[-1])
    return made
